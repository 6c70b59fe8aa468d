//! How much is stored at which level.

use kvasir_types::Level;

use crate::tier::Facts;

/// What a tier holds at one level.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LevelUsage {
    /// Chunks.
    pub chunks: u64,
    /// Bytes of their objects, headers included.
    pub bytes: u64,
    /// Bytes that they would have raw.
    pub raw_bytes: u64,
}

/// What a tier holds, by level.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LevelUsages([LevelUsage; Level::ALL.len()]);

impl LevelUsages {
    /// Levels that anything is stored at.
    pub fn iter(&self) -> impl Iterator<Item = (Level, LevelUsage)> {
        let all = Level::ALL.into_iter().zip(self.0);
        all.filter(|(_, usage)| usage.chunks > 0)
    }

    pub(crate) fn add(&mut self, facts: &Facts) {
        if let Some(usage) = self.of(facts.level) {
            usage.chunks += 1;
            usage.bytes += facts.bytes;
            usage.raw_bytes += facts.layout.chunk_bytes();
        }
    }

    pub(crate) fn remove(&mut self, facts: &Facts) {
        if let Some(usage) = self.of(facts.level) {
            usage.chunks -= 1;
            usage.bytes -= facts.bytes;
            usage.raw_bytes -= facts.layout.chunk_bytes();
        }
    }

    fn of(&mut self, level: Level) -> Option<&mut LevelUsage> {
        let mut all = Level::ALL.iter().zip(&mut self.0);
        all.find_map(|(of, usage)| (*of == level).then_some(usage))
    }
}
