//! What the names of rows mean. A name that is missing here is shown as it is.

/// Ways to have the KV of a context.
pub(super) const METHODS: &[(&str, &str)] = &[
    (
        "full",
        "every token computed in its context: what the others are held against",
    ),
    (
        "prefix",
        "the first half of the chunks from a cache, under the same prefix; the rest computed",
    ),
    (
        "naive",
        "every chunk from a cache of its own, keys rotated to their new positions; nothing \
         computed. What a chunk would have seen of earlier chunks is missing",
    ),
    (
        "naive-unpositioned",
        "as `naive`, but keys stay rotated for the positions at which they were computed",
    ),
    (
        "recompute-all",
        "as `naive`, then every token computed over it: a check, which must be `full` again",
    ),
];

/// What a row measures.
#[derive(Clone, Copy, Debug)]
pub(super) struct Known {
    /// As in the rows.
    pub(super) name: &'static str,
    /// As a heading.
    pub(super) title: &'static str,
    pub(super) meaning: &'static str,
}

/// Measures of a quality report.
pub(super) const MEASURES: &[Known] = &[
    Known {
        name: "em",
        title: "Exact match",
        meaning: "share of greedy answers that are the true answer, token for token",
    },
    Known {
        name: "f1",
        title: "Token F1",
        meaning: "harmonic mean of precision and recall over the tokens of an answer",
    },
    Known {
        name: "em_loss",
        title: "Loss of exact match",
        meaning: "exact match of full prefill less that of the method, over the same questions; \
                  below zero, the method did better",
    },
    Known {
        name: "kl",
        title: "KL, mean",
        meaning: "KL(full ‖ method) of the next token, at the tokens of the true answer, \
                  teacher-forced",
    },
    Known {
        name: "kl_median",
        title: "KL, median",
        meaning: "the same, at the middle token",
    },
    Known {
        name: "kl_p99",
        title: "KL, 99th percentile",
        meaning: "the same, at the token that only one in a hundred exceeds",
    },
    Known {
        name: "top1",
        title: "Top-1 agreement",
        meaning: "share of those tokens where method and full prefill think the same one most likely",
    },
    Known {
        name: "diverged",
        title: "Answers that differ",
        meaning: "share of greedy answers that are not those of full prefill, right or wrong",
    },
    Known {
        name: "divergence",
        title: "First token that differs",
        meaning: "mean over the answers that differ, counted from 0",
    },
    Known {
        name: "nll",
        title: "Negative log-likelihood",
        meaning: "of text that goes on after the context, a token",
    },
    Known {
        name: "nll_more",
        title: "More than full prefill",
        meaning: "the same less that of full prefill, over the same text",
    },
    Known {
        name: "charged",
        title: "Computed",
        meaning: "rows of the context run through a layer, as a share of tokens times layers",
    },
    Known {
        name: "host_bytes",
        title: "Read from a cache",
        meaning: "KV read from a cache in host memory",
    },
    Known {
        name: "bits",
        title: "Stored",
        meaning: "bits of a KV value as it is stored",
    },
];

/// What gates ask: by the start of their name, the most particular one first.
pub(super) const GATES: &[(&str, &str)] = &[
    (
        "G0/layer0_keys",
        "keys of the first layer, moved to a new position, are those computed there",
    ),
    ("G0", "largest difference of a logit from full prefill"),
    (
        "G1",
        "exact match of full prefill: the model can do the task",
    ),
    (
        "G2/continuation",
        "keys at wrong positions make text after the context less likely than keys at right ones",
    ),
    (
        "G2/positions",
        "keys at wrong positions cost more exact match than keys at right ones",
    ),
    (
        "G3/hop1",
        "loss of naive reuse on the control, whose answers need only one chunk",
    ),
    (
        "G3/*/growth",
        "what more chunks add to the loss of naive reuse",
    ),
    (
        "G3",
        "loss of naive reuse on a task whose answers need several chunks",
    ),
    (
        "G6",
        "deviation of reused KV: in few tokens, and in the same ones from layer to layer",
    ),
];

