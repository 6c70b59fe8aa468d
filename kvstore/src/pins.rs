//! Pins: chunks exempt from eviction for a while.
//!
//! Pure bookkeeping in virtual time. A pin names its keys and an expiry; a key is
//! pinned while any pin on it lasts and its chunk is there. Pinned bytes are capped,
//! so that pins can never starve a tier, and so is what the pins themselves take.

use std::collections::{BTreeSet, HashMap};
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
    /// The cap on pins.
    #[error("pins name {limit} keys at most; unpin something")]
    TooMany {
        /// Most keys that all pins together may name.
        limit: usize,
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
    /// Keys of all pins; one that two pins name counts twice.
    named: usize,
    /// No pin expires before this; saves looking at all of them.
    next_expiry: Option<Instant>,
}

#[derive(Debug)]
struct Pin {
    expires: Instant,
    keys: BTreeSet<ChunkKey>,
}

#[derive(Debug)]
struct PinnedKey {
    pins: BTreeSet<PinId>,
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
            named: 0,
            next_expiry: None,
        }
    }

    /// Most keys that all pins together may name: some 40 MiB of bookkeeping.
    pub(crate) const MAX_NAMED: usize = 1 << 18;

    /// Pins all of `keys`, given with their bytes, or none. No keys are no pin.
    pub(crate) fn add(
        &mut self,
        id: PinId,
        keys: &[(ChunkKey, u64)],
        expires: Instant,
        now: Instant,
    ) -> Result<(), PinRefused> {
        self.expire(now);
        let before = self.pins.get(&id).map(|pin| &pin.keys);
        let mut named: HashMap<ChunkKey, u64> = keys.iter().copied().collect();
        named.retain(|key, _| before.is_none_or(|before| !before.contains(key)));
        if self.named + named.len() > Self::MAX_NAMED {
            return Err(PinRefused::TooMany {
                limit: Self::MAX_NAMED,
            });
        }
        let fresh = named.iter().filter(|(key, _)| !self.covers(key));
        let wanted: u64 = fresh.map(|(_, bytes)| bytes).sum();
        if self.bytes.saturating_add(wanted) > self.limit {
            return Err(PinRefused::OverLimit {
                tier: self.tier,
                wanted,
                pinned: self.bytes,
                limit: self.limit,
            });
        }
        if keys.is_empty() {
            return Ok(());
        }
        let pin = self.pins.entry(id).or_insert_with(|| Pin {
            expires,
            keys: BTreeSet::new(),
        });
        pin.expires = pin.expires.max(expires);
        pin.keys.extend(named.keys());
        self.bytes += wanted;
        self.named += named.len();
        for (key, bytes) in named {
            let pins = BTreeSet::new();
            let pinned = self.keys.entry(key).or_insert(PinnedKey { pins, bytes });
            pinned.pins.insert(id);
        }
        self.next_expiry = Some(self.next_expiry.map_or(expires, |next| next.min(expires)));
        Ok(())
    }

    pub(crate) fn remove(&mut self, id: PinId) -> bool {
        let Some(pin) = self.pins.remove(&id) else {
            return false;
        };
        self.named -= pin.keys.len();
        for key in pin.keys {
            if let Some(pinned) = self.keys.get_mut(&key) {
                pinned.pins.remove(&id);
                if pinned.pins.is_empty() {
                    self.bytes -= pinned.bytes;
                    self.keys.remove(&key);
                }
            }
        }
        true
    }

    /// Takes a key, whose chunk is gone, out of its pins. A pin without keys ends.
    pub(crate) fn forget(&mut self, key: &ChunkKey) {
        let Some(pinned) = self.keys.remove(key) else {
            return;
        };
        self.bytes -= pinned.bytes;
        self.named -= pinned.pins.len();
        for id in pinned.pins {
            if let Some(pin) = self.pins.get_mut(&id) {
                pin.keys.remove(key);
                if pin.keys.is_empty() {
                    self.pins.remove(&id);
                }
            }
        }
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

    pub(crate) fn ids(&self) -> impl Iterator<Item = PinId> {
        self.pins.keys().copied()
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

    #[test]
    fn a_key_that_is_gone_frees_its_bytes_and_its_pins() {
        let start = Instant::now();
        let end = start + SECOND;
        let mut pins = Pins::new(TierKind::Disk, 100);
        pins.add(PinId(1), &[(key(1), 40)], end, start).unwrap();
        pins.add(PinId(2), &[(key(1), 40), (key(2), 60)], end, start)
            .unwrap();
        pins.forget(&key(1));
        assert_eq!((pins.bytes(), pins.len(), pins.named), (60, 1, 1));
        assert!(!pins.remove(PinId(1)));
        // The chunk came back, and is another pin's.
        pins.add(PinId(3), &[(key(1), 40)], end, start).unwrap();
        assert!(pins.remove(PinId(2)));
        assert!(pins.covers(&key(1)));
        assert_eq!((pins.bytes(), pins.named), (40, 1));
    }

    #[test]
    fn no_keys_are_no_pin_and_keys_are_capped() {
        let start = Instant::now();
        let end = start + SECOND;
        let mut pins = Pins::new(TierKind::Disk, 100);
        pins.add(PinId(0), &[], end, start).unwrap();
        assert_eq!(pins.len(), 0);
        for id in 1..=Pins::MAX_NAMED as u64 {
            pins.add(PinId(id), &[(key(1), 1)], end, start).unwrap();
        }
        let refused = pins.add(PinId(0), &[(key(1), 1)], end, start);
        assert!(matches!(refused, Err(PinRefused::TooMany { .. })));
        assert!(pins.remove(PinId(1)));
        pins.add(PinId(0), &[(key(1), 1)], end, start).unwrap();
    }
}
