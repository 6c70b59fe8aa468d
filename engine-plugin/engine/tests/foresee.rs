//! Queries of the next layer, foreseen.

#![expect(
    clippy::unwrap_used,
    reason = "a test; clippy exempts only functions marked as such"
)]

use std::ops::ControlFlow;
use std::path::Path;

use kvasir_engine::{
    BlockId, KvDtype, KvPool, LogitsWanted, Model, Positions, Scratch, Step, Threads,
};

/// Copies a checkpoint of one file, its layers adding nothing to what they get.
fn without_additions(from: &Path, to: &Path) {
    std::fs::copy(from.join("config.json"), to.join("config.json")).unwrap();
    let mut bytes = std::fs::read(from.join("model.safetensors")).unwrap();
    let (header, metadata) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
    let mut zeroed = 0;
    for (name, tensor) in metadata.tensors() {
        if name.contains("o_proj.") || name.contains("down_proj.") {
            let (start, end) = tensor.data_offsets;
            bytes[8 + header + start..8 + header + end].fill(0);
            zeroed += 1;
        }
    }
    assert!(zeroed >= 2 * 2, "two products a layer");
    std::fs::write(to.join("model.safetensors"), bytes).unwrap();
}

/// Where layers add nothing, what is foreseen is what comes: with biases, norms of heads and
/// every kind of RoPE, for each row of a batch, and none before the last layer.
#[test]
fn what_layers_leave_alone_is_foreseen_exactly() {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures");
    for name in ["llama3-gqa", "llama-bias", "llama-yarn", "qwen2", "qwen3"] {
        let dir = tempfile::tempdir().unwrap();
        without_additions(&fixtures.join(name), dir.path());
        let model = Model::load(dir.path()).unwrap();
        let config = model.config();
        let mut pool = KvPool::new(config, 8, KvDtype::F32);
        let blocks: Vec<BlockId> = std::iter::from_fn(|| pool.alloc()).collect();
        let mut scratch = Scratch::new(Threads::new(2).unwrap());
        let step = |tokens, from, blocks| Step {
            tokens,
            positions: Positions::From(from),
            blocks,
            logits: LogitsWanted::All,
        };
        let steps = [
            step(&[1, 2, 3][..], 0, &blocks[..4]),
            step(&[4, 5][..], 0, &blocks[4..]),
        ];
        let width = config.heads * config.head_dim;
        let mut foreseen: Option<Vec<f32>> = None;
        let mut compared = 0;
        model
            .forward(&mut pool, &mut scratch, &steps, &mut |before| {
                for (row, expected) in before.rows.chunks_exact(before.stride).enumerate() {
                    let Some(foreseen) = &foreseen else { break };
                    let foreseen = &foreseen[row * width..][..width];
                    for (foreseen, expected) in foreseen.iter().zip(expected) {
                        assert!((foreseen - expected).abs() < 1e-5, "{name}: row {row}");
                    }
                    compared += 1;
                }
                foreseen = before.next.map(|next| {
                    // Rows apart are rows together.
                    let mut queries = next.queries(0..2);
                    queries.extend(next.queries(2..5));
                    queries
                });
                assert_eq!(foreseen.is_none(), before.layer + 1 == config.layers);
                ControlFlow::Continue(())
            })
            .unwrap();
        assert_eq!(compared, 5 * (config.layers - 1), "{name}");
    }
}
