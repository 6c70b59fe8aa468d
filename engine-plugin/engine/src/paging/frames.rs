//! Memory for pieces, and which of them gives way.
//!
//! A second-chance clock (Corbató, 1968) over frames: the hand passes a frame as often as its
//! heat says before it takes it. Heat is set by use, and higher for pieces that were chosen
//! than for those that were read because everything is, so that a scan does not drive out what
//! selection keeps coming back to. A piece that its layer has passed over when it last chose
//! gives way before all others that were chosen: its layer's next choice is a token away.

use std::collections::VecDeque;

use bytes::BytesMut;

use super::file::SECTOR_BYTES;

/// One KV head of one layer of one block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct PieceId(pub(crate) u32);

impl PieceId {
    pub(super) const fn index(self) -> usize {
        self.0 as usize
    }
}

/// Memory for one piece.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct FrameId(pub(super) u32);

impl FrameId {
    pub(super) const fn index(self) -> usize {
        self.0 as usize
    }
}

/// How often the clock passes a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Heat {
    Cold = 0,
    /// Read because everything is.
    Scanned = 1,
    /// Chosen, or expected to be.
    Chosen = 2,
}

impl Heat {
    const fn cooled(self) -> Self {
        match self {
            Self::Chosen => Self::Scanned,
            Self::Scanned | Self::Cold => Self::Cold,
        }
    }
}

/// Which frame gives way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Replacement {
    /// The clock of this module.
    #[default]
    Clock,
    /// The one that was not used for longest, whatever it was used for. To compare with.
    LeastRecent,
}

/// What a frame is used for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Tag {
    pub(super) piece: Option<PieceId>,
    /// The last request that wanted the piece.
    pub(super) epoch: u64,
    pub(super) heat: Heat,
    /// The piece's layer, and how often that layer had chosen when the piece last was.
    pub(super) layer: u32,
    pub(super) turn: u32,
    /// Its memory is away, being filled.
    pub(super) loading: bool,
    /// Read ahead, and not wanted since.
    pub(super) ahead: bool,
    /// Holds what the file does not.
    pub(super) dirty: bool,
    /// Being written to the file.
    pub(super) writing: bool,
}

impl Tag {
    const FREE: Self = Self {
        piece: None,
        epoch: 0,
        heat: Heat::Cold,
        layer: 0,
        turn: 0,
        loading: false,
        ahead: false,
        dirty: false,
        writing: false,
    };

    fn may_go(&self, epoch: u64) -> bool {
        let busy = self.loading || self.dirty || self.writing;
        self.piece.is_some() && self.epoch != epoch && !busy
    }
}

#[derive(Debug)]
pub(super) struct Frames {
    memory: Vec<BytesMut>,
    tags: Vec<Tag>,
    free: Vec<FrameId>,
    hand: usize,
    /// By layer, how often it has chosen.
    turns: Vec<u32>,
    replacement: Replacement,
    /// For [`Replacement::LeastRecent`]: uses, oldest first; only those that still carry the
    /// frame's stamp count.
    order: VecDeque<(FrameId, u64)>,
    stamps: Vec<u64>,
    clock: u64,
}

impl Frames {
    /// `count` frames of `bytes` bytes, both fitting `u32`, zeroed and touched.
    pub(super) fn new(count: usize, bytes: usize, layers: usize, replacement: Replacement) -> Self {
        let mut all = aligned(count * bytes);
        all.fill(0);
        let ids = u32::try_from(count).expect("frames are no more than pieces");
        Self {
            memory: (0..count).map(|_| all.split_to(bytes)).collect(),
            tags: vec![Tag::FREE; count],
            free: (0..ids).rev().map(FrameId).collect(),
            hand: 0,
            turns: vec![0; layers],
            replacement,
            order: VecDeque::new(),
            stamps: match replacement {
                Replacement::Clock => Vec::new(),
                Replacement::LeastRecent => vec![0; count],
            },
            clock: 0,
        }
    }

    pub(super) fn count(&self) -> usize {
        self.tags.len()
    }

