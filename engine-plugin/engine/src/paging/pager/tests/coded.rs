//! Pieces in 8 bits an element.

use half::f16;

use super::*;
use crate::kv::KvDtype;

const DIM: usize = 64;

pub(super) fn coded(shape: Shape) -> Shape {
    Shape {
        coding: Some(Coding::new(DIM, KvDtype::F16)),
        ..shape
    }
}

/// A token's K, as bytes.
fn row(token: usize) -> Vec<u8> {
    let value = |channel: usize| {
        let at = u16::try_from((token * 37 + channel * 11) % 101).unwrap();
        f16::from_f32((f32::from(at) - 50.0) * 0.173)
    };
    (0..DIM)
        .flat_map(|channel| value(channel).to_le_bytes())
        .collect()
}

fn write(pager: &mut Pager, piece: PieceId, token: usize) {
    pager.ensure(&[piece], Heat::Scanned).unwrap();
    let row = row(token);
    pager.bytes_mut(piece).unwrap()[token * row.len()..][..row.len()].copy_from_slice(&row);
}

fn bytes(pager: &mut Pager, piece: PieceId) -> Vec<u8> {
    pager.ensure(&[piece], Heat::Scanned).unwrap();
    pager.bytes(piece).unwrap().to_vec()
}

/// What is parked comes back rounded, by whichever way, is clean then, and takes as many bytes of the
/// file as it should.
#[test]
fn what_is_parked_comes_back_rounded() {
    let file = Arc::default();
    let mut pager = pager(coded(SHAPE), 8, &file);
    let block = BlockId(3);
    let piece = SHAPE.piece(1, 0, block);
    (0..16).for_each(|token| write(&mut pager, piece, token));
    let exact = bytes(&mut pager, piece);
    assert_eq!(pager.park(&[block]), Ok(2560));
    // Written, but not come back.
    assert!(!pager.is_rounded(block));
    let past_the_frames = pager.read_out(piece).unwrap().unwrap();
    assert!(pager.is_rounded(block));
    let rounded = bytes(&mut pager, piece);
    assert_eq!(&past_the_frames[..], rounded);
    let halves = |bytes: &[u8]| -> Vec<f32> {
        let (halves, _) = bytes.as_chunks();
        halves
            .iter()
            .map(|&half| f16::from_le_bytes(half).to_f32())
            .collect()
    };
    let errors = halves(&exact)
        .into_iter()
        .zip(halves(&rounded))
        .map(|(a, b)| (a - b).abs());
    let worst = errors.fold(0.0, f32::max);
    assert!(0.0 < worst && worst < 8.65 / 226.0, "{worst}");
    let stats = pager.stats();
    assert_eq!((stats.written_bytes, stats.read_bytes), (2560, 2560));
    assert_eq!(pager.park(&[block]), Ok(0));
    assert_eq!(bytes(&mut pager, piece), rounded);
    pager.forget(block);
    assert!(!pager.is_rounded(block));
}

#[test]
fn what_is_read_into_a_frame_is_noted_as_rounded() {
    let file = Arc::default();
    let mut pager = pager(coded(SHAPE), 8, &file);
    let (block, other) = (BlockId(3), BlockId(4));
    write(&mut pager, SHAPE.piece(1, 0, block), 0);
    write(&mut pager, SHAPE.piece(1, 0, other), 0);
    pager.park(&[block, other]).unwrap();
    pager
        .ensure(&[SHAPE.piece(1, 0, block)], Heat::Scanned)
        .unwrap();
    assert!(pager.is_rounded(block) && !pager.is_rounded(other));
}

/// A page that is parked after every token loses no more than one that is parked when it is full.
#[test]
fn a_page_that_is_being_filled_is_rounded_once() {
    let pieces = [SHAPE.piece(0, 0, BlockId(0)), SHAPE.piece(0, 1, BlockId(0))];
    let file = Arc::default();
    let mut pager = pager(coded(SHAPE), 8, &file);
    for token in 0..16 {
        write(&mut pager, pieces[0], token);
        write(&mut pager, pieces[1], token);
        if token % 3 != 1 {
            pager.park(&[BlockId(0)]).unwrap();
        }
    }
    pager.park(&[BlockId(0)]).unwrap();
    let by_token = bytes(&mut pager, pieces[0]);
    pager.forget(BlockId(0));
    (0..16).for_each(|token| write(&mut pager, pieces[0], token));
    pager.park(&[BlockId(0)]).unwrap();
    assert!(bytes(&mut pager, pieces[0]) == by_token);
}

/// A flipped bit anywhere in a slot, and a read that fails, are errors.
#[test]
fn damage_is_an_error() {
    let file: Arc<FaultyFile> = Arc::default();
    let mut pager = pager(coded(SHAPE), 8, &file);
    let (block, layer) = (BlockId(5), 1);
    let piece = SHAPE.piece(layer, 1, block);
    (0..16).for_each(|token| write(&mut pager, piece, token));
    pager.park(&[block]).unwrap();
    let rounded = pager.read_out(piece).unwrap().unwrap();
    let start = 2560 * piece.index();
    for at in [0, 300, 1000, 2559] {
        file.bytes.lock().unwrap()[start + at] ^= 16;
        let corrupt = PagingError::Corrupt { block, layer };
        assert_eq!(pager.ensure(&[piece], Heat::Chosen), Err(corrupt), "{at}");
        assert_eq!(pager.read_out(piece).map(|_| ()), Err(corrupt), "{at}");
        file.bytes.lock().unwrap()[start + at] ^= 16;
    }
    assert_eq!(bytes(&mut pager, piece), rounded[..]);
}

/// Over a real file, whatever its sectors are.
#[test]
fn a_scratch_file_holds_coded_pieces() {
    let directory = tempfile::tempdir().unwrap();
    let file = ScratchFile::create(directory.path()).unwrap();
    let sector = file.sector_bytes();
    assert!(sector.is_power_of_two() && (512..=4096).contains(&sector));
    let shape = Shape {
        piece_bytes: 8192,
        coding: Some(Coding::new(DIM, KvDtype::F32)),
        ..SHAPE
    };
    let mut pager = Pager::new(shape, 16, Replacement::Clock, Arc::new(file)).unwrap();
    let all: Vec<PieceId> = (0..32).map(PieceId).collect();
    for &piece in &all {
        fill(&mut pager, piece, u8::try_from(piece.0).unwrap() + 64).unwrap();
    }
    let blocks: Vec<BlockId> = (0..8).map(BlockId).collect();
    pager.park(&blocks).unwrap();
    let slot = u64::try_from(2304usize.next_multiple_of(sector)).unwrap();
    assert!(pager.stats().written_bytes >= 32 * slot && slot < 8192);
    for pieces in all.chunks(16) {
        pager.ensure(pieces, Heat::Scanned).unwrap();
        for &piece in pieces {
            let value = u8::try_from(piece.0).unwrap() + 64;
            let expected = f32::from_le_bytes([value; 4]);
            let (values, _) = pager.bytes(piece).unwrap().as_chunks();
            let near = |&bytes: &[u8; 4]| (f32::from_le_bytes(bytes) / expected - 1.0).abs() < 1e-4;
            assert!(values.iter().all(near), "{piece:?}");
        }
    }
}
