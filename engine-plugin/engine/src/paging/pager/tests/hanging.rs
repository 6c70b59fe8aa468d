//! A disk that hangs.

use super::*;

/// A pager that does not wait for long, and pieces that are in the file only.
fn hasty(frames: usize, stored: Range<u32>) -> (Arc<FaultyFile>, Pager) {
    let file: Arc<FaultyFile> = Arc::default();
    let mut pager = pager(SHAPE, frames, &file);
    for piece in stored.clone() {
        fill(&mut pager, PieceId(piece), mark(piece)).unwrap();
    }
    pager.park(&all_blocks()).unwrap();
    pager.set_timeout(TIMEOUT);
    (file, pager)
}

const TIMEOUT: Duration = Duration::from_millis(100);

/// What a piece holds.
fn mark(piece: u32) -> u8 {
    u8::try_from(piece + 1).unwrap()
}

fn all_blocks() -> Vec<BlockId> {
    (0..8).map(BlockId).collect()
}

fn read_timeout(piece: u32) -> PagingError {
    let (layer, block) = SHAPE.layer_and_block(PieceId(piece));
    PagingError::ReadTimeout {
        block,
        layer,
        timeout: TIMEOUT,
    }
}

const NO_ROOM: PagingError = PagingError::Timeout { timeout: TIMEOUT };

fn offset(piece: u32) -> u64 {
    u64::from(piece) * 4096
}

/// For what must not be given up, however busy the machine is.
fn patiently<T>(pager: &mut Pager, act: impl FnOnce(&mut Pager) -> T) -> T {
    pager.set_timeout(Pager::TIMEOUT);
    let outcome = act(pager);
    pager.set_timeout(TIMEOUT);
    outcome
}

/// Who waits for a read that hangs is told which page it is; all others are read, that page too
/// once it can be. The memory that the read fills is nobody's until it lands.
#[test]
fn a_read_that_hangs_holds_up_nobody_else() {
    let (file, mut pager) = hasty(6, 0..8);
    file.reads.close(offset(4)..offset(5));
    let wanted = [PieceId(0), PieceId(4)];
    for _ in 0..2 {
        let error = pager.ensure(&wanted, Heat::Scanned).unwrap_err();
        assert_eq!(error, read_timeout(4));
        assert_eq!(error.block(), Some(BlockId(2)));
    }
    assert_eq!((pager.loading, pager.overdue_reads), (0, 2));
    assert_eq!((pager.usable_frames(), pager.stats().timeouts), (4, 2));
    // All the frames that are left, again and again.
    patiently(&mut pager, |pager| {
        for round in 0..4 {
            let wanted: Vec<PieceId> = [0, 1, 2, 3, 5, 6, 7].map(PieceId).to_vec();
            let wanted = &wanted[round..round + 4];
            pager.ensure(wanted, Heat::Scanned).unwrap();
            for &piece in wanted {
                assert_eq!(value(pager, piece), mark(piece.0));
            }
        }
    });
    let five: Vec<PieceId> = (0..4).chain([5]).map(PieceId).collect();
    // Others have come meanwhile, but what is missing is known to hang.
    let timeout = Duration::from_secs(5);
    pager.set_timeout(timeout);
    let started = Instant::now();
    let no_room = Err(PagingError::Timeout { timeout });
    assert_eq!(pager.ensure(&five, Heat::Scanned), no_room);
    assert!(started.elapsed() < timeout / 2, "{:?}", started.elapsed());

    // It comes back, and what it brings is dropped: the piece is elsewhere by now.
    file.reads.close(0..0);
    patiently(&mut pager, |pager| {
        fill(pager, PieceId(4), 99).unwrap();
        file.reads.open();
        settle(pager);
        assert_eq!(value(pager, PieceId(4)), 99);
        assert_eq!(pager.usable_frames(), 6);
        let six: Vec<PieceId> = (0..6).map(PieceId).collect();
        pager.ensure(&six, Heat::Scanned).unwrap();
        for piece in 0..6 {
            let held = if piece == 4 { 99 } else { mark(piece) };
            assert_eq!(value(pager, PieceId(piece)), held);
        }
    });
}

