//! The tokens of a batch, and which of them are still computed.

use std::ops::Range;

use super::forward::ForwardError;
use super::step::{Fate, Positions, Step};
use crate::config::ModelConfig;
use crate::kv::Geometry;

/// Tokens of checked steps; they are rows, in order, until they are dropped.
pub(crate) struct Rows<'a> {
    pub(crate) steps: &'a [Step<'a>],
    /// Of each row.
    pub(crate) positions: Vec<usize>,
    /// Rows of each step.
    pub(crate) ranges: Vec<Range<usize>>,
}

impl<'a> Rows<'a> {
    pub(crate) fn new(steps: &'a [Step<'a>]) -> Self {
        let mut positions = Vec::new();
        let ranges = steps.iter().map(|step| {
            let first = positions.len();
            positions.extend((0..step.tokens.len()).filter_map(|index| step.positions.get(index)));
            first..positions.len()
        });
        Self {
            steps,
            ranges: ranges.collect(),
            positions,
        }
    }

    /// First row of a step whose logits are wanted; the end of its rows for none.
    pub(crate) fn first_wanted(&self, step: usize) -> usize {
        let Range { start, end } = self.ranges[step];
        start + self.steps[step].logits.first(end - start)
    }

    /// Which rows stay when those with another fate are dropped.
    pub(crate) fn going_on(fates: &[Fate]) -> impl Iterator<Item = usize> {
        let goes_on = |(_, fate): &(usize, &Fate)| **fate == Fate::GoesOn;
        fates.iter().enumerate().filter(goes_on).map(|(row, _)| row)
    }

    /// Drops rows that do not go on.
    pub(crate) fn drop(&mut self, fates: &[Fate]) {
        let mut first = 0;
        for range in &mut self.ranges {
            let kept = Self::going_on(&fates[range.clone()]).count();
            *range = first..first + kept;
            first += kept;
        }
        let mut fates = fates.iter();
        self.positions
            .retain(|_| fates.next() == Some(&Fate::GoesOn));
    }
}

/// Checks steps against a model, and pages of some geometry.
pub(crate) fn check(
    config: &ModelConfig,
    pool: &Geometry,
    steps: &[Step<'_>],
) -> Result<(), ForwardError> {
    if !pool.fits(config) {
        return Err(ForwardError::Pool);
    }
    for (
        step,
        Step {
            tokens,
            positions,
            blocks,
            ..
        },
    ) in steps.iter().enumerate()
    {
        let Some(last) = tokens.len().checked_sub(1) else {
            return Err(ForwardError::Empty { step });
        };
        if let Positions::At(listed) = positions
            && (listed.len() != tokens.len() || !listed.is_sorted_by(|a, b| a < b))
        {
            return Err(ForwardError::Positions { step });
        }
        let end = positions
            .get(last)
            .map_or(usize::MAX, |position| position.saturating_add(1));
        if end > config.max_positions {
            return Err(ForwardError::TooLong {
                step,
                end,
                limit: config.max_positions,
            });
        }
        if let Some(&token) = tokens
            .iter()
            .find(|&&token| token as usize >= config.vocab_size)
        {
            return Err(ForwardError::Token {
                step,
                token,
                vocab: config.vocab_size,
            });
        }
        pool.check_table(blocks, end)
            .map_err(|source| ForwardError::Pages { step, source })?;
    }
    Ok(())
}
