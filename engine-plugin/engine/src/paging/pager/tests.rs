use std::collections::HashMap;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};

use proptest::prelude::*;

use super::*;
use crate::paging::ScratchFile;
use crate::paging::faulty::FaultyFile;

mod coded;
mod hanging;

use coded::coded;

const SHAPE: Shape = Shape {
    layers: 2,
    kv_heads: 2,
    blocks: 8,
    piece_bytes: 4096,
    coding: None,
};

fn pager(shape: Shape, frames: usize, file: &Arc<FaultyFile>) -> Pager {
    let backing = Arc::clone(file) as Arc<dyn Backing>;
    Pager::new(shape, frames, Replacement::Clock, backing).unwrap()
}

/// Writes a value all over a piece.
fn fill(pager: &mut Pager, piece: PieceId, value: u8) -> Result<(), PagingError> {
    pager.ensure(&[piece], Heat::Scanned)?;
    pager.bytes_mut(piece).unwrap().fill(value);
    Ok(())
}

/// Lands all that is in flight.
fn settle(pager: &mut Pager) {
    let started = Instant::now();
    while pager.loading + pager.writes_in_flight + pager.overdue_reads + pager.overdue_writes > 0 {
        assert!(started.elapsed() < Duration::from_secs(60), "{pager:?}");
        let _ = pager.wait();
    }
}

fn value(pager: &Pager, piece: PieceId) -> u8 {
    let bytes = pager.bytes(piece).unwrap();
    assert!(
        bytes.iter().all(|byte| *byte == bytes[0]),
        "{piece:?} is torn"
    );
    bytes[0]
}

#[derive(Clone, Debug)]
enum Action {
    Fill(u32, u8),
    Want(Vec<u32>, bool),
    Expect(Vec<u32>),
    Park(Vec<u32>),
    Forget(u32),
    Full(bool),
    Broken(bool),
    Lies(bool),
    /// Reads and writes.
    Hang(bool, bool),
}

fn any_action(faults: bool, hangs: bool) -> impl Strategy<Value = Action> {
    let pieces = u32::try_from(SHAPE.pieces()).unwrap();
    let some = move || prop::collection::vec(0..pieces, 0..10);
    let blocks = 0..u32::try_from(SHAPE.blocks).unwrap();
    let weight = u32::from(faults);
    let hanging = u32::from(hangs);
    prop_oneof![
        // As halves, all are numbers: they come back as they are from 8 bits too.
        8 => (0..pieces, 1..=120u8).prop_map(|(piece, value)| Action::Fill(piece, value)),
        6 => (some(), any::<bool>()).prop_map(|(some, hot)| Action::Want(some, hot)),
        4 => some().prop_map(Action::Expect),
        2 => prop::collection::vec(blocks.clone(), 1..4).prop_map(Action::Park),
        1 => blocks.prop_map(Action::Forget),
        weight => any::<bool>().prop_map(Action::Full),
        weight => any::<bool>().prop_map(Action::Broken),
        weight => any::<bool>().prop_map(Action::Lies),
        2 * hanging => any::<(bool, bool)>().prop_map(|(reads, writes)| Action::Hang(reads, writes)),
    ]
}

/// What the pieces hold; faults that are on.
#[derive(Default)]
struct Expected {
    values: HashMap<PieceId, u8>,
    full: bool,
    unreadable: bool,
    lies: bool,
    /// The disk has hung: what it did then may take long still.
    hung: bool,
}

impl Expected {
    fn allows(&self, error: PagingError) -> bool {
        match error {
            PagingError::Full => self.full || self.hung,
            PagingError::Read { .. } => self.unreadable,
            PagingError::Corrupt { .. } => self.lies,
            PagingError::ReadTimeout { .. } | PagingError::Timeout { .. } => self.hung,
            _ => false,
        }
    }
}

