use proptest::prelude::*;

use super::*;

const LAYERS: u16 = 6;

fn chunks(bounds: &[usize]) -> Vec<Reused> {
    let chunk = |(index, bounds): (usize, &[usize])| Reused {
        tokens: bounds[0]..bounds[1],
        exact: index == 0,
    };
    bounds.windows(2).enumerate().map(chunk).collect()
}

fn chosen(selection: &Selection) -> Vec<usize> {
    let tokens = selection.open();
    tokens
        .filter(|&token| selection.layers[token] > 0)
        .collect()
}

fn select(rule: Rule, share: f32, scores: &[f32]) -> Selection {
    let scores = [scores.to_vec()];
    let selector = Selector {
        rule,
        share,
        layers: Some(2),
    };
    Selection::new(selector, 24, &chunks(&[1, 6, 12, 20]), LAYERS, &scores)
}

#[test]
fn text_is_computed_in_all_layers_and_exact_chunks_in_none() {
    for rule in [Rule::None, Rule::First, Rule::Random { seed: 3 }] {
        let selection = select(rule, 0.5, &[]);
        assert_eq!(selection.layers[0], LAYERS);
        assert_eq!(selection.layers[20..], [LAYERS; 4]);
        assert_eq!(selection.layers[1..6], [0; 5]);
    }
}

#[test]
fn first_tokens_are_of_every_chunk() {
    // Seven of fourteen: four of the one, three of the other.
    let selection = select(Rule::First, 0.5, &[]);
    assert_eq!(chosen(&selection), [6, 7, 8, 9, 12, 13, 14]);
    assert_eq!(selection.layers[6], 2);
    // 7 rows in 2 of 6 layers, of 19 tokens.
    assert!((selection.charged() - 14.0 / (19.0 * 6.0)).abs() < 1e-9);
}

#[test]
fn the_largest_scores_are_chosen_whatever_exact_chunks_have() {
    let mut scores = [0.0; 24];
    scores[2] = 9.0;
    scores[0] = 9.0;
    (scores[7], scores[13], scores[19]) = (3.0, 1.0, 2.0);
    let share = 3.0 / 14.0;
    assert_eq!(chosen(&select(Rule::Scored, share, &scores)), [7, 13, 19]);
    let rule = Rule::FirstAndScored { first: 1 };
    assert_eq!(chosen(&select(rule, share, &scores)), [6, 7, 12]);
}

#[test]
fn what_deviates_most_goes_on_behind_the_check() {
    let check = Check {
        layer: 1,
        of: Compared::Both,
        gradual: false,
    };
    let selector = Selector {
        rule: Rule::Deviation(check),
        share: 2.0 / 14.0,
        layers: None,
    };
    let mut selection = Selection::new(selector, 24, &chunks(&[1, 6, 12, 20]), LAYERS, &[]);
    assert_eq!(selection.compares_at(0), None);
    assert_eq!(selection.compares_at(1), Some(Compared::Both));
    assert_eq!(selection.compares_at(2), None);
    let mut deviations = [1.0; 24];
    (deviations[3], deviations[9], deviations[18]) = (9.0, 5.0, 4.0);
    selection.narrow(1, &deviations);
    let on: Vec<usize> = (1..20)
        .filter(|&token| selection.layers[token] == LAYERS)
        .collect();
    assert_eq!(on, [9, 18]);
    assert_eq!(selection.layers[3], 0, "in its own place");
    assert_eq!(selection.layers[7], 1, "computed up to the check");
    // Two rows in six layers, twelve in the two that were compared.
    assert!((selection.charged() - (12.0 + 24.0) / (19.0 * 6.0)).abs() < 1e-9);
}

#[test]
fn gradual_filtering_narrows_to_the_share() {
    let check = Check {
        layer: 1,
        of: Compared::Keys,
        gradual: true,
    };
    let selector = Selector {
        rule: Rule::Deviation(check),
        share: 4.0 / 14.0,
        layers: None,
    };
    let mut selection = Selection::new(selector, 24, &chunks(&[1, 6, 12, 20]), LAYERS, &[]);
    #[expect(clippy::cast_precision_loss, reason = "a test")]
    let deviations: Vec<f32> = (0..24).map(|token| token as f32).collect();
    let mut left = Vec::new();
    for layer in 0..LAYERS {
        if selection.compares_at(layer).is_some() {
            selection.narrow(layer, &deviations);
            let on = selection.open().filter(|&it| selection.layers[it] > layer);
            left.push(on.count());
        }
    }
    assert_eq!(left, [6, 5, 4]);
}

proptest! {
    /// Every rule chooses as many as it may, of what may be chosen, and none twice.
    #[test]
    fn shares_are_kept(
        share in 0.0f32..=1.0,
        seed: u64,
        bounds in proptest::collection::btree_set(0usize..100, 2..9),
    ) {
        let bounds: Vec<usize> = bounds.into_iter().collect();
        let chunks = chunks(&bounds);
        let open: usize = chunks.iter().skip(1).map(|chunk| chunk.tokens.len()).sum();
        #[expect(clippy::cast_precision_loss, reason = "a test")]
        let scores: Vec<f32> = (0..100u64).map(|token| (token * seed % 97) as f32).collect();
        for rule in [
            Rule::First,
            Rule::Random { seed },
            Rule::Scored,
            Rule::FirstAndScored { first: 2 },
        ] {
            let selector = Selector { rule, share, layers: Some(3) };
            let selection = Selection::new(selector, 100, &chunks, LAYERS, std::slice::from_ref(&scores));
            prop_assert_eq!(chosen(&selection).len(), count(open, share));
            let outside = (0..100).filter(|token| !chunks.iter().any(|it| it.tokens.contains(token)));
            prop_assert!(outside.into_iter().all(|token| selection.layers[token] == LAYERS));
        }
    }
}

/// Two tokens that change in layer 1 alone, one that changes in all layers, more and more.
#[test]
fn rows_go_where_they_bring_most() {
    let mut scores = vec![vec![0.0; 24]; 5];
    (scores[0][7], scores[0][9]) = (4.0, 2.0);
    for (layer, scores) in (0u8..).zip(&mut scores) {
        scores[15] = f32::from(layer + 1);
    }
    let chosen = |rows: f32| {
        let selector = Selector {
            rule: Rule::Graded,
            share: rows / (14.0 * 6.0),
            layers: None,
        };
        let chunks = chunks(&[1, 6, 12, 20]);
        let selection = Selection::new(selector, 24, &chunks, LAYERS, &scores);
        [7, 9, 15].map(|token| selection.layers[token])
    };
    assert_eq!(chosen(0.0), [0, 0, 0]);
    // A row brings 4 of the first token, 3.3 of the third in all layers, 2 of the second.
    assert_eq!(chosen(2.5), [2, 0, 0]);
    assert_eq!(chosen(8.5), [2, 0, 6]);
    assert_eq!(chosen(10.5), [2, 2, 6]);
    assert_eq!(chosen(84.0), [6, 6, 6]);
}
