use proptest::prelude::*;

use super::*;

fn config(layers: usize, kv_heads: usize, head_dim: usize) -> ModelConfig {
    let heads = 4 * kv_heads;
    let text = format!(
        r#"{{"architectures": ["LlamaForCausalLM"], "vocab_size": 8, "hidden_size": 64,
            "intermediate_size": 8, "num_hidden_layers": {layers}, "num_attention_heads": {heads},
            "num_key_value_heads": {kv_heads}, "head_dim": {head_dim},
            "max_position_embeddings": 512}}"#
    );
    ModelConfig::from_json(text.as_bytes()).unwrap()
}

fn any_dtype() -> impl Strategy<Value = KvDtype> {
    prop_oneof![Just(KvDtype::F32), Just(KvDtype::Bf16), Just(KvDtype::F16)]
}

proptest! {
    /// What is landed comes back, whole or cut anywhere, and nothing else moves.
    #[test]
    fn layers_round_trip(
        dtype in any_dtype(),
        kv_heads in 1usize..4,
        half_dim in 1usize..12,
        first in 0usize..40,
        tokens in 1usize..60,
        cut in 0usize..60,
        seed: u8,
    ) {
        let mut pool = KvPool::new(&config(2, kv_heads, 2 * half_dim), 9, dtype);
        let mut table: Vec<BlockId> = (0..7).map(|_| pool.alloc().unwrap()).collect();
        table.reverse();
        let payload: Vec<u8> = (0..251u8)
            .map(|byte| byte ^ seed)
            .cycle()
            .take(pool.layer_bytes(tokens))
            .collect();
        pool.write_layer(&table, first, tokens, 1, &payload).unwrap();

        let mut out = vec![0; payload.len()];
        pool.read_layer(&table, first, tokens, 1, &mut out).unwrap();
        prop_assert_eq!(&out, &payload);

        let cut = cut.min(tokens);
        let mut head = vec![0; pool.layer_bytes(cut)];
        pool.read_layer(&table, first, cut, 1, &mut head).unwrap();
        let row = half_dim * 2 * dtype.bytes();
        for (part, whole) in head.chunks(cut.max(1) * row).zip(payload.chunks(tokens * row)) {
            prop_assert_eq!(part, &whole[..part.len()]);
        }

        let mut other = vec![1; pool.layer_bytes(112)];
        pool.read_layer(&table, 0, 112, 0, &mut other).unwrap();
        prop_assert!(other.iter().all(|&byte| byte == 0));
    }
}

#[test]
fn tokens_land_in_canonical_order() {
    let mut pool = KvPool::new(&config(1, 2, 4), 2, KvDtype::F32);
    let table = [pool.alloc().unwrap(), pool.alloc().unwrap()];
    for position in 15..18u8 {
        let row: Vec<f32> = (0..8u8).map(|i| f32::from(position * 10 + i)).collect();
        let negated: Vec<f32> = row.iter().map(|x| -x).collect();
        pool.write_token(&table, position.into(), 0, &row, &negated);
    }
    let mut bytes = vec![0; pool.layer_bytes(3)];
    pool.read_layer(&table, 15, 3, 0, &mut bytes).unwrap();
    let values: Vec<f32> = bytes
        .as_chunks()
        .0
        .iter()
        .map(|&b| f32::from_le_bytes(b))
        .collect();
    // Head 1 of K, all tokens, follows head 0 of all tokens.
    assert_eq!(values[..5], [150.0, 151.0, 152.0, 153.0, 160.0]);
    assert_eq!(values[12..17], [154.0, 155.0, 156.0, 157.0, 164.0]);
    assert_eq!(values[24], -150.0);
}

#[test]
fn pages_are_taken_once_and_given_back_once() {
    let mut pool = KvPool::new(&config(1, 1, 2), 2, KvDtype::Bf16);
    assert_eq!(pool.bytes(), 2 * 16 * 2 * 2 * 2);
    let (a, b) = (pool.alloc().unwrap(), pool.alloc().unwrap());
    assert_ne!(a, b);
    assert_eq!((pool.alloc(), pool.free_blocks()), (None, 0));
    assert_eq!(pool.free(a), Ok(()));
    assert_eq!(pool.free(a), Err(KvError::NotAllocated(a)));
    assert_eq!(
        pool.free(BlockId(9)),
        Err(KvError::NotAllocated(BlockId(9)))
    );
    assert_eq!(pool.alloc(), Some(a));
}

#[test]
fn ranges_that_do_not_fit_are_refused() {
    let mut pool = KvPool::new(&config(1, 1, 2), 2, KvDtype::F32);
    let table = [BlockId(0), BlockId(1)];
    let payload = vec![0; pool.layer_bytes(4)];
    let mut write = |blocks: &[BlockId], first, tokens, layer, payload: &[u8]| {
        pool.write_layer(blocks, first, tokens, layer, payload)
            .unwrap_err()
    };
    assert_eq!(
        write(&table, 29, 4, 0, &payload),
        KvError::Range {
            last: 33,
            table: 32
        }
    );
    assert!(matches!(
        write(&table, usize::MAX, 4, 0, &payload),
        KvError::Range { .. }
    ));
    assert_eq!(
        write(&table, 0, 4, 1, &payload),
        KvError::NoSuchLayer {
            layer: 1,
            layers: 1
        }
    );
    assert_eq!(
        write(&[BlockId(2)], 0, 4, 0, &payload),
        KvError::NoSuchBlock {
            block: BlockId(2),
            blocks: 2
        }
    );
    assert!(matches!(
        write(&table, 0, 3, 0, &payload),
        KvError::PayloadLength { .. }
    ));
}