/// Whatever is done, in whatever order, pieces hold what was written to them last, or cannot be
/// had because of a fault that is on at that time.
fn follow(pager: &mut Pager, file: Option<&FaultyFile>, actions: &[Action]) {
    let mut expected = Expected::default();
    let set = |fault: fn(&FaultyFile) -> &AtomicBool, on: bool| {
        if let Some(file) = file {
            fault(file).store(on, Ordering::Relaxed);
        }
    };
    for action in actions {
        let outcome = match action {
            Action::Fill(piece, value) => {
                let piece = PieceId(*piece);
                fill(pager, piece, *value).map(|()| {
                    expected.values.insert(piece, *value);
                })
            }
            Action::Want(pieces, hot) => {
                let pieces: Vec<PieceId> = pieces.iter().copied().map(PieceId).collect();
                let heat = if *hot { Heat::Chosen } else { Heat::Scanned };
                pager.ensure(&pieces, heat).map(|()| {
                    for piece in pieces {
                        let held = expected.values.get(&piece).copied().unwrap_or(0);
                        assert_eq!(value(pager, piece), held, "{piece:?}");
                    }
                })
            }
            Action::Expect(pieces) => {
                let pieces: Vec<PieceId> = pieces.iter().copied().map(PieceId).collect();
                pager.prefetch(&pieces, Heat::Chosen);
                Ok(())
            }
            Action::Park(blocks) => {
                let mut blocks: Vec<BlockId> = blocks.iter().copied().map(BlockId).collect();
                blocks.sort();
                blocks.dedup();
                pager.park(&blocks).map(|_| ())
            }
            Action::Forget(block) => {
                pager.forget(BlockId(*block));
                let of_block = |piece: PieceId| SHAPE.layer_and_block(piece).1.0 == *block;
                expected.values.retain(|&piece, _| !of_block(piece));
                Ok(())
            }
            Action::Full(on) => {
                set(|file| &file.full, *on);
                expected.full = *on;
                Ok(())
            }
            Action::Broken(on) => {
                set(|file| &file.broken, *on);
                expected.unreadable = *on;
                Ok(())
            }
            Action::Lies(on) => {
                set(|file| &file.lies, *on);
                expected.lies = *on;
                Ok(())
            }
            Action::Hang(reads, writes) => {
                let file = file.expect("only a faulty file hangs");
                for (gate, closed) in [(&file.reads, *reads), (&file.writes, *writes)] {
                    if closed {
                        gate.close_all()
                    } else {
                        gate.open()
                    }
                }
                expected.hung |= *reads || *writes;
                Ok(())
            }
        };
        if let Err(error) = outcome {
            assert!(expected.allows(error), "{action:?}: {error}");
        }
    }
    set(|file| &file.full, false);
    set(|file| &file.broken, false);
    set(|file| &file.lies, false);
    if let Some(file) = file {
        file.reads.open();
        file.writes.open();
        pager.set_timeout(Pager::TIMEOUT);
    }
    // Once all is well again, nothing is lost.
    for (&piece, &held) in &expected.values {
        pager.ensure(&[piece], Heat::Scanned).unwrap();
        assert_eq!(value(pager, piece), held, "{piece:?}");
    }
    settle(pager);
    assert_eq!(pager.usable_frames(), pager.frames.count());
    let resident = pager.frames.count();
    assert!(pager.dirty_count <= resident && pager.dirty.len() <= SHAPE.pieces());
}

