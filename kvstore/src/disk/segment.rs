//! The format of segment files.
//!
//! A segment starts with a header of one block (4096 bytes), all integers
//! little-endian:
//!
//! | at | bytes | field |
//! |---|---|---|
//! | 0 | 8 | magic, `89 4b 56 53 45 47 0d 0a` |
//! | 8 | 2 | format version, 1 |
//! | 10 | 2 | zero |
//! | 12 | 4 | segment id |
//! | 16 | 16 | the store that wrote it |
//! | 32 | 8 | checksum over everything before it |
//!
//! The rest of the block is zero. Frames follow, each at a multiple of a block: the
//! header of a stored object ([`ObjectHeader`], which repeats magic, version, key,
//! layout digest and a checksum for itself and for every layer), padded to a block,
//! then the payload, padded to a block. A frame never moves; where it lies is in the
//! catalog. What lies between frames is a hole, or was a frame.

#![deny(clippy::indexing_slicing)]

use kvasir_codec::ObjectHeader;
use kvasir_types::{Checksum, KvLayout, Level};

/// What direct I/O moves at least.
pub(super) const BLOCK: usize = kvasir_mem::ALIGNMENT;
/// The same, for offsets.
pub(super) const BLOCK_BYTES: u64 = BLOCK as u64;

/// A segment's number. No number is used twice in the life of a directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct SegmentId(pub(super) u32);

/// Names a directory, so that files which were copied here from another are known.
pub(super) type StoreId = [u8; 16];

/// Where a frame lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Location {
    pub(super) segment: SegmentId,
    /// In units of [`BLOCK_BYTES`]; 0 is the segment's header.
    pub(super) block: u32,
}

impl Location {
    /// The frame's first byte.
    pub(super) fn offset(self) -> u64 {
        u64::from(self.block) * BLOCK_BYTES
    }
}

/// Bytes of an object's header in a frame.
pub(super) fn framed_header_bytes(layout: &KvLayout, level: Level) -> u64 {
    (ObjectHeader::header_bytes(layout, level) as u64).next_multiple_of(BLOCK_BYTES)
}

/// Bytes of a frame.
pub(super) fn frame_bytes(layout: &KvLayout, level: Level, object_bytes: u64) -> u64 {
    let header = ObjectHeader::header_bytes(layout, level) as u64;
    let payload = object_bytes.saturating_sub(header);
    framed_header_bytes(layout, level).saturating_add(payload.next_multiple_of(BLOCK_BYTES))
}

/// Why a block is not the header of one of our segments.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum SegmentError {
    #[error("not a segment: cut short, damaged, or something else")]
    Damaged,
    #[error("segment format version {0} is unknown; upgrade the daemon")]
    Version(u16),
    #[error("belongs to another store, or has another number than its name")]
    Foreign,
}

/// The header of a segment, zero-padded to a block.
pub(super) fn encode(store: &StoreId, id: SegmentId) -> Vec<u8> {
    let mut out = Vec::with_capacity(BLOCK);
    out.extend_from_slice(&MAGIC);
    out.extend_from_slice(&VERSION.to_le_bytes());
    out.extend_from_slice(&[0; 2]);
    out.extend_from_slice(&id.0.to_le_bytes());
    out.extend_from_slice(store);
    let checksum = Checksum::of(&out);
    out.extend_from_slice(&checksum.as_u64().to_le_bytes());
    out.resize(BLOCK, 0);
    out
}

/// Checks the first block of a file that is named like segment `id` of `store`.
pub(super) fn check(block: &[u8], store: &StoreId, id: SegmentId) -> Result<(), SegmentError> {
    let (stated, rest) = block
        .split_at_checked(CHECKED_BYTES)
        .ok_or(SegmentError::Damaged)?;
    let magic = stated.starts_with(&MAGIC);
    let whole = rest.starts_with(&Checksum::of(stated).as_u64().to_le_bytes());
    if !magic || !whole {
        return Err(SegmentError::Damaged);
    }
    match stated.get(8..10) {
        Some(version) if version == VERSION.to_le_bytes() => (),
        Some(&[low, high]) => return Err(SegmentError::Version(u16::from_le_bytes([low, high]))),
        _ => return Err(SegmentError::Damaged),
    }
    let ours = stated.get(12..16) == Some(&id.0.to_le_bytes()[..]) && stated.ends_with(store);
    if ours {
        Ok(())
    } else {
        Err(SegmentError::Foreign)
    }
}

const MAGIC: [u8; 8] = *b"\x89KVSEG\r\n";
const VERSION: u16 = 1;
/// Header bytes that the checksum covers.
const CHECKED_BYTES: usize = 32;

#[cfg(test)]
#[allow(clippy::indexing_slicing, reason = "a test fails by panicking")]
mod tests {
    use kvasir_types::{DType, Planes};

    use super::*;

    fn layout(layers: u16) -> KvLayout {
        KvLayout::new(layers, 1, Planes::symmetric(2), 4, DType::F16).unwrap()
    }

    #[test]
    fn headers_are_told_apart() {
        let (store, id) = ([7; 16], SegmentId(3));
        let block = encode(&store, id);
        assert_eq!(block.len() as u64, BLOCK_BYTES);
        assert_eq!(check(&block, &store, id), Ok(()));
        assert_eq!(check(&block, &[8; 16], id), Err(SegmentError::Foreign));
        assert_eq!(
            check(&block, &store, SegmentId(4)),
            Err(SegmentError::Foreign)
        );
        for bit in 0..8 * (CHECKED_BYTES + 8) {
            let mut damaged = block.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(
                check(&damaged, &store, id),
                Err(SegmentError::Damaged),
                "{bit}"
            );
        }
        for cut in 0..CHECKED_BYTES + 8 {
            assert_eq!(check(&block[..cut], &store, id), Err(SegmentError::Damaged));
        }
    }

    #[test]
    fn a_newer_version_says_so() {
        let mut newer = encode(&[7; 16], SegmentId(3));
        newer[8] = 9;
        let checksum = Checksum::of(&newer[..CHECKED_BYTES]).as_u64().to_le_bytes();
        newer[CHECKED_BYTES..CHECKED_BYTES + 8].copy_from_slice(&checksum);
        let error = check(&newer, &[7; 16], SegmentId(3));
        assert_eq!(error, Err(SegmentError::Version(9)));
    }

    #[test]
    fn frames_are_whole_blocks() {
        let header = ObjectHeader::header_bytes(&layout(4), Level::RAW) as u64;
        assert_eq!(frame_bytes(&layout(4), Level::RAW, header), 4096);
        assert_eq!(frame_bytes(&layout(4), Level::RAW, header + 1), 2 * 4096);
        assert_eq!(frame_bytes(&layout(4), Level::RAW, header + 4096), 2 * 4096);
        assert_eq!(framed_header_bytes(&layout(400), Level::RAW), 2 * 4096);
        assert!(frame_bytes(&layout(4), Level::RAW, u64::MAX) >= 4096);
    }
}
