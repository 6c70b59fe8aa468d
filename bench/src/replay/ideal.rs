//! What no policy can exceed.

use std::collections::BTreeSet;

use super::trace::Trace;

/// Tokens hit by a cache without limit.
pub(crate) fn infinite_hit_tokens(trace: &Trace) -> u64 {
    belady_hit_tokens(trace, usize::MAX)
}

/// Tokens hit by Belady's MIN (1966) with a cache of `capacity` blocks: of all blocks,
/// those needed soonest are kept, which takes knowledge of the whole trace.
///
/// A bound in blocks for every policy, also for one that may refuse blocks. Prefixes
/// cost it nothing: whoever needs a block needs those before it, so they are needed as
/// soon, and of two blocks needed at the same time the later in the prompt goes first.
/// In tokens it is a bound but for the last, shorter block of prompts, which is
/// counted as a block of capacity.
pub(crate) fn belady_hit_tokens(trace: &Trace, capacity: usize) -> u64 {
    const NEVER: usize = usize::MAX;
    let mut soonest = vec![NEVER; trace.blocks.len()];
    let mut next_uses: Vec<Vec<usize>> = Vec::with_capacity(trace.requests.len());
    for (number, request) in trace.requests.iter().enumerate().rev() {
        let next = |block: &u32| std::mem::replace(&mut soonest[*block as usize], number);
        next_uses.push(request.blocks.iter().map(next).collect());
    }
    next_uses.reverse();

    let mut stored: BTreeSet<(usize, usize, u32)> = BTreeSet::new();
    let mut place: Vec<Option<(usize, usize, u32)>> = vec![None; trace.blocks.len()];
    let mut tokens = 0;
    for (request, next_uses) in trace.requests.iter().zip(next_uses) {
        let is_stored = |block: &&u32| place[**block as usize].is_some();
        let hit = request.blocks.iter().take_while(is_stored).count();
        tokens += request.tokens_of(hit);
        for (depth, (&block, next)) in request.blocks.iter().zip(next_uses).enumerate() {
            let place = &mut place[block as usize];
            if let Some(before) = place.take() {
                stored.remove(&before);
            }
            if next != NEVER {
                let now = (next, depth, block);
                stored.insert(now);
                *place = Some(now);
            }
        }
        while stored.len() > capacity {
            if let Some((_, _, block)) = stored.pop_last() {
                place[block as usize] = None;
            }
        }
    }
    tokens
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::replay::trace::Line;

    fn trace(prompts: &[&[u64]]) -> Trace {
        let line = |ids: &&[u64]| Line {
            timestamp: 0,
            input_length: 512 * ids.len() as u64,
            output_length: 1,
            hash_ids: ids.to_vec(),
        };
        Trace::from_lines(&prompts.iter().map(line).collect::<Vec<_>>()).unwrap()
    }

    #[test]
    fn the_soonest_needed_stay_and_beginnings_before_ends() {
        let trace = trace(&[&[1, 2], &[3, 4], &[5], &[1, 2], &[3, 4]]);
        assert_eq!(infinite_hit_tokens(&trace), 4 * 512);
        assert_eq!(belady_hit_tokens(&trace, 4), 4 * 512);
        assert_eq!(belady_hit_tokens(&trace, 3), 3 * 512);
        assert_eq!(belady_hit_tokens(&trace, 2), 2 * 512);
        assert_eq!(belady_hit_tokens(&trace, 1), 512);
        assert_eq!(belady_hit_tokens(&trace, 0), 0);
    }
}
