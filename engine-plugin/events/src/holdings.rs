//! What one publisher holds.

use std::collections::HashSet;

use crate::wire::{BlockHash, Place, Removed, Stored};

/// What bounds the memory of a publisher's part of the index.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Blocks, one in two media counted twice. What does not fit is not taken, and the publisher
    /// is known in part from then on. Default: 16 Mi, up to 320 MiB.
    pub blocks: usize,
    /// Batches that wait for a replay to end. Default: 4096.
    pub held: usize,
    /// Bytes of these. Default: 64 MiB.
    pub held_bytes: usize,
}

impl Limits {
    /// Most combinations of medium, group, locality and owner of one publisher.
    pub const PLACES: usize = 64;
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            blocks: 16 << 20,
            held: 4096,
            held_bytes: 64 << 20,
        }
    }
}

/// Leading blocks of a prompt that a publisher holds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Held {
    /// In any medium, each block in its own.
    pub blocks: usize,
    /// In one medium alone: its name, as the publisher calls it, and how many.
    pub media: Vec<(String, usize)>,
}

impl Held {
    /// What both have.
    pub(crate) fn least(self, other: Self) -> Self {
        let both = |(name, blocks): (String, usize)| {
            let (_, others) = other.media.iter().find(|(it, _)| *it == name)?;
            Some((name, blocks.min(*others)))
        };
        Self {
            blocks: self.blocks.min(other.blocks),
            media: self.media.into_iter().filter_map(both).collect(),
        }
    }
}

#[derive(Debug)]
pub(crate) struct Holdings {
    sections: Vec<Section>,
    limits: Limits,
    refused: u64,
}

/// Blocks in one place.
#[derive(Debug)]
struct Section {
    place: Place,
    medium: String,
    group: u32,
    /// Whether a prompt's prefix needs the blocks of this group, from the first on.
    full: bool,
    /// By the 64 bits that events have. Engines may choose their hashes badly, or clients may
    /// choose for them: so not without a hash of our own.
    blocks: HashSet<u64>,
}

impl Holdings {
    pub(crate) const fn new(limits: Limits) -> Self {
        Self {
            sections: Vec::new(),
            limits,
            refused: 0,
        }
    }

    pub(crate) fn store(&mut self, stored: &Stored) {
        let full = stored.kind.as_deref().map(|kind| !WINDOWS.contains(&kind));
        let hashes = stored.hashes.iter().map(BlockHash::low64);
        self.insert(&stored.place, full, hashes);
    }

    /// `full` where it is known.
    pub(crate) fn insert(
        &mut self,
        place: &Place,
        full: Option<bool>,
        hashes: impl Iterator<Item = u64>,
    ) {
        let mut room = self.limits.blocks.saturating_sub(self.len());
        let Some(section) = self.section_of(place) else {
            self.refused += hashes.count() as u64;
            return;
        };
        if let Some(full) = full {
            section.full = full;
        }
        let mut refused = 0;
        for hash in hashes {
            if room > 0 {
                room -= usize::from(section.blocks.insert(hash));
            } else {
                refused += u64::from(!section.blocks.contains(&hash));
            }
        }
        self.refused += refused;
    }

    pub(crate) fn remove(&mut self, removed: &Removed) {
        let hashes = removed.hashes.iter().map(BlockHash::low64);
        self.take_out(&removed.place, hashes);
    }

    pub(crate) fn take_out(&mut self, place: &Place, hashes: impl Iterator<Item = u64>) {
        if let Some(section) = self.sections.iter_mut().find(|it| it.is_at(place)) {
            for hash in hashes {
                section.blocks.remove(&hash);
            }
        }
    }

    pub(crate) fn clear(&mut self) {
        self.sections.clear();
        self.refused = 0;
    }

    /// Blocks, one in two media counted twice.
    pub(crate) fn len(&self) -> usize {
        self.sections.iter().map(|it| it.blocks.len()).sum()
    }

    /// Blocks that were not taken since the last clear.
    pub(crate) const fn refused(&self) -> u64 {
        self.refused
    }

    pub(crate) fn prefix(&self, hashes: &[u64]) -> Held {
        let mut media: Vec<&str> = Vec::new();
        for section in self.counted() {
            if !media.contains(&section.medium.as_str()) {
                media.push(&section.medium);
            }
        }
        let within = |medium: &&str| (String::from(*medium), self.leading(hashes, Some(medium)));
        Held {
            blocks: self.leading(hashes, None),
            media: media.iter().map(within).collect(),
        }
    }

    /// Those of full layers; where there are none, all.
    fn counted(&self) -> impl Iterator<Item = &Section> {
        let any = self.sections.iter().any(|it| it.full);
        self.sections.iter().filter(move |it| it.full || !any)
    }

    /// A block is there when every group of layers has it.
    fn leading(&self, hashes: &[u64], medium: Option<&str>) -> usize {
        let mut groups: Vec<u32> = self.counted().map(|it| it.group).collect();
        groups.sort_unstable();
        groups.dedup();
        if groups.is_empty() {
            return 0;
        }
        let has = |group: u32, hash: &u64| {
            self.counted()
                .filter(|it| it.group == group && medium.is_none_or(|medium| it.medium == medium))
                .any(|it| it.blocks.contains(hash))
        };
        let there = |hash: &&u64| groups.iter().all(|group| has(*group, hash));
        hashes.iter().take_while(there).count()
    }

    /// Every block, with its medium.
    #[cfg(test)]
    pub(crate) fn all(&self) -> impl Iterator<Item = (&str, u64)> {
        self.sections
            .iter()
            .flat_map(|it| it.blocks.iter().map(|block| (it.medium.as_str(), *block)))
    }