/// While nothing comes at all, waits are short; what has not begun is called off, so that what
/// hangs takes no more than the threads do. All is there when the disk is back.
#[test]
fn a_disk_that_hangs_is_waited_for_once() {
    let shape = Shape {
        blocks: 64,
        ..SHAPE
    };
    let file: Arc<FaultyFile> = Arc::default();
    let mut pager = pager(shape, 256, &file);
    // Every other one, so that none adjoin.
    let some: Vec<PieceId> = (0..128).map(|at| PieceId(2 * at)).collect();
    for &piece in &some {
        fill(&mut pager, piece, mark(piece.0 / 2)).unwrap();
    }
    let blocks: Vec<BlockId> = (0..64).map(BlockId).collect();
    pager.park(&blocks).unwrap();
    let timeout = Duration::from_secs(1);
    pager.set_timeout(timeout);
    file.reads.close_all();
    let before = pager.stats();
    let started = Instant::now();
    for _ in 0..8 {
        let outcome = pager.ensure(&some, Heat::Scanned);
        assert!(
            matches!(outcome, Err(PagingError::ReadTimeout { .. })),
            "{outcome:?}"
        );
        assert!(pager.usable_frames() >= 128);
    }
    assert!(started.elapsed() < 4 * timeout, "{:?}", started.elapsed());
    assert_eq!(pager.stats().timeouts, 8);
    assert!(matches!(
        pager.read_out(some[0]),
        Err(PagingError::ReadTimeout { .. })
    ));
    assert_eq!(pager.stats().timeouts, 9);
    // What is in memory can be had; no thread is left to write it, and it is not lost.
    fill(&mut pager, PieceId(1), 77).unwrap();
    assert_eq!(
        pager.park(&[BlockId(0)]),
        Err(PagingError::Timeout { timeout })
    );
    assert_eq!((pager.writes_in_flight, pager.overdue_writes), (0, 0));
    let costs = pager.stats().since(&before);
    assert_eq!((costs.read_bytes, costs.written_bytes), (0, 0));
    file.reads.open();
    pager.set_timeout(Pager::TIMEOUT);
    pager.park(&[BlockId(0)]).unwrap();
    pager.ensure(&[PieceId(1)], Heat::Scanned).unwrap();
    assert_eq!(value(&pager, PieceId(1)), 77);
    pager.ensure(&some, Heat::Scanned).unwrap();
    for &piece in &some {
        assert_eq!(value(&pager, piece), mark(piece.0 / 2));
    }
    assert_eq!(pager.read_out(some[0]).unwrap().unwrap()[0], mark(0));
    settle(&mut pager);
    assert_eq!(pager.usable_frames(), 256);
    // And it is waited for as before.
    assert!(!pager.device.hangs());
}

/// A write that hangs keeps its pieces in memory, and is not overtaken by a later write of the
/// same; others are written, and can be parked.
#[test]
fn a_write_that_hangs_keeps_what_it_writes() {
    let (file, mut pager) = hasty(8, 0..0);
    file.writes.close(offset(0)..offset(2));
    fill(&mut pager, PieceId(0), 1).unwrap();
    assert_eq!(pager.park(&[BlockId(0)]), Err(NO_ROOM));
    // Known to hang: nobody waits.
    assert_eq!((pager.writes_in_flight, pager.overdue_writes), (0, 1));
    let timeouts = pager.stats().timeouts;
    assert_eq!(pager.park(&[BlockId(0), BlockId(1)]), Err(NO_ROOM));
    assert_eq!(pager.stats().timeouts, timeouts);
    patiently(&mut pager, |pager| {
        fill(pager, PieceId(0), 2).unwrap();
        // More than fits, beside what hangs.
        for piece in 4..16 {
            fill(pager, PieceId(piece), mark(piece)).unwrap();
        }
        pager.park(&all_blocks()[2..]).unwrap();
        assert_eq!(value(pager, PieceId(0)), 2);
        for piece in 4..16 {
            pager.ensure(&[PieceId(piece)], Heat::Scanned).unwrap();
            assert_eq!(value(pager, PieceId(piece)), mark(piece));
        }
        file.writes.open();
        settle(pager);
        pager.park(&[BlockId(0)]).unwrap();
        assert_eq!(pager.bytes(PieceId(0)), None);
        pager.ensure(&[PieceId(0)], Heat::Scanned).unwrap();
        assert_eq!(value(pager, PieceId(0)), 2);
    });
}

