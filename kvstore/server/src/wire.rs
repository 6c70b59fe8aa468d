//! The store's values as messages.

use kvasir_proto::{convert, v1};
use kvasir_store::{LevelUsage, Listed, TierKind, Usage};
use kvasir_types::Level;

/// Unspecified for a tier that the protocol cannot name.
pub(crate) const fn tier(kind: TierKind) -> v1::Tier {
    match kind {
        TierKind::Memory => v1::Tier::Memory,
        TierKind::Disk => v1::Tier::Disk,
        _ => v1::Tier::Unspecified,
    }
}

pub(crate) fn listed(chunk: &Listed) -> v1::ListResponse {
    v1::ListResponse {
        key: convert::key_to_wire(&chunk.key),
        layout: Some(v1::Layout::from(&chunk.layout)),
        level: chunk.level.code().into(),
        bytes: chunk.bytes,
        tiers: chunk.tiers.iter().map(|kind| tier(*kind).into()).collect(),
    }
}

pub(crate) fn usage(kind: TierKind, usage: &Usage) -> v1::TierStats {
    v1::TierStats {
        tier: tier(kind).into(),
        chunks: usage.chunks,
        bytes: usage.bytes,
        capacity_bytes: usage.capacity,
        peak_bytes: usage.peak_bytes,
        hits: usage.hits,
        misses: usage.misses,
        evictions: usage.evictions,
        corrupt: usage.corrupt,
        throttled: usage.throttled,
        levels: usage.levels.iter().map(level).collect(),
    }
}

fn level((level, usage): (Level, LevelUsage)) -> v1::LevelStats {
    v1::LevelStats {
        level: level.code().into(),
        chunks: usage.chunks,
        bytes: usage.bytes,
        raw_bytes: usage.raw_bytes,
    }
}
