//! What fetches teach, for those that follow.

use std::time::Duration;

use kvasir_types::Level;

use super::link::LinkEstimate;

/// What is known of the link, of the sizes of parts and of decoding. Starts with what was
/// measured elsewhere (docs/measurements.md), so that a first fetch can be planned, and
/// follows what comes.
#[derive(Clone, Debug, Default)]
pub struct Learnt {
    /// The link.
    pub link: LinkEstimate,
    /// What each part takes.
    pub sizes: PartSizes,
    /// How fast layers are decoded.
    pub decoding: DecodeSpeed,
}

/// What the parts of a nested level take beside each other.
///
/// What a whole chunk takes is known before it comes, and not how that is divided.
#[derive(Clone, Copy, Debug)]
pub struct PartSizes([f64; PARTS]);

/// Seconds to decode a byte of raw KV, by the parts that it is decoded from.
#[derive(Clone, Copy, Debug)]
pub struct DecodeSpeed([f64; PARTS]);

impl Default for PartSizes {
    fn default() -> Self {
        Self([0.82, 1.39, 1.47])
    }
}

impl PartSizes {
    /// The share of a chunk stored at `stored` that part `part` of its layers takes.
    pub fn share(&self, stored: Level, part: u8) -> f64 {
        let parts = self.0.iter().take(stored.parts().into());
        let all: f64 = parts.clone().sum();
        parts.skip(part.into()).take(1).sum::<f64>() / all
    }

    /// What the bases take of chunks at `stored` that take `bytes`.
    pub(crate) fn base_bytes(&self, stored: Level, bytes: u64) -> u64 {
        let base = self.share(stored, 0) * to_f64(bytes);
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "a share of some bytes"
        )]
        let base = base as u64;
        base
    }

    /// A part took `bytes`, of a chunk at a nested level whose layers take `layer_bytes` each,
    /// all parts together.
    pub fn observe(&mut self, stored: Level, part: u8, bytes: u64, layer_bytes: f64) {
        if !stored.is_nested() || stored.parts() < 2 || layer_bytes <= 0.0 {
            return;
        }
        let expected = self.share(stored, part) * layer_bytes;
        let ratio = (to_f64(bytes) / expected).clamp(0.5, 2.0);
        if let Some(size) = self.0.get_mut(usize::from(part)) {
            *size *= 1.0 + SIZE_WEIGHT * (ratio - 1.0);
        }
        // Only how they are to each other says something.
        let all: f64 = self.0.iter().sum();
        self.0 = self.0.map(|size| size / all);
    }
}

impl Default for DecodeSpeed {
    fn default() -> Self {
        Self([1.0 / 5.57e9, 1.0 / 3.36e9, 1.0 / 2.41e9])
    }
}

impl DecodeSpeed {
    /// Speeds by the number of parts, in bytes of raw KV a second.
    pub fn of([one, two, three]: [f64; PARTS]) -> Self {
        Self([1.0 / one, 1.0 / two, 1.0 / three])
    }

    /// Seconds to decode so many bytes of raw KV from `parts` parts.
    pub fn seconds(&self, parts: u8, raw_bytes: f64) -> f64 {
        let last = PARTS - 1;
        let index = usize::from(parts.saturating_sub(1)).min(last);
        self.0[index] * raw_bytes
    }

    /// Decoding `raw_bytes` of raw KV from `parts` parts took `elapsed`.
    pub fn observe(&mut self, parts: u8, raw_bytes: u64, elapsed: Duration) {
        let index = usize::from(parts.saturating_sub(1));
        if let (Some(known), 1..) = (self.0.get_mut(index), raw_bytes) {
            let seen = (elapsed.as_secs_f64() / to_f64(raw_bytes)).clamp(FASTEST, SLOWEST);
            *known += DECODE_WEIGHT * (seen - *known);
        }
    }
}

#[expect(clippy::cast_precision_loss, reason = "an estimate")]
fn to_f64(value: u64) -> f64 {
    value as f64
}

/// Parts of the finest level.
pub(crate) const PARTS: usize = Level::L2.parts() as usize;
/// Weight of one arrival, of which there are many in a fetch.
const SIZE_WEIGHT: f64 = 0.02;
const DECODE_WEIGHT: f64 = 0.1;
/// Seconds a byte: no decoder is faster, or slower.
const FASTEST: f64 = 1e-13;
const SLOWEST: f64 = 1e-6;
