//! What moving pages costs.

use std::time::Duration;

/// Counts since the pool was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PagerStats {
    /// Pieces wanted by attention that were in memory.
    pub hits: u64,
    /// Of these, those that were read ahead for it.
    pub hits_ahead: u64,
    /// Pieces wanted that were on their way: predicted, but late.
    pub late: u64,
    /// Pieces wanted that nobody had asked for.
    pub misses: u64,
    /// Pieces wanted that held nothing yet.
    pub fresh: u64,
    /// Pieces read ahead, wanted afterwards or not.
    pub ahead: u64,
    /// Pieces read ahead that gave way before anybody wanted them.
    pub ahead_unused: u64,
    /// Bytes that came from the file, those read ahead included.
    pub read_bytes: u64,
    /// Operations that read them.
    pub reads: u64,
    /// Bytes that went to the file.
    pub written_bytes: u64,
    /// Operations that wrote them.
    pub writes: u64,
    /// Pieces that gave way to others.
    pub evictions: u64,
    /// Waits that were given up because nothing came in time.
    pub timeouts: u64,
    /// What the computation waited for.
    pub stalls: Stalls,
}

/// Time that computing waited, by cause.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stalls {
    /// For reads that were not predicted.
    pub read: Duration,
    /// For reads that were predicted, but not in time.
    pub late: Duration,
    /// For a frame that a read ahead holds, until that read has come and can give way.
    pub frame: Duration,
    /// For writes: everything in memory that could give way was not on disk yet.
    pub write: Duration,
}

impl PagerStats {
    /// What was counted since `before`.
    #[must_use]
    pub fn since(&self, before: &Self) -> Self {
        Self {
            hits: self.hits - before.hits,
            hits_ahead: self.hits_ahead - before.hits_ahead,
            late: self.late - before.late,
            misses: self.misses - before.misses,
            fresh: self.fresh - before.fresh,
            ahead: self.ahead - before.ahead,
            ahead_unused: self.ahead_unused - before.ahead_unused,
            read_bytes: self.read_bytes - before.read_bytes,
            reads: self.reads - before.reads,
            written_bytes: self.written_bytes - before.written_bytes,
            writes: self.writes - before.writes,
            evictions: self.evictions - before.evictions,
            timeouts: self.timeouts - before.timeouts,
            stalls: Stalls {
                read: self.stalls.read - before.stalls.read,
                late: self.stalls.late - before.stalls.late,
                frame: self.stalls.frame - before.stalls.frame,
                write: self.stalls.write - before.stalls.write,
            },
        }
    }
}

impl Stalls {
    /// All of them.
    pub fn total(&self) -> Duration {
        self.read + self.late + self.frame + self.write
    }
}
