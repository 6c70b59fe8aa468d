use kvasir_types::{DType, Planes};
use proptest::prelude::*;

use super::*;

fn found(tokens: &[u32], layers: u16) -> Vec<Found> {
    let of = |(source, tokens): (usize, &u32)| {
        let planes = Planes::symmetric(8);
        let layout = KvLayout::new(layers, 2, planes, *tokens, DType::F32).unwrap();
        Found {
            source,
            key: ChunkKey::from_bytes([0; 32]),
            bytes: TierBytes::of(crate::Tier::Memory, layout.chunk_bytes()),
            layout,
            is_live: true,
            fits: false,
            received: vec![false; layers.into()],
        }
    };
    tokens.iter().enumerate().map(of).collect()
}

#[test]
fn layer_0_of_all_chunks_comes_first() {
    let plan = plan(&found(&[40, 64, 40, 33], 4));
    let asked: Vec<_> = plan
        .iter()
        .map(|it| (it.chunks.clone(), it.layers.clone()))
        .collect();
    let lengths = [vec![3], vec![0, 2], vec![1]];
    let of = |layers: Range<u16>| lengths.iter().map(move |it| (it.clone(), layers.clone()));
    assert_eq!(asked, of(0..1).chain(of(1..4)).collect::<Vec<_>>());
}

#[test]
fn one_length_takes_one_get() {
    let plan = plan(&found(&[40; 5], 4));
    assert_eq!(plan.len(), 1);
    assert_eq!(plan[0].layers, 0..4);
}

proptest! {
    /// Every layer of every chunk is asked for once, and no chunk's layers out of order.
    #[test]
    fn all_is_asked_for_once(
        tokens in prop::collection::vec(1u32..4000, 0..20),
        layers in 1u16..40,
    ) {
        let found = found(&tokens, layers);
        let mut asked = vec![Vec::new(); found.len()];
        for segment in plan(&found) {
            let length = |chunk: &usize| found[*chunk].layout;
            prop_assert!(segment.chunks.iter().map(length).all(|it| it == length(&segment.chunks[0])));
            for &chunk in &segment.chunks {
                asked[chunk].extend(segment.layers.clone());
            }
        }
        for layers_asked in asked {
            prop_assert_eq!(layers_asked, (0..layers).collect::<Vec<_>>());
        }
    }
}