/// Measures of KV statistics. Deviation is the squared difference of K and V
/// between chunks computed alone, keys moved, and full prefill.
pub(super) const LAYERS: &[Known] = &[
    Known {
        name: "mean_share",
        title: "Share of the mean",
        meaning: "share of the second moment that is the channels' means, which the measures below leave out",
    },
    Known {
        name: "outlier_ratio",
        title: "Outlier channels",
        meaning: "largest standard deviation of a channel over the median one",
    },
    Known {
        name: "kurtosis",
        title: "Excess kurtosis",
        meaning: "of all channels together",
    },
    Known {
        name: "kurtosis_channel",
        title: "Excess kurtosis, median channel",
        meaning: "of a channel by itself",
    },
    Known {
        name: "std",
        title: "Standard deviation",
        meaning: "of the values",
    },
    Known {
        name: "lag1",
        title: "Correlation with the token before",
        meaning: "of the values of neighbouring tokens",
    },
    Known {
        name: "lag1_delta",
        title: "Difference from the token before",
        meaning: "its variance over that of the values; 2 where tokens are independent",
    },
    Known {
        name: "anchor_delta",
        title: "Difference from an anchor",
        meaning: "the same, from the first of ten tokens",
    },
    Known {
        name: "predicted_bits",
        title: "Bits saved by prediction",
        meaning: "what predicting from the token before could save",
    },
    Known {
        name: "rope_ratio",
        title: "Variance without rotation",
        meaning: "over the variance of keys as they are stored",
    },
    Known {
        name: "channel_gain",
        title: "Gain of per-channel tables",
        meaning: "coding gain over one table",
    },
    Known {
        name: "klt_head",
        title: "KLT gain, head",
        meaning: "coding gain of a Karhunen–Loève transform of a head over per-channel tables",
    },
    Known {
        name: "klt_layer",
        title: "KLT gain, layer",
        meaning: "the same, of all heads of a layer together",
    },
    Known {
        name: "klt_pair",
        title: "KLT gain, two layers",
        meaning: "the same, of a layer and the next",
    },
    Known {
        name: "klt_head_held_out",
        title: "KLT gain, head, held out",
        meaning: "on contexts that the basis was not made of",
    },
    Known {
        name: "klt_layer_held_out",
        title: "KLT gain, layer, held out",
        meaning: "on contexts that the basis was not made of",
    },
    Known {
        name: "klt_pair_held_out",
        title: "KLT gain, two layers, held out",
        meaning: "on contexts that the basis was not made of",
    },
    Known {
        name: "sink",
        title: "Length of the first token",
        meaning: "of K or V at position 0, over that of the median token",
    },
    Known {
        name: "sink/chunk",
        title: "Length of chunks' first tokens",
        meaning: "over that of the median token, mean over chunks",
    },
    Known {
        name: "sink/chunk_max",
        title: "Length of a chunk's first token",
        meaning: "the same, of the chunk where it is largest",
    },
    Known {
        name: "rank_correlation",
        title: "Rank correlation of deviation",
        meaning: "Spearman correlation of the tokens' deviations with those in the next layer",
    },
    Known {
        name: "top5",
        title: "Deviation in the top 5 %",
        meaning: "share of all deviation that the 5 % of tokens with most of it hold",
    },
    Known {
        name: "top15",
        title: "Deviation in the top 15 %",
        meaning: "share of all deviation that the 15 % of tokens with most of it hold",
    },
    Known {
        name: "overlap15",
        title: "Overlap of the top 15 %",
        meaning: "share of these tokens that are among those of the mean over all later layers",
    },
];

/// Measures of KV statistics that are drawn.
pub(super) const DRAWN: [&str; 6] = [
    "rank_correlation",
    "top15",
    "klt_head_held_out",
    "klt_layer_held_out",
    "mean_share",
    "predicted_bits",
];

/// Rules of blending; `N` stands for a number.
pub(super) const RULES: &[(&str, &str)] = &[
    ("random", "tokens drawn at random"),
    ("first", "the first tokens of each chunk, as EPIC chooses"),
    (
        "graded",
        "those that changed most behind a strange text when the chunk was compiled, each as deep \
         as it did: what the engine does by default",
    ),
    ("graded-N", "`graded` with so many texts"),
    (
        "graded-N-N",
        "the same, and recorded in so many of the layers",
    ),
    (
        "probed",
        "those that changed most in layer 1 behind these texts, in all layers",
    ),
    ("probed-N", "the same by what changed in that layer"),
    (
        "oracle-N",
        "those whose K and V differ most from full prefill in that layer, which only a \
         measurement can know",
    ),
    (
        "hkvd-k",
        "as CacheBlend chooses: all tokens are computed up to layer 1, and go on if their K \
         differs most from the reused there",
    ),
    ("hkvd-v", "as `hkvd-k`, by V"),
    ("hkvd-kv", "as `hkvd-k`, by K and V"),
    (
        "hkvd-k-gradual",
        "`hkvd-k`, left ever fewer over two more layers",
    ),
    (
        "hkvd-v-gradual",
        "`hkvd-v`, left ever fewer over two more layers",
    ),
    (
        "hkvd-kv-gradual",
        "`hkvd-kv`, left ever fewer over two more layers",
    ),
    (
        "question",
        "those that the question attends to most, over all layers, as ProphetKV chooses",
    ),
    (
        "question-N",
        "those that the question attends to most in that layer",
    ),
    (
        "first-question",
        "the first 16 tokens of each chunk, then as `question`",
    ),
];

/// What a rule chooses, if it is known.
pub(super) fn rule(name: &str) -> Option<&'static str> {
    let numbered = name.rsplit_once('-').and_then(|(rule, number)| {
        let number: Result<u16, _> = number.parse();
        number.is_ok().then(|| format!("{rule}-N"))
    });
    let name = numbered.as_deref().unwrap_or(name);
    let known = RULES.iter().find(|(rule, _)| *rule == name);
    known.map(|(_, meaning)| *meaning)
}

/// What a gate asks, if it is known.
pub(super) fn gate(name: &str) -> Option<&'static str> {
    let names: Vec<&str> = name.split('/').collect();
    let fits = |pattern: &str| {
        let mut names = names.iter();
        pattern.split('/').all(|part| {
            names
                .next()
                .is_some_and(|name| part == "*" || part == *name)
        })
    };
    GATES
        .iter()
        .find(|(pattern, _)| fits(pattern))
        .map(|&(_, text)| text)
}

/// A measure of the list, if it is known.
pub(super) fn known(list: &'static [Known], name: &str) -> Option<&'static Known> {
    list.iter().find(|known| known.name == name)
}

/// A measure's heading; its name where it is not known.
pub(super) fn title(list: &'static [Known], name: &str) -> String {
    known(list, name).map_or_else(|| name.to_owned(), |known| known.title.to_owned())
}
