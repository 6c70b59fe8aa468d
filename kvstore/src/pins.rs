//! Pins: chunks exempt from eviction for a while.
//!
//! Pure bookkeeping in virtual time. A pin names its keys and an expiry; a key is
//! pinned while any pin on it lasts. Pinned bytes are capped, so that pins can
//! never starve a tier.

use std::collections::HashMap;
use std::time::Instant;

use kvasir_types::ChunkKey;

use crate::tier::TierKind;

/// Names a pin.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PinId(u64);

impl PinId {
    /// A pin id read from the wire.
    pub const fn from_u64(id: u64) -> Self {
        Self(id)
    }

    /// The id's number.
    pub const fn as_u64(self) -> u64 {
        self.0
    }
}

/// Why nothing was pinned.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PinRefused {
    /// A key is not stored.
    #[error("chunk {0} is not stored, so it cannot be pinned")]
    Missing(ChunkKey),
    /// The cap on pinned bytes.
    #[error(
        "pinning {wanted} more bytes would exceed the limit of {limit} in the {tier} tier \
         ({pinned} are pinned); unpin something, or raise `pin-limit`"
    )]
    OverLimit {
        /// The tier.
        tier: TierKind,
        /// Bytes that would be newly pinned.
        wanted: u64,
        /// Bytes pinned already.
        pinned: u64,
        /// The limit.
        limit: u64,
    },
}

/// The pins of one tier.
#[derive(Debug)]
pub(crate) struct Pins {
    tier: TierKind,
    limit: u64,
    pins: HashMap<PinId, Pin>,
    keys: HashMap<ChunkKey, PinnedKey>,
    bytes: u64,
    /// No pin expires before this; saves looking at all of them.
    next_expiry: Option<Instant>,
}

#[derive(Debug)]
struct Pin {
    expires: Instant,
    keys: Vec<ChunkKey>,
}

#[derive(Debug)]
struct PinnedKey {
    pins: u32,
    bytes: u64,
}

impl Pins {
    pub(crate) fn new(tier: TierKind, limit: u64) -> Self {
        Self {
            tier,
            limit,
            pins: HashMap::new(),
            keys: HashMap::new(),
            bytes: 0,
            next_expiry: None,
        }
    }

    /// Pins all of `keys`, given with their bytes, or none.
    pub(crate) fn add(
        &mut self,
        id: PinId,
        keys: &[(ChunkKey, u64)],
        expires: Instant,
        now: Instant,
    ) -> Result<(), PinRefused> {
        self.expire(now);
        let mut fresh: HashMap<ChunkKey, u64> = keys.iter().copied().collect();
        fresh.retain(|key, _| !self.keys.contains_key(key));
        let wanted: u64 = fresh.values().sum();
        if self.bytes.saturating_add(wanted) > self.limit {
            return Err(PinRefused::OverLimit {
                tier: self.tier,
                wanted,
                pinned: self.bytes,
                limit: self.limit,
            });
        }
        for &(key, bytes) in keys {
            let pinned = self.keys.entry(key).or_insert(PinnedKey { pins: 0, bytes });
            pinned.pins += 1;
        }
        self.bytes += wanted;
        let pin = self.pins.entry(id).or_insert_with(|| Pin {
            expires,
            keys: Vec::new(),
        });
        pin.expires = pin.expires.max(expires);
        pin.keys.extend(keys.iter().map(|(key, _)| *key));
        self.next_expiry = Some(self.next_expiry.map_or(expires, |next| next.min(expires)));
        Ok(())
    }

    pub(crate) fn remove(&mut self, id: PinId) -> bool {
        let Some(pin) = self.pins.remove(&id) else {
            return false;
        };
        for key in pin.keys {
            if let Some(pinned) = self.keys.get_mut(&key) {
                pinned.pins -= 1;
                if pinned.pins == 0 {
                    self.bytes -= pinned.bytes;
                    self.keys.remove(&key);
                }
            }
        }
        true
    }

    /// Ends the pins whose time is over.
    pub(crate) fn expire(&mut self, now: Instant) {
        if self.next_expiry.is_none_or(|next| now < next) {
            return;
        }
        let over: Vec<PinId> = self
            .pins
            .iter()
            .filter(|(_, pin)| pin.expires <= now)
            .map(|(id, _)| *id)
            .collect();
        for id in over {
            self.remove(id);
        }
        self.next_expiry = self.pins.values().map(|pin| pin.expires).min();
    }

    /// Whether a pin lasts, as of the last [`expire`](Self::expire).
    pub(crate) fn covers(&self, key: &ChunkKey) -> bool {
        self.keys.contains_key(key)
    }

    pub(crate) fn len(&self) -> usize {
        self.pins.len()
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn key(byte: u8) -> ChunkKey {
        ChunkKey::from_bytes([byte; 32])
    }

    #[test]
    fn overlapping_pins_count_a_key_once_and_end_apart() {
        let start = Instant::now();
        let mut pins = Pins::new(TierKind::Memory, 100);
        let (one, two) = (PinId(1), PinId(2));
        pins.add(one, &[(key(1), 40)], start + SECOND, start)
            .unwrap();
        pins.add(
            two,
            &[(key(1), 40), (key(2), 60)],
            start + SECOND * 3,
            start,
        )
        .unwrap();
        assert_eq!(pins.bytes(), 100);
        let refused = pins.add(PinId(3), &[(key(3), 1)], start + SECOND, start);
        assert!(matches!(refused, Err(PinRefused::OverLimit { .. })));

        pins.expire(start + SECOND * 2);
        assert!(pins.covers(&key(1)), "the second pin lasts");
        pins.expire(start + SECOND * 3);
        assert!(!pins.covers(&key(1)));
        assert_eq!(pins.bytes(), 0);
        assert!(!pins.remove(two), "expired");
    }

    #[test]
    fn a_key_named_twice_is_counted_once() {
        let start = Instant::now();
        let mut pins = Pins::new(TierKind::Disk, 50);
        pins.add(
            PinId(1),
            &[(key(1), 40), (key(1), 40)],
            start + SECOND,
            start,
        )
        .unwrap();
        assert_eq!(pins.bytes(), 40);
        assert!(pins.remove(PinId(1)));
        assert_eq!(pins.bytes(), 0);
    }
}