    fn section_of(&mut self, place: &Place) -> Option<&mut Section> {
        let found = self.sections.iter().position(|it| it.is_at(place));
        let index = match found {
            Some(index) => index,
            None if self.sections.len() == Limits::PLACES || too_long(place) => return None,
            None => {
                self.sections.push(Section {
                    medium: medium(place).to_owned(),
                    group: place.group.unwrap_or(0),
                    place: place.clone(),
                    full: true,
                    blocks: HashSet::new(),
                });
                self.sections.len() - 1
            }
        };
        self.sections.get_mut(index)
    }
}

impl Section {
    fn is_at(&self, place: &Place) -> bool {
        self.medium == medium(place)
            && self.group == place.group.unwrap_or(0)
            && self.place.locality == place.locality
            && self.place.ownership == place.ownership
    }
}

fn medium(place: &Place) -> &str {
    place.medium.as_deref().unwrap_or("GPU")
}

/// Names are kept as long as their blocks.
fn too_long(place: &Place) -> bool {
    [&place.medium, &place.locality, &place.ownership]
        .into_iter()
        .flatten()
        .any(|name| name.len() > 64)
}

/// Kinds of layers for which the beginning of a long prompt need not be there.
const WINDOWS: [&str; 6] = [
    "sliding_window",
    "sliding_window_mla",
    "chunked_local_attention",
    "mamba",
    "encoder_only_attention",
    "cross_attention",
];

#[cfg(test)]
mod tests {
    use super::*;

    fn stored(hashes: &[u64], medium: &str, group: Option<u32>, kind: Option<&str>) -> Stored {
        Stored {
            hashes: hashes.iter().copied().map(BlockHash::Int).collect(),
            place: Place {
                medium: Some(medium.into()),
                group,
                ..Place::default()
            },
            kind: kind.map(str::to_owned),
            ..Stored::default()
        }
    }

    #[test]
    fn a_prefix_is_counted_over_media_and_in_each() {
        let mut holdings = Holdings::new(Limits::default());
        holdings.store(&stored(&[1, 2, 5], "GPU", None, None));
        holdings.store(&stored(&[2, 3], "CPU", None, None));
        let held = holdings.prefix(&[1, 2, 3, 4, 5]);
        assert_eq!(held.blocks, 3);
        assert_eq!(held.media, [("GPU".into(), 2), ("CPU".into(), 0)]);
        assert_eq!(holdings.prefix(&[]).blocks, 0);
        let empty = Holdings::new(Limits::default());
        assert_eq!(empty.prefix(&[1]), Held::default());
    }

    #[test]
    fn a_block_has_to_be_there_for_every_full_group_and_for_no_other() {
        let mut holdings = Holdings::new(Limits::default());
        holdings.store(&stored(&[1, 2, 3], "GPU", Some(0), Some("full_attention")));
        holdings.store(&stored(&[3], "GPU", Some(1), Some("sliding_window")));
        assert_eq!(holdings.prefix(&[1, 2, 3]).blocks, 3);
        holdings.store(&stored(&[1, 2], "GPU", Some(2), Some("mla_attention")));
        assert_eq!(holdings.prefix(&[1, 2, 3]).blocks, 2);

        let mut windows = Holdings::new(Limits::default());
        windows.store(&stored(&[1, 3], "GPU", Some(0), Some("sliding_window")));
        assert_eq!(windows.prefix(&[1, 2, 3]).blocks, 1);
    }

    #[test]
    fn a_removal_is_of_its_place_alone() {
        let mut holdings = Holdings::new(Limits::default());
        holdings.store(&stored(&[1], "GPU", None, None));
        let removed = |medium: Option<&str>, group| Removed {
            hashes: vec![BlockHash::Int(1)],
            place: Place {
                medium: medium.map(str::to_owned),
                group,
                ..Place::default()
            },
        };
        holdings.remove(&removed(Some("CPU"), None));
        holdings.remove(&removed(Some("GPU"), Some(1)));
        assert_eq!(holdings.prefix(&[1]).blocks, 1);
        let mut elsewhere = removed(Some("GPU"), None);
        elsewhere.place.locality = Some("REMOTE".into());
        holdings.remove(&elsewhere);
        elsewhere.place.locality = None;
        elsewhere.place.ownership = Some("fs".into());
        holdings.remove(&elsewhere);
        assert_eq!(holdings.prefix(&[1]).blocks, 1);
        // No medium is GPU, no group is 0.
        holdings.remove(&removed(None, Some(0)));
        assert_eq!(holdings.prefix(&[1]).blocks, 0);
    }

    #[test]
    fn what_does_not_fit_is_not_taken() {
        let limits = Limits {
            blocks: 3,
            ..Limits::default()
        };
        let mut holdings = Holdings::new(limits);
        holdings.store(&stored(&[1, 2, 1, 3, 4], "GPU", None, None));
        assert_eq!((holdings.len(), holdings.refused()), (3, 1));
        holdings.store(&stored(&[3, 5], "GPU", None, None));
        assert_eq!((holdings.len(), holdings.refused()), (3, 2));
        assert_eq!(holdings.prefix(&[1, 2, 3, 4]).blocks, 3);
        holdings.clear();
        assert_eq!((holdings.len(), holdings.refused()), (0, 0));

        let mut holdings = Holdings::new(Limits::default());
        for group in 0..=64 {
            holdings.store(&stored(&[1], "GPU", Some(group), None));
        }
        assert_eq!((holdings.len(), holdings.refused()), (64, 1));
        let mut holdings = Holdings::new(Limits::default());
        holdings.store(&stored(&[1], &"G".repeat(65), None, None));
        assert_eq!((holdings.len(), holdings.refused()), (0, 1));
    }
}
