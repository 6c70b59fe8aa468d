//! Which pages are taken.

use super::{BlockId, KvError};

/// Pages that are free, and those that are not.
#[derive(Debug)]
pub(crate) struct FreeBlocks {
    free: Vec<BlockId>,
    allocated: Vec<bool>,
}

impl FreeBlocks {
    /// All of them free.
    ///
    /// # Panics
    ///
    /// With more than `u32::MAX` blocks.
    pub(crate) fn new(blocks: usize) -> Self {
        let ids = u32::try_from(blocks).expect("block ids are u32");
        Self {
            // Popped from the end: ids are handed out in ascending order.
            free: (0..ids).rev().map(BlockId).collect(),
            allocated: vec![false; blocks],
        }
    }

    /// Takes one.
    pub(crate) fn alloc(&mut self) -> Option<BlockId> {
        let block = self.free.pop()?;
        self.allocated[block.index()] = true;
        Some(block)
    }

    /// Gives one back.
    pub(crate) fn free(&mut self, block: BlockId) -> Result<(), KvError> {
        match self.allocated.get_mut(block.index()) {
            Some(taken) if *taken => {
                *taken = false;
                self.free.push(block);
                Ok(())
            }
            _ => Err(KvError::NotAllocated(block)),
        }
    }

    /// How many are free.
    pub(crate) fn count(&self) -> usize {
        self.free.len()
    }
}
