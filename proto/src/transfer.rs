//! A get over the data plane: the extents of a [`Sequence`], one after the other on a line.

use std::ops::Range;

use kvasir_types::Checksum;

use crate::sequence::{Place, Sequence};
use crate::{InvalidField, v1};

/// One extent on the line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Item {
    /// Which it is.
    pub place: Place,
    /// Place of its first byte.
    pub start: u64,
    /// How many it has.
    pub bytes: u64,
    /// What its sender states for it; nothing for one that is cut.
    pub checksum: Option<Checksum>,
}

/// All extents of a get, in order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Line {
    items: Vec<Item>,
    total: u64,
}

impl Item {
    /// Its bytes' places.
    pub const fn range(&self) -> Range<u64> {
        self.start..self.start + self.bytes
    }
}

impl Line {
    /// Appends an extent. `None`, and no change, where the line would be longer than can be
    /// counted.
    #[must_use]
    pub fn push(&mut self, place: Place, bytes: u64, checksum: Option<Checksum>) -> Option<()> {
        let start = self.total;
        self.total = start.checked_add(bytes)?;
        self.items.push(Item {
            place,
            start,
            bytes,
            checksum,
        });
        Some(())
    }

    /// The line that a [`v1::Transfer`] describes, of chunks as `sequence` has them.
    ///
    /// # Errors
    /// Not as many extents as the sequence, or not of lengths that they may have.
    pub fn parse(transfer: &v1::Transfer, sequence: &Sequence) -> Result<Self, InvalidField> {
        let (lengths, checksums) = (&transfer.extent_bytes, &transfer.checksums);
        let mut line = Self::default();
        let mut stated = lengths.iter().zip(checksums);
        for place in sequence.clone() {
            let count = || {
                let problem = format!("{} and {}", lengths.len(), checksums.len());
                InvalidField::new(
                    "extent_bytes, checksums",
                    format!("{problem} are fewer than there are extents"),
                )
            };
            let (&bytes, &checksum) = stated.next().ok_or_else(count)?;
            let [least, most] = sequence.bounds(&place);
            let fits = (least..=most).contains(&bytes);
            let whole = sequence.slice(place.chunk).is_none();
            let checksum = whole.then(|| Checksum::from_u64(checksum));
            fits.then(|| line.push(place, bytes, checksum))
                .flatten()
                .ok_or_else(|| {
                    let problem = format!("{bytes} bytes are not from {least} to {most}");
                    InvalidField::new("extent_bytes", problem)
                })?;
        }
        if line.items.len() != lengths.len() || lengths.len() != checksums.len() {
            let problem = format!(
                "{} and {} for {} extents",
                lengths.len(),
                checksums.len(),
                line.items.len()
            );
            return Err(InvalidField::new("extent_bytes, checksums", problem));
        }
        Ok(line)
    }

    /// As it is described to a receiver who has `header`.
    pub fn to_wire(&self, header: v1::GetHeader) -> v1::Transfer {
        v1::Transfer {
            header: Some(header),
            extent_bytes: self.items.iter().map(|item| item.bytes).collect(),
            checksums: self
                .items
                .iter()
                .map(|item| item.checksum.map_or(0, Checksum::as_u64))
                .collect(),
        }
    }

    /// Bytes of all extents.
    pub fn total(&self) -> u64 {
        self.total
    }

    /// The extents.
    pub fn items(&self) -> &[Item] {
        &self.items
    }

    /// Indices of the extents that have bytes in `range`.
    pub fn within(&self, range: &Range<u64>) -> Range<usize> {
        if range.is_empty() {
            return 0..0;
        }
        let from = self
            .items
            .partition_point(|item| item.range().end <= range.start);
        let to = self.items.partition_point(|item| item.start < range.end);
        from..to.max(from)
    }

    /// Places of the bytes, from `from` on, of a chunk and of all that follow it: ranges as
    /// long as they can be.
    pub fn after_loss(&self, chunk: usize, from: u64) -> Vec<Range<u64>> {
        let mut ranges: Vec<Range<u64>> = Vec::new();
        let lost = self
            .items
            .iter()
            .filter(|item| item.place.chunk >= chunk && item.range().end > from && item.bytes > 0);
        for item in lost {
            let range = item.start.max(from)..item.range().end;
            match ranges.last_mut() {
                Some(last) if last.end == range.start => last.end = range.end,
                _ => ranges.push(range),
            }
        }
        ranges
    }
}

#[cfg(test)]
mod tests {
    use kvasir_types::{DType, KvLayout, Level, Planes};
    use proptest::prelude::*;

    use super::*;
    use crate::sequence::Wanted;

    fn sequence(chunks: usize) -> Sequence {
        let layout = KvLayout::new(3, 1, Planes::symmetric(8), 16, DType::F16).unwrap();
        Sequence::new(Wanted::default(), Some(layout), vec![Level::RAW; chunks]).unwrap()
    }

    fn line(sequence: &Sequence) -> Line {
        let mut line = Line::default();
        for (index, place) in (0..).zip(sequence.clone()) {
            let [bytes, _] = sequence.bounds(&place);
            let checksum = Some(Checksum::from_u64(index));
            line.push(place, bytes, checksum).unwrap();
        }
        line
    }

    #[test]
    fn survives_the_wire() {
        let sequence = sequence(4);
        let line = line(&sequence);
        let wire = line.to_wire(v1::GetHeader::default());
        assert_eq!(Line::parse(&wire, &sequence), Ok(line));
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let sequence = sequence(2);
        let wire = line(&sequence).to_wire(v1::GetHeader::default());
        let refused = |change: &dyn Fn(&mut v1::Transfer)| {
            let mut wire = wire.clone();
            change(&mut wire);
            Line::parse(&wire, &sequence).is_err()
        };
        assert!(!refused(&|_| ()));
        assert!(refused(&|wire| wire.extent_bytes[3] += 1));
        assert!(refused(&|wire| wire.extent_bytes[0] = u64::MAX));
        assert!(refused(&|wire| wire.checksums.truncate(3)));
        assert!(refused(&|wire| wire.checksums.push(0)));
        assert!(refused(&|wire| wire.extent_bytes.push(0)));
    }

    proptest! {
        #[test]
        fn ranges_and_losses_are_those_of_a_plain_search(
            chunks in 1usize..6,
            start in 0u64..6000,
            length in 0u64..3000,
            chunk in 0usize..6,
        ) {
            let line = line(&sequence(chunks));
            let range = start..start + length;
            let found = line.within(&range);
            for (index, item) in line.items().iter().enumerate() {
                let overlaps = item.start < range.end && range.start < item.range().end;
                prop_assert_eq!(found.contains(&index), overlaps && length > 0);
            }
            let lost = line.after_loss(chunk, start);
            for at in 0..line.total() {
                let owner = line.items().iter().find(|item| item.range().contains(&at)).unwrap();
                let expected = at >= start && owner.place.chunk >= chunk;
                prop_assert_eq!(lost.iter().any(|range| range.contains(&at)), expected);
            }
            prop_assert!(lost.windows(2).all(|pair| pair[0].end < pair[1].start));
        }
    }
}