/// Where no write ends, what is in memory stays usable, and who needs room is refused in time.
#[test]
fn writes_that_hang_refuse_who_needs_room() {
    let (file, mut pager) = hasty(8, 0..0);
    file.writes.close_all();
    for piece in 0..8 {
        fill(&mut pager, PieceId(piece), mark(piece)).unwrap();
    }
    for _ in 0..3 {
        assert_eq!(fill(&mut pager, PieceId(8), 9), Err(NO_ROOM));
    }
    for piece in 0..8 {
        fill(&mut pager, PieceId(piece), 2 * mark(piece)).unwrap();
    }
    assert_eq!(pager.park(&all_blocks()), Err(NO_ROOM));
    file.writes.open();
    patiently(&mut pager, |pager| {
        fill(pager, PieceId(8), 9).unwrap();
        settle(pager);
        pager.park(&all_blocks()).unwrap();
        for piece in 0..8 {
            pager.ensure(&[PieceId(piece)], Heat::Scanned).unwrap();
            assert_eq!(value(pager, PieceId(piece)), 2 * mark(piece));
        }
    });
}

/// A block given back while its write hangs: its next owner's pieces are not mixed up with what
/// lands at last.
#[test]
fn a_late_write_is_not_anothers() {
    let (file, mut pager) = hasty(8, 0..0);
    file.writes.close_all();
    fill(&mut pager, PieceId(0), 1).unwrap();
    assert_eq!(pager.park(&[BlockId(0)]), Err(NO_ROOM));
    pager.forget(BlockId(0));
    fill(&mut pager, PieceId(0), 7).unwrap();
    fill(&mut pager, PieceId(1), 5).unwrap();
    // Later writes would pass, and the first one after them.
    file.writes.close(0..0);
    assert_eq!(pager.park(&[BlockId(0)]), Err(NO_ROOM));
    file.writes.open();
    patiently(&mut pager, |pager| {
        settle(pager);
        pager.park(&[BlockId(0)]).unwrap();
        for (piece, held) in [(0, 7), (1, 5)] {
            pager.ensure(&[PieceId(piece)], Heat::Scanned).unwrap();
            assert_eq!(value(pager, PieceId(piece)), held);
        }
    });
}

/// A pager can be dropped while its disk hangs, and its threads end when that is over.
#[test]
fn dropping_does_not_hang() {
    let (file, mut pager) = hasty(8, 0..8);
    file.reads.close_all();
    file.writes.close_all();
    fill(&mut pager, PieceId(20), 1).unwrap();
    assert_eq!(
        pager.ensure(&[PieceId(0)], Heat::Scanned),
        Err(read_timeout(0))
    );
    assert_eq!(pager.park(&[BlockId(2)]), Err(NO_ROOM));
    drop(pager);
    assert!(Arc::strong_count(&file) > 1);
    file.reads.open();
    file.writes.open();
    let started = Instant::now();
    while Arc::strong_count(&file) > 1 {
        assert!(started.elapsed() < Duration::from_secs(60));
        std::thread::yield_now();
    }
}
