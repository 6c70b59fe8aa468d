//! What a daemon says about itself.

use std::time::Duration;

use kvasir_proto::{convert, v1};
use serde::{Deserialize, Serialize};

/// A storage medium of the daemon.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Tier {
    /// The daemon's memory.
    Memory,
    /// Its disk.
    Disk,
}

impl Tier {
    pub(crate) const fn from_wire(tier: v1::Tier) -> Option<Self> {
        match tier {
            v1::Tier::Unspecified => None,
            v1::Tier::Memory => Some(Self::Memory),
            v1::Tier::Disk => Some(Self::Disk),
        }
    }
}

impl std::fmt::Display for Tier {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Self::Memory => "memory",
            Self::Disk => "disk",
        })
    }
}

/// State and counters of a daemon. Counters start at zero with the daemon.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stats {
    /// Version of the daemon.
    pub version: String,
    /// Milliseconds since it started.
    pub uptime_ms: u64,
    /// Where its data are.
    pub data_dir: String,
    /// One entry per tier.
    pub tiers: Vec<TierStats>,
    /// Pins that have not ended.
    pub pins: u64,
    /// Bytes that they keep from eviction, as the tiers count them.
    pub pinned_bytes: u64,
    /// Chunks held by readers at this moment.
    pub leases: u64,
    /// Keys looked up.
    pub lookup_keys: u64,
    /// Keys looked up and present.
    pub lookup_hits: u64,
    /// Payload bytes received by puts.
    pub received_bytes: u64,
    /// Payload bytes sent by gets.
    pub sent_bytes: u64,
    /// Resident memory of the daemon.
    pub resident_bytes: u64,
    /// Largest resident memory it ever had.
    pub peak_resident_bytes: u64,
    /// Codec profiles it keeps.
    pub profiles: u64,
    /// Their bytes.
    pub profile_bytes: u64,
    /// Limit of `profile_bytes`.
    pub profile_capacity_bytes: u64,
}

/// State and counters of one tier.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TierStats {
    /// Which tier.
    pub tier: Tier,
    /// Chunks it holds.
    pub chunks: u64,
    /// Bytes it is charged for: objects with their headers, bookkeeping, and what
    /// readers and writers hold.
    pub bytes: u64,
    /// Limit of `bytes`.
    pub capacity_bytes: u64,
    /// Most bytes it ever held at once.
    pub peak_bytes: u64,
    /// Reads it served.
    pub hits: u64,
    /// Reads it could not serve.
    pub misses: u64,
    /// Chunks it dropped to make room.
    pub evictions: u64,
    /// Reads refused because a checksum, key or layout did not match.
    pub corrupt: u64,
    /// Requests turned away because the budget was exhausted.
    pub throttled: u64,
    /// Levels that anything is stored at.
    pub levels: Vec<LevelStats>,
}

/// What a tier holds at one codec level.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LevelStats {
    /// Name of the level.
    pub level: String,
    /// Chunks.
    pub chunks: u64,
    /// Bytes of their objects, headers included.
    pub bytes: u64,
    /// Bytes that they would have raw.
    pub raw_bytes: u64,
}

impl Stats {
    /// Time since the daemon started.
    pub const fn uptime(&self) -> Duration {
        Duration::from_millis(self.uptime_ms)
    }

    /// The entry of `tier`, if the daemon has such a tier.
    pub fn tier(&self, tier: Tier) -> Option<&TierStats> {
        self.tiers.iter().find(|entry| entry.tier == tier)
    }
}

impl From<v1::StatsResponse> for Stats {
    fn from(wire: v1::StatsResponse) -> Self {
        Self {
            version: wire.version,
            uptime_ms: wire.uptime_ms,
            data_dir: wire.data_dir,
            // A tier that a newer daemon has and this version cannot name is left out.
            tiers: wire.tiers.into_iter().filter_map(tier_stats).collect(),
            pins: wire.pins,
            pinned_bytes: wire.pinned_bytes,
            leases: wire.leases,
            lookup_keys: wire.lookup_keys,
            lookup_hits: wire.lookup_hits,
            received_bytes: wire.received_bytes,
            sent_bytes: wire.sent_bytes,
            resident_bytes: wire.resident_bytes,
            peak_resident_bytes: wire.peak_resident_bytes,
            profiles: wire.profiles,
            profile_bytes: wire.profile_bytes,
            profile_capacity_bytes: wire.profile_capacity_bytes,
        }
    }
}

fn tier_stats(wire: v1::TierStats) -> Option<TierStats> {
    Some(TierStats {
        tier: Tier::from_wire(wire.tier())?,
        // As with tiers, levels that this version cannot name are left out.
        levels: wire.levels.iter().filter_map(level_stats).collect(),
        chunks: wire.chunks,
        bytes: wire.bytes,
        capacity_bytes: wire.capacity_bytes,
        peak_bytes: wire.peak_bytes,
        hits: wire.hits,
        misses: wire.misses,
        evictions: wire.evictions,
        corrupt: wire.corrupt,
        throttled: wire.throttled,
    })
}

fn level_stats(wire: &v1::LevelStats) -> Option<LevelStats> {
    Some(LevelStats {
        level: convert::level("level", wire.level).ok()?.to_string(),
        chunks: wire.chunks,
        bytes: wire.bytes,
        raw_bytes: wire.raw_bytes,
    })
}