    pub(super) fn ids(&self) -> impl Iterator<Item = FrameId> + use<> {
        // As many as `new` has counted.
        (0..u32::try_from(self.count()).unwrap_or(u32::MAX)).map(FrameId)
    }

    pub(super) fn tag(&self, frame: FrameId) -> &Tag {
        &self.tags[frame.index()]
    }

    pub(super) fn tag_mut(&mut self, frame: FrameId) -> &mut Tag {
        &mut self.tags[frame.index()]
    }

    pub(super) fn bytes(&self, frame: FrameId) -> &[u8] {
        &self.memory[frame.index()]
    }

    pub(super) fn bytes_mut(&mut self, frame: FrameId) -> &mut [u8] {
        &mut self.memory[frame.index()]
    }

    /// The frame's memory, for a read that fills it.
    pub(super) fn take_memory(&mut self, frame: FrameId) -> BytesMut {
        std::mem::take(&mut self.memory[frame.index()])
    }

    /// Its return.
    pub(super) fn return_memory(&mut self, frame: FrameId, memory: BytesMut) {
        self.memory[frame.index()] = memory;
    }

    /// A frame that nobody uses.
    pub(super) fn take_free(&mut self) -> Option<FrameId> {
        self.free.pop()
    }

    /// Gives a frame back, whose memory is there.
    pub(super) fn release(&mut self, frame: FrameId) {
        self.tags[frame.index()] = Tag::FREE;
        self.free.push(frame);
    }

    /// Notes that a layer chooses anew.
    pub(super) fn begin_turn(&mut self, layer: usize) {
        self.turns[layer] = self.turns[layer].wrapping_add(1);
    }

    /// Notes that a frame is used now.
    pub(super) fn touch(&mut self, frame: FrameId, heat: Heat) {
        let tag = &mut self.tags[frame.index()];
        tag.heat = tag.heat.max(heat);
        tag.turn = self.turns[tag.layer as usize];
        if self.replacement == Replacement::LeastRecent {
            self.clock = self.clock.wrapping_add(1);
            self.stamps[frame.index()] = self.clock;
            self.order.push_back((frame, self.clock));
            if self.order.len() > 4 * self.tags.len() {
                let stamps = &self.stamps;
                self.order
                    .retain(|(frame, stamp)| stamps[frame.index()] == *stamp);
            }
        }
    }

    /// A frame whose piece may give way to one of this epoch.
    pub(super) fn victim(&mut self, epoch: u64) -> Option<FrameId> {
        match self.replacement {
            Replacement::Clock => self.turn(epoch),
            Replacement::LeastRecent => self.least_recent(epoch),
        }
    }

    fn turn(&mut self, epoch: u64) -> Option<FrameId> {
        // One turn to find what is cold, one for each step of cooling, one to find that.
        for round in 0..=1 + Heat::Chosen as usize {
            for _ in 0..self.tags.len() {
                let at = self.hand;
                self.hand = (at + 1) % self.tags.len();
                let tag = &mut self.tags[at];
                if !tag.may_go(epoch) {
                    continue;
                }
                let passed_over =
                    tag.heat == Heat::Chosen && tag.turn != self.turns[tag.layer as usize];
                if tag.heat == Heat::Cold || passed_over {
                    return u32::try_from(at).ok().map(FrameId);
                }
                if round > 0 {
                    tag.heat = tag.heat.cooled();
                }
            }
        }
        None
    }

    fn least_recent(&mut self, epoch: u64) -> Option<FrameId> {
        for _ in 0..self.order.len() {
            let (frame, stamp) = self.order.pop_front()?;
            if self.stamps[frame.index()] != stamp {
                continue;
            }
            if self.tags[frame.index()].may_go(epoch) {
                return Some(frame);
            }
            self.order.push_back((frame, stamp));
        }
        None
    }
}

/// `bytes` zeroed bytes that start on a sector.
pub(super) fn aligned(bytes: usize) -> BytesMut {
    let mut all = BytesMut::zeroed(bytes + SECTOR_BYTES);
    let skip = all.as_ptr().align_offset(SECTOR_BYTES);
    let _before = all.split_to(skip);
    all.truncate(bytes);
    all
}
