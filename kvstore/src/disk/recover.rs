//! Startup: makes catalog and segments agree, one chunk at a time.
//!
//! A crash can leave segments whose header was never finished, frames whose record
//! was never synced, and records whose frame is a hole or beyond the end. Each is
//! dropped by itself; the rest of the index stays. Files under other names, and
//! segments of other stores, are left alone.
//!
//! No frame is read: a damaged one is found, and dropped, when it is asked for.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::ops::Range;
use std::path::Path;

use kvasir_mem::AlignedBuffer;

use super::catalog::{Catalog, LegacyRecord, Record};
use super::medium::{Medium, MediumFile, read_full};
use super::segment::{self, BLOCK, BLOCK_BYTES, SegmentError, SegmentId, StoreId, frame_bytes};
use super::segments::parse_name;
use crate::tier::DeviceError;

/// What a directory holds.
#[derive(Debug)]
pub(super) struct Recovered {
    /// Chunks whose frame takes space where it should, oldest first.
    pub(super) records: Vec<Record>,
    pub(super) legacy: Vec<LegacyRecord>,
    /// Greater than any number in use.
    pub(super) next_segment: SegmentId,
    pub(super) swept: Swept,
}

/// What was dropped.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Swept {
    /// Segments without a live frame.
    pub(super) segments: u64,
    /// Bytes of frames without a record, in segments that stay.
    pub(super) orphan_bytes: u64,
    /// Records without a frame, or unreadable.
    pub(super) records: u64,
}

pub(super) fn recover(
    catalog: &Catalog,
    medium: &dyn Medium,
    root: &Path,
    store: &StoreId,
) -> Result<Recovered, DeviceError> {
    let contents = catalog.contents()?;
    let mut swept = Swept::default();
    for key in &contents.unreadable {
        catalog.delete(key, false)?;
        swept.records += 1;
    }
    let mut records = contents.records;
    // The order of the catalog is that of chunk keys. Of several copies of a chunk,
    // which a failed deletion can leave, the newest stays.
    let mut older = Vec::new();
    records.dedup_by(|next, kept| {
        if next.key != kept.key {
            return false;
        }
        if (next.created, next.location) > (kept.created, kept.location) {
            std::mem::swap(next, kept);
        }
        older.push(*next);
        true
    });
    for record in older {
        catalog.delete(&Record::key_of(&record.key, record.location), false)?;
        swept.records += 1;
    }
    // Of two that claim a place, the newest is right.
    records.sort_unstable_by_key(|record| (record.location, Reverse(record.created)));
    // Where the records of each segment lie.
    let mut segments: BTreeMap<SegmentId, Range<usize>> = BTreeMap::new();
    for (at, record) in records.iter().enumerate() {
        let of_segment = segments.entry(record.location.segment).or_insert(at..at);
        of_segment.end = at + 1;
    }
    let mut newest = segments.keys().next_back().copied();
    let mut live = vec![false; records.len()];
    for item in fs::read_dir(root)? {
        let item = item?;
        let Some(id) = item.file_name().to_str().and_then(parse_name) else {
            continue;
        };
        newest = newest.max(Some(id));
        if !item.file_type()?.is_file() {
            continue;
        }
        let path = item.path();
        let file = medium.open(&path)?;
        match header_of(&*file, store, id)? {
            // A crash while it was made, or damage; frames prove themselves.
            Ok(()) | Err(SegmentError::Damaged) => (),
            Err(error) => {
                tracing::warn!(path = %path.display(), %error, "left alone");
                continue;
            }
        }
        let range = segments.remove(&id).unwrap_or_default();
        let live = &mut live[range.clone()];
        sweep(&*file, &records[range], live, &mut swept.orphan_bytes)?;
        if !live.contains(&true) {
            drop(file);
            medium.remove(&path)?;
            swept.segments += 1;
        } else {
            // A writer that was killed before it synced left frames that a power cut
            // could still take, and from now on they count as stored.
            file.sync()?;
        }
    }
    let mut live = live.into_iter();
    for record in records.extract_if(.., |_| live.next() != Some(true)) {
        catalog.delete(&Record::key_of(&record.key, record.location), false)?;
        swept.records += 1;
    }
    // Every segment is in this order already, which a stable sort makes use of.
    records.sort_by_key(|record| (record.created, record.location));
    Ok(Recovered {
        records,
        legacy: contents.legacy,
        next_segment: SegmentId(newest.map_or(0, |id| id.0.saturating_add(1))),
        swept,
    })
}

fn header_of(
    file: &dyn MediumFile,
    store: &StoreId,
    id: SegmentId,
) -> io::Result<Result<(), SegmentError>> {
    let mut block = AlignedBuffer::zeroed(BLOCK)?;
    let read = read_full(file, &mut block, 0)?;
    Ok(segment::check(&block[..read], store, id))
}

/// Tells records that have a frame from others, and frees what has no record. `records`
/// are in the order of their frames.
fn sweep(
    file: &dyn MediumFile,
    records: &[Record],
    live: &mut [bool],
    orphan_bytes: &mut u64,
) -> io::Result<()> {
    // Where the last live frame ends, or the segment's header.
    let mut end = BLOCK_BYTES;
    let mut data = Data::new(file);
    for (record, live) in records.iter().zip(&mut *live) {
        let range = range_of(record);
        // Frames never overlap; of two that claim to, one record is wrong.
        if range.start < end || !data.covers(&range)? {
            continue;
        }
        *orphan_bytes += punch_data(file, end..range.start)?;
        end = range.end;
        *live = true;
    }
    if live.contains(&true) {
        *orphan_bytes += punch_data(file, end..u64::MAX)?;
    }
    Ok(())
}

fn range_of(record: &Record) -> Range<u64> {
    let start = record.location.offset();
    start
        ..start.saturating_add(frame_bytes(
            &record.layout,
            record.level,
            record.object_bytes,
        ))
}

/// Gives back what takes space in `gap`; says how much.
fn punch_data(file: &dyn MediumFile, gap: Range<u64>) -> io::Result<u64> {
    let (mut freed, mut from) = (0, gap.start);
    while from < gap.end
        && let Some(data) = file.data(from)?
        && data.start < gap.end
    {
        let range = data.start..data.end.min(gap.end);
        freed += range.end - range.start;
        from = range.end;
        file.punch(range)?;
    }
    Ok(freed)
}

/// The ranges of a file that take space, asked for in ascending order.
struct Data<'a> {
    file: &'a dyn MediumFile,
    current: Option<Range<u64>>,
}

impl<'a> Data<'a> {
    fn new(file: &'a dyn MediumFile) -> Self {
        let current = Some(0..0);
        Self { file, current }
    }

    /// Whether all of `range` takes space.
    fn covers(&mut self, range: &Range<u64>) -> io::Result<bool> {
        while let Some(data) = &self.current
            && data.end <= range.start
        {
            self.current = self.file.data(data.end.max(range.start))?;
        }
        Ok(self
            .current
            .as_ref()
            .is_some_and(|data| data.start <= range.start && range.end <= data.end))
    }
}