proptest! {
    #[test]
    fn pieces_hold_what_was_written_last(
        frames in 10usize..40,
        short in prop_oneof![Just(0u64), Just(4096), Just(512)],
        least_recent: bool,
        in_8_bits: bool,
        actions in prop::collection::vec(any_action(true, false), 1..80),
    ) {
        let file = Arc::new(FaultyFile::default());
        file.short.store(short, Ordering::Relaxed);
        let replacement = if least_recent { Replacement::LeastRecent } else { Replacement::Clock };
        let backing = Arc::clone(&file) as Arc<dyn Backing>;
        let shape = if in_8_bits { coded(SHAPE) } else { SHAPE };
        let mut pager = Pager::new(shape, frames, replacement, backing).unwrap();
        follow(&mut pager, Some(&file), &actions);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// The same over a disk that hangs now and then, and comes back.
    #[test]
    fn what_hangs_changes_nothing(
        frames in 10usize..40,
        actions in prop::collection::vec(any_action(true, true), 1..60),
    ) {
        let file = Arc::new(FaultyFile::default());
        let mut pager = pager(SHAPE, frames, &file);
        pager.set_timeout(Duration::from_millis(5));
        follow(&mut pager, Some(&file), &actions);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// The same over a real file.
    #[test]
    fn a_scratch_file_keeps_the_contract(
        frames in 10usize..40,
        in_8_bits: bool,
        actions in prop::collection::vec(any_action(false, false), 1..80),
    ) {
        let directory = tempfile::tempdir().unwrap();
        let file = ScratchFile::create(directory.path()).unwrap();
        prop_assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
        let shape = if in_8_bits { coded(SHAPE) } else { SHAPE };
        let mut pager = Pager::new(shape, frames, Replacement::Clock, Arc::new(file)).unwrap();
        follow(&mut pager, None, &actions);
    }
}

/// Adjoining pieces move together, a gap parts them.
#[test]
fn adjoining_pieces_are_one_operation() {
    let shape = Shape {
        layers: 1,
        kv_heads: 1,
        blocks: 600,
        piece_bytes: 4096,
        coding: None,
    };
    let file = Arc::default();
    let mut pager = pager(shape, 600, &file);
    let all: Vec<PieceId> = (0..600).map(PieceId).collect();
    pager.ensure(&all, Heat::Scanned).unwrap();
    for &piece in &all {
        pager.bytes_mut(piece).unwrap().fill(1);
    }
    let blocks: Vec<BlockId> = (0..600).map(BlockId).collect();
    assert_eq!(pager.park(&blocks), Ok(600 * 4096));
    // A group is 256 pieces.
    assert_eq!(pager.stats().writes, 3);
    pager.ensure(&all, Heat::Scanned).unwrap();
    assert_eq!(pager.stats().reads, 3);
    assert_eq!(pager.stats().read_bytes, 600 * 4096);
    assert_eq!(pager.park(&blocks), Ok(0));
    let gap: Vec<PieceId> = (0..100).chain(101..200).map(PieceId).collect();
    pager.ensure(&gap, Heat::Scanned).unwrap();
    assert_eq!(pager.stats().reads, 5);
}

/// What is parked again is what has changed since.
#[test]
fn a_second_park_moves_what_changed() {
    let file = Arc::default();
    let mut pager = pager(SHAPE, 32, &file);
    let blocks: Vec<BlockId> = (0..4).map(BlockId).collect();
    for layer in 0..2 {
        for kv_head in 0..2 {
            for &block in &blocks {
                let piece = SHAPE.piece(layer, kv_head, block);
                fill(&mut pager, piece, 7).unwrap();
            }
        }
    }
    // Some of it had been written behind.
    assert!(pager.park(&blocks).unwrap() <= 16 * 4096);
    assert_eq!(pager.stats().written_bytes, 16 * 4096);
    assert!((0..32).all(|piece| pager.bytes(PieceId(piece)).is_none()));
    fill(&mut pager, SHAPE.piece(1, 0, BlockId(3)), 8).unwrap();
    pager
        .ensure(&[SHAPE.piece(0, 0, BlockId(0))], Heat::Chosen)
        .unwrap();
    assert_eq!(pager.park(&blocks), Ok(4096));
    assert_eq!(pager.park(&blocks), Ok(0));
    let piece = SHAPE.piece(1, 0, BlockId(3));
    pager.ensure(&[piece], Heat::Chosen).unwrap();
    assert_eq!(value(&pager, piece), 8);
}

/// More than fits is refused with what it takes; what fits exactly is not.
#[test]
fn more_than_fits_is_refused() {
    let file = Arc::default();
    let mut pager = pager(SHAPE, 5, &file);
    let six: Vec<PieceId> = [0, 1, 2, 3, 4, 5, 5, 0].map(PieceId).to_vec();
    let refused = PagingError::Frames {
        needed: 6,
        frames: 5,
    };
    assert_eq!(pager.ensure(&six, Heat::Chosen), Err(refused));
    assert_eq!(pager.ensure(&six[..5], Heat::Chosen), Ok(()));
    assert_eq!(pager.ensure(&six[1..], Heat::Chosen), Err(refused));
    assert_eq!(pager.ensure(&six[1..6], Heat::Chosen), Ok(()));
}

/// With a full disk, what is dirty stays, what is clean gives way, and later all is written.
#[test]
fn a_full_disk_loses_nothing() {
    let file: Arc<FaultyFile> = Arc::default();
    let mut pager = pager(SHAPE, 8, &file);
    file.full.store(true, Ordering::Relaxed);
    for piece in 0..8 {
        fill(&mut pager, PieceId(piece), 1).unwrap();
    }
    assert_eq!(fill(&mut pager, PieceId(8), 1), Err(PagingError::Full));
    assert_eq!(pager.park(&[BlockId(0)]), Err(PagingError::Full));
    for piece in 0..8 {
        pager.ensure(&[PieceId(piece)], Heat::Chosen).unwrap();
        assert_eq!(value(&pager, PieceId(piece)), 1);
    }
    file.full.store(false, Ordering::Relaxed);
    for piece in 8..16 {
        fill(&mut pager, PieceId(piece), 2).unwrap();
    }
    pager.ensure(&[PieceId(3)], Heat::Chosen).unwrap();
    assert_eq!(value(&pager, PieceId(3)), 1);
}

/// A block that is given back while it is written holds nothing afterwards, and what its next
/// owner writes is not mixed up with what is still on its way.
#[test]
fn what_is_forgotten_while_it_is_written_stays_forgotten() {
    let file: Arc<FaultyFile> = Arc::default();
    let mut pager = pager(SHAPE, 8, &file);
    file.writes.close_all();
    for piece in 0..5 {
        fill(&mut pager, PieceId(piece), 6).unwrap();
    }
    assert!(pager.writes_in_flight > 0);
    assert!(pager.pieces[0].writing && pager.pieces[1].writing);
    // A block has a piece for each of two heads.
    pager.forget(BlockId(0));
    pager.forget(BlockId(1));
    // Room for it in memory, while the write of what it held before goes on.
    fill(&mut pager, PieceId(1), 5).unwrap();
    file.writes.open();
    let blocks: Vec<BlockId> = (0..8).map(BlockId).collect();
    pager.park(&blocks).unwrap();
    for (piece, held) in [(0, 0), (1, 5), (2, 0), (4, 6)] {
        pager.ensure(&[PieceId(piece)], Heat::Chosen).unwrap();
        assert_eq!(value(&pager, PieceId(piece)), held);
    }
}

/// Wrong bytes and bytes that do not come are errors that name the page; good ones come after.
#[test]
fn what_cannot_be_read_is_an_error() {
    let file: Arc<FaultyFile> = Arc::default();
    let mut pager = pager(SHAPE, 8, &file);
    let piece = SHAPE.piece(1, 1, BlockId(5));
    let (block, layer) = (BlockId(5), 1);
    fill(&mut pager, piece, 9).unwrap();
    pager.park(&[block]).unwrap();
    file.lies.store(true, Ordering::Relaxed);
    let corrupt = PagingError::Corrupt { block, layer };
    assert_eq!(pager.ensure(&[piece], Heat::Chosen), Err(corrupt));
    assert_eq!(pager.read_out(piece).map(|_| ()), Err(corrupt));
    assert_eq!(pager.bytes(piece), None);
    file.lies.store(false, Ordering::Relaxed);
    file.broken.store(true, Ordering::Relaxed);
    let source = Errno::IO;
    let broken = PagingError::Read {
        block,
        layer,
        source,
    };
    assert_eq!(pager.ensure(&[piece], Heat::Chosen), Err(broken));
    file.broken.store(false, Ordering::Relaxed);
    pager.ensure(&[piece], Heat::Chosen).unwrap();
    assert_eq!(value(&pager, piece), 9);
    assert_eq!(corrupt.block(), Some(block));
}

/// What is read ahead is there when it is wanted, and is counted so.
#[test]
fn what_is_expected_is_there() {
    let file = Arc::default();
    let mut pager = pager(SHAPE, 8, &file);
    for piece in 0..4 {
        fill(&mut pager, PieceId(piece), 3).unwrap();
    }
    let blocks: Vec<BlockId> = (0..4).map(BlockId).collect();
    pager.park(&blocks).unwrap();
    let four: Vec<PieceId> = (0..4).map(PieceId).collect();
    pager.prefetch(&four[..3], Heat::Chosen);
    let before = pager.stats();
    pager.ensure(&four, Heat::Chosen).unwrap();
    let after = pager.stats();
    assert_eq!(before.ahead, 3);
    assert_eq!(after.misses - before.misses, 1);
    assert_eq!(after.late + after.hits_ahead, 3);
    assert_eq!(after.read_bytes, 4 * 4096);
    // Nothing is read ahead that is nowhere.
    pager.prefetch(&[PieceId(20)], Heat::Chosen);
    assert_eq!(pager.stats().ahead, 3);
}

/// Guesses that are wrong are given up, and right ones are not.
#[test]
fn wrong_guesses_are_given_up() {
    let shape = Shape {
        blocks: 4096,
        ..SHAPE
    };
    for right in [false, true] {
        let file = Arc::default();
        let mut pager = pager(shape, 64, &file);
        for piece in 0..4096 {
            fill(&mut pager, PieceId(piece), 1).unwrap();
        }
        let blocks: Vec<BlockId> = (0..4096).map(BlockId).collect();
        pager.park(&blocks).unwrap();
        for turn in 0..400 {
            let guess: Vec<PieceId> = (0..8).map(|at| PieceId((turn * 8 + at) % 4096)).collect();
            pager.prefetch(&guess, Heat::Chosen);
            let other = guess.iter().map(|piece| PieceId((piece.0 + 2048) % 4096));
            let wanted: Vec<PieceId> = if right { guess } else { other.collect() };
            pager.ensure(&wanted, Heat::Chosen).unwrap();
        }
        let stats = pager.stats();
        if right {
            assert_eq!(stats.ahead, 400 * 8, "{stats:?}");
        } else {
            assert!((1000..2000).contains(&stats.ahead), "{stats:?}");
            assert!(stats.ahead_unused > 1000, "{stats:?}");
        }
    }
}

/// Pieces that are chosen outlast a scan of more than fits.
#[test]
fn a_scan_does_not_drive_out_what_is_chosen() {
    let shape = Shape {
        blocks: 64,
        ..SHAPE
    };
    let file = Arc::default();
    let mut pager = pager(shape, 32, &file);
    let chosen: Vec<PieceId> = (0..8).map(PieceId).collect();
    for turn in 0..20 {
        pager.ensure(&chosen, Heat::Chosen).unwrap();
        for at in 0..12 {
            let piece = PieceId(8 + (turn * 12 + at) % 240);
            pager.ensure(&[piece], Heat::Scanned).unwrap();
        }
    }
    assert_eq!(pager.stats().fresh, 8 + 20 * 12);
    assert!(pager.stats().evictions > 100);
}
