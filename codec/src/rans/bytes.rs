//! Tables of bytes, as frequent as in what is coded.

use super::{TOTAL, slot};

/// How bytes are coded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ByteTable {
    /// By slot, as [`slot`] has them.
    pub(super) slots: Vec<u32>,
    /// By byte: frequency and first slot, 16 bits each. No frequency where it does not occur.
    pub(super) codes: Vec<u32>,
}

impl ByteTable {
    /// From frequencies that add up to [`TOTAL`]; `None` where they do not.
    pub(crate) fn new(frequencies: &[u16; 256]) -> Option<Self> {
        let total: u32 = frequencies
            .iter()
            .map(|&frequency| u32::from(frequency))
            .sum();
        if total != u32::from(TOTAL) {
            return None;
        }
        let mut slots = Vec::with_capacity(TOTAL.into());
        let mut first = 0;
        let codes = (0..=u8::MAX).zip(frequencies).map(|(byte, &frequency)| {
            let frequency = u32::from(frequency);
            slots.extend((0..frequency).map(|place| slot(byte, frequency, place)));
            let code = frequency | first << 16;
            first += frequency;
            code
        });
        let codes = codes.collect();
        Some(Self { slots, codes })
    }

    /// Frequencies that add up to [`TOTAL`], about as `counts`, of which one is not zero.
    pub(crate) fn frequencies(counts: &[u32; 256]) -> [u16; 256] {
        let total = f64::from(TOTAL);
        let all: f64 = counts.iter().map(|&count| f64::from(count)).sum();
        let mut frequencies = counts.map(|count| {
            #[expect(
                clippy::cast_possible_truncation,
                clippy::cast_sign_loss,
                reason = "at most the total"
            )]
            let near = (f64::from(count) / all * total).round() as u16;
            if count > 0 { near.max(1) } else { 0 }
        });
        // The most frequent one hardly notices what is too much or too little.
        loop {
            let sum: u16 = frequencies.iter().sum();
            let Some(most) = frequencies.iter_mut().max() else {
                return frequencies;
            };
            if sum <= TOTAL {
                *most += TOTAL - sum;
                return frequencies;
            }
            *most -= (sum - TOTAL).min(most.div_ceil(4));
        }
    }
}
