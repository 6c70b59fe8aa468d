//! The contract of [`EngineBackend`].

mod moved;

use kvasir_plugin::{BackendError, EngineBackend};
use kvasir_types::LayerIdx;

/// Chunks that each sequence's pages must hold.
pub const CHUNKS: usize = 3;

/// How the model behind a backend turns its keys.
pub struct Keys<'a> {
    /// Turns a key of one head to a position; the same for all heads.
    pub turn: &'a dyn Fn(&mut [f32], usize),
}

/// Runs the suite on two sequences' pages of [`CHUNKS`] chunks each, of 16 tokens at least.
///
/// # Panics
/// When the implementation breaks its contract.
pub fn run<B: EngineBackend>(
    backend: &mut B,
    pages: &B::Pages,
    others: &B::Pages,
    keys: &Keys<'_>,
) {
    run_in_place(backend, pages, others, |backend| {
        moved::run(backend, pages, keys);
    });
}

/// The part of the suite for backends that turn no keys: chunks stay where they were computed.
/// Behind it comes `more`, which may change all of `pages` and nothing of `others`.
///
/// # Panics
/// When the implementation breaks its contract.
pub fn run_in_place<B: EngineBackend>(
    backend: &mut B,
    pages: &B::Pages,
    others: &B::Pages,
    more: impl FnOnce(&mut B),
) {
    let layout = *backend.layout();
    let layers = layout.layers();
    let payload = |sequence: usize, chunk: usize, layer: u16| -> Vec<u8> {
        // Every byte value, so that floats of every kind occur, NaN included.
        let seed = sequence * 31 + chunk * 7 + usize::from(layer) * 3;
        (0..layout.layer_bytes())
            .map(|index| u8::try_from((index * 5 + index / 256 + seed) % 256).unwrap_or(0))
            .collect()
    };
    let every = || {
        (0..CHUNKS).flat_map(move |chunk| (0..layers).map(move |layer| (chunk, LayerIdx(layer))))
    };

    // Written in an order nobody expects.
    for (chunk, layer) in every().collect::<Vec<_>>().into_iter().rev() {
        for (sequence, pages) in [(0, pages), (1, others)] {
            backend
                .write_layer(pages, chunk, layer, &payload(sequence, chunk, layer.0))
                .expect("a chunk inside the pages can be written");
        }
    }
    let check_all = |backend: &B| {
        for (chunk, layer) in every() {
            for (sequence, pages) in [(0, pages), (1, others)] {
                let mut read = vec![0; layout.layer_bytes()];
                backend
                    .read_layer(pages, chunk, layer, &mut read)
                    .expect("a written chunk can be read");
                assert!(
                    read == payload(sequence, chunk, layer.0),
                    "sequence {sequence}, chunk {chunk}, layer {layer} changed"
                );
            }
        }
    };
    check_all(backend);

    let good = payload(0, 0, 0);
    let mut buffer = good.clone();
    let outside = BackendError::OutsidePages { chunk: CHUNKS };
    assert_eq!(
        backend.write_layer(pages, CHUNKS, LayerIdx(0), &good),
        Err(outside)
    );
    assert_eq!(
        backend.read_layer(pages, CHUNKS, LayerIdx(0), &mut buffer),
        Err(outside)
    );
    let far = BackendError::OutsidePages { chunk: usize::MAX };
    assert_eq!(
        backend.write_layer(pages, usize::MAX, LayerIdx(0), &good),
        Err(far)
    );
    let no_layer = BackendError::NoSuchLayer(LayerIdx(layers));
    assert_eq!(
        backend.write_layer(pages, 0, LayerIdx(layers), &good),
        Err(no_layer)
    );
    for length in [0, good.len() - 1, good.len() + 1] {
        let wrong = BackendError::WrongLength {
            expected: good.len(),
            found: length,
        };
        assert_eq!(
            backend.write_layer(pages, 0, LayerIdx(0), &vec![0; length]),
            Err(wrong)
        );
        assert_eq!(
            backend.read_layer(pages, 0, LayerIdx(0), &mut vec![0; length]),
            Err(wrong)
        );
    }
    // A refused write changes nothing.
    check_all(backend);

    more(backend);
    // The other sequence has nothing of this.
    for (chunk, layer) in every() {
        let mut read = vec![0; layout.layer_bytes()];
        backend
            .read_layer(others, chunk, layer, &mut read)
            .expect("a written chunk can be read");
        assert!(
            read == payload(1, chunk, layer.0),
            "chunk {chunk}, layer {layer} changed"
        );
    }
}
