//! What errors in keys and values do to what attention adds to the residual stream.
//!
//! To first order, an error `e` in the key of token `j` changes the output of query `i` in a
//! head by `a (q·e) W (v − o) / √d`: with the weight `a` that the token has there, its value
//! `v`, the head's output `o` and projection `W`; `q` as RoPE turns it against the token's
//! position. An error `e` in its value changes it by `a W e`. The expected squares of these are
//! `eᵀ M e`; a [`Metric`] is these matrices, over all queries of the contexts it has seen.
//! Those of values also have the products between the KV heads that share a basis; those of
//! keys do not.
//!
//! So much is a property of one layer. What a layer's errors become in the layers after it is
//! for `kvasir-bench quality --sensitivity` to measure.

use kvasir_engine::ModelConfig;
use kvasir_engine::kernels::{Isa, rotate};
use kvasir_engine::rope::Frequencies;
use nalgebra::{DMatrix, DMatrixView};

use super::PROTECTED;
use crate::quality::reader::{Kv, Queries};

/// By layer: of all channels of its keys, and of its values, in the order of heads.
#[derive(Clone, Debug)]
pub(super) struct Metric {
    pub(super) layers: Vec<[DMatrix<f32>; 2]>,
}

/// One layer of a context. Tokens are columns.
struct Layer<'a> {
    config: &'a ModelConfig,
    frequencies: &'a Frequencies,
    /// After RoPE, by query head.
    queries: Vec<DMatrix<f32>>,
    /// After RoPE, by KV head.
    keys: Vec<DMatrix<f32>>,
    values: Vec<DMatrix<f32>>,
    /// By query head.
    projections: &'a [DMatrix<f32>],
    window: usize,
}

impl Metric {
    pub(super) fn new(config: &ModelConfig) -> Self {
        let channels = config.kv_heads * config.head_dim;
        let zeros = || DMatrix::zeros(channels, channels);
        Self {
            layers: (0..config.layers).map(|_| [zeros(), zeros()]).collect(),
        }
    }

    /// Adds a context that begins at position 0. `projections` are those of the query heads,
    /// by layer.
    pub(super) fn add(
        &mut self,
        config: &ModelConfig,
        projections: &[Vec<DMatrix<f32>>],
        kv: &Kv,
        queries: &Queries,
    ) {
        let frequencies = &config.rope.frequencies(config.head_dim);
        let layer = |at: usize| {
            let (dim, tokens) = (config.head_dim, kv.tokens);
            let heads = |range: std::ops::Range<usize>| {
                let of_layer = &kv.layers[at];
                let head = |head| &of_layer[head * tokens * dim..][..tokens * dim];
                let heads = range.map(|it| DMatrix::from_column_slice(dim, tokens, head(it)));
                heads.collect()
            };
            let rows = DMatrix::from_column_slice(config.heads * dim, tokens, &queries.layers[at]);
            let queries = (0..config.heads).map(|head| rows.rows(head * dim, dim).into_owned());
            Layer {
                config,
                frequencies,
                queries: queries.collect(),
                keys: heads(0..config.kv_heads),
                values: heads(config.kv_heads..2 * config.kv_heads),
                projections: &projections[at],
                window: config.windows[at].unwrap_or(usize::MAX),
            }
        };
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let share = self.layers.len().div_ceil(cores);
        std::thread::scope(|scope| {
            for (worker, metrics) in self.layers.chunks_mut(share).enumerate() {
                let layer = &layer;
                scope.spawn(move || {
                    for (at, metric) in (worker * share..).zip(metrics) {
                        layer(at).add(metric);
                    }
                });
            }
        });
    }
}

impl Layer<'_> {
    fn add(&self, [of_keys, of_values]: &mut [DMatrix<f32>; 2]) {
        let dim = self.config.head_dim;
        let group = self.config.heads / self.config.kv_heads;
        let weights: Vec<DMatrix<f32>> = (0..self.config.heads)
            .map(|head| self.weights(head))
            .collect();
        for (head, weights) in weights.iter().enumerate() {
            let kv_head = head / group;
            let mut block = of_keys.view_mut((kv_head * dim, kv_head * dim), (dim, dim));
            block += self.of_keys(head, weights);
        }
        // Tokens that are protected have no errors.
        let first = PROTECTED.min(weights[0].nrows());
        let others = weights[0].nrows() - first;
        for (a, of_a) in weights.iter().enumerate() {
            for (b, of_b) in weights.iter().enumerate() {
                let together = of_a.rows(first, others).dot(&of_b.rows(first, others));
                let block = self.projections[a].tr_mul(&self.projections[b]) * together;
                let place = (a / group * dim, b / group * dim);
                let mut sum = of_values.view_mut(place, (dim, dim));
                sum += block;
            }
        }
    }

    /// What each query, a column, gives each key, a row.
    fn weights(&self, head: usize) -> DMatrix<f32> {
        let group = self.config.heads / self.config.kv_heads;
        #[expect(clippy::cast_precision_loss, reason = "channels of a head")]
        let scale = 1.0 / (self.config.head_dim as f32).sqrt();
        let mut scores = self.keys[head / group].tr_mul(&self.queries[head]) * scale;
        for (query, mut column) in scores.column_iter_mut().enumerate() {
            let first = (query + 1).saturating_sub(self.window);
            let most = column.rows_range(first..=query).max();
            for (key, score) in column.iter_mut().enumerate() {
                let sees = (first..=query).contains(&key);
                *score = if sees { (*score - most).exp() } else { 0.0 };
            }
            let sum = column.sum();
            column /= sum;
        }
        scores
    }

    fn of_keys(&self, head: usize, weights: &DMatrix<f32>) -> DMatrix<f32> {
        let dim = self.config.head_dim;
        let group = self.config.heads / self.config.kv_heads;
        let values = &self.projections[head] * &self.values[head / group];
        let outputs = &values * weights;
        let lengths = |matrix: &DMatrix<f32>| -> Vec<f32> {
            matrix.column_iter().map(|it| it.norm_squared()).collect()
        };
        let (of_values, of_outputs) = (lengths(&values), lengths(&outputs));
        // By key, a row, and query.
        let products = values.tr_mul(&outputs);
        let queries = &self.queries[head];
        let mut sum = DMatrix::zeros(dim, dim);
        let (mut cos, mut sin) = (vec![0.0; dim / 2], vec![0.0; dim / 2]);
        for key in (PROTECTED..weights.nrows()).step_by(EVERY) {
            let seen = key..(key.saturating_add(self.window)).min(weights.ncols());
            let mut scaled = queries.columns_range(seen.clone()).into_owned();
            for (query, mut column) in seen.clone().zip(scaled.column_iter_mut()) {
                let apart = of_values[key] + of_outputs[query] - 2.0 * products[(key, query)];
                let weight = weights[(key, query)];
                column *= weight * weight * apart.max(0.0);
            }
            let view: DMatrixView<'_, f32> = queries.columns_range(seen);
            let mut at_key = scaled * view.transpose();
            // Both sides back to position 0, where keys are without RoPE.
            self.frequencies.shift(key, 0, &mut cos, &mut sin);
            for _ in 0..2 {
                for column in at_key.as_mut_slice().chunks_exact_mut(dim) {
                    rotate(Isa::detect(), column, &cos, &sin);
                }
                at_key.transpose_mut();
            }
            sum += at_key;
        }
        #[expect(clippy::cast_precision_loss, reason = "channels of a head")]
        let scale = EVERY as f32 / dim as f32;
        sum * scale
    }
}

/// Keys that are looked at: one in so many.
const EVERY: usize = 8;

#[cfg(test)]
mod tests {
    use rand::{Rng as _, SeedableRng as _};
    use rand_chacha::ChaCha8Rng;

    use super::*;

    const DIM: usize = 4;
    const HIDDEN: usize = 8;
    /// So many that one key is looked at.
    const TOKENS: usize = PROTECTED + EVERY;

    struct Context {
        kv: Kv,
        queries: Queries,
        projections: Vec<Vec<DMatrix<f32>>>,
        config: ModelConfig,
    }

    fn context(heads: usize, kv_heads: usize) -> Context {
        let config = serde_json::json!({
            "architectures": ["LlamaForCausalLM"],
            "hidden_size": HIDDEN * heads,
            "intermediate_size": 8,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": DIM,
            "num_hidden_layers": 1,
            "vocab_size": 8,
            "max_position_embeddings": 64,
            "rms_norm_eps": 1e-5,
            "rope_theta": 100.0,
            "eos_token_id": 2,
        });
        let config = ModelConfig::from_json(config.to_string().as_bytes()).unwrap();
        let mut random = ChaCha8Rng::seed_from_u64(3);
        let mut numbers = |count: usize| -> Vec<f32> {
            (0..count).map(|_| random.random_range(-1.5..1.5)).collect()
        };
        let kv = Kv {
            tokens: TOKENS,
            layers: vec![numbers(2 * kv_heads * TOKENS * DIM)],
        };
        let queries = Queries {
            layers: vec![numbers(TOKENS * heads * DIM)],
        };
        let projection = |_| DMatrix::from_vec(HIDDEN, DIM, numbers(HIDDEN * DIM));
        let projections = vec![(0..heads).map(projection).collect()];
        Context {
            kv,
            queries,
            projections,
            config,
        }
    }

    impl Context {
        fn metric(&self) -> [DMatrix<f32>; 2] {
            let mut metric = Metric::new(&self.config);
            metric.add(&self.config, &self.projections, &self.kv, &self.queries);
            metric.layers.remove(0)
        }

        /// What attention adds to the residual stream, a column a token.
        fn output(&self, kv: &Kv) -> DMatrix<f32> {
            let (heads, kv_heads) = (self.config.heads, self.config.kv_heads);
            let mut sum = DMatrix::zeros(HIDDEN, TOKENS);
            for head in 0..heads {
                let rows =
                    |at: usize, token: usize| &kv.layers[0][(at * TOKENS + token) * DIM..][..DIM];
                let kv_head = head / (heads / kv_heads);
                for query in 0..TOKENS {
                    let q = &self.queries.layers[0][(query * heads + head) * DIM..][..DIM];
                    let score = |key: usize| -> f32 {
                        let products = q.iter().zip(rows(kv_head, key)).map(|(a, b)| a * b);
                        (products.sum::<f32>() / (DIM as f32).sqrt()).exp()
                    };
                    let scores: Vec<f32> = (0..=query).map(score).collect();
                    let all: f32 = scores.iter().sum();
                    let mut attended = DMatrix::zeros(DIM, 1);
                    for (key, score) in scores.iter().enumerate() {
                        let value = rows(kv_heads + kv_head, key);
                        attended += DMatrix::from_column_slice(DIM, 1, value) * (score / all);
                    }
                    let mut column = sum.column_mut(query);
                    column += (&self.projections[0][head] * attended).column(0);
                }
            }
            sum
        }

        /// The square of what an error in one row does to all outputs, for its own square.
        fn harm(&self, row: usize, token: usize, error: &[f32]) -> f32 {
            const SMALL: f32 = 1e-2;
            let moved = |sign: f32| {
                let mut kv = self.kv.clone();
                let place = &mut kv.layers[0][(row * TOKENS + token) * DIM..][..DIM];
                for (value, error) in place.iter_mut().zip(error) {
                    *value += sign * SMALL * error;
                }
                self.output(&kv)
            };
            ((moved(1.0) - moved(-1.0)) / (2.0 * SMALL)).norm_squared()
        }
    }

    fn square(metric: &DMatrix<f32>, error: &[f32]) -> f32 {
        let error = DMatrix::from_column_slice(error.len(), 1, error);
        (error.transpose() * metric * &error)[(0, 0)]
    }

    #[test]
    fn errors_in_keys_do_what_the_metric_says() {
        let context = context(1, 1);
        let [keys, _] = context.metric();
        for error in [
            [1.0, 0.0, 0.0, 0.0],
            [0.0, 0.3, 0.0, -1.0],
            [0.5, 0.5, -0.7, 0.1],
        ] {
            // Of a key before RoPE.
            let (mut cos, mut sin) = ([0.0; DIM / 2], [0.0; DIM / 2]);
            let frequencies = context.config.rope.frequencies(DIM);
            frequencies.shift(0, PROTECTED, &mut cos, &mut sin);
            let mut turned = error;
            rotate(Isa::detect(), &mut turned, &cos, &sin);
            let found = context.harm(0, PROTECTED, &turned) * EVERY as f32;
            let said = square(&keys, &error);
            assert!((found / said - 1.0).abs() < 0.01, "{found} {said}");
        }
    }

    #[test]
    fn errors_in_values_do_what_the_metric_says() {
        for heads in [1, 2] {
            let context = context(2 * heads, heads);
            let [_, values] = context.metric();
            let error: Vec<f32> = (0..heads * DIM).map(|at| at as f32 - 2.5).collect();
            // Outputs are linear in values, and errors of two tokens have nothing in common.
            let mut found = 0.0;
            for token in PROTECTED..TOKENS {
                let mut moved = context.kv.clone();
                for (head, error) in error.chunks(DIM).enumerate() {
                    let at = ((heads + head) * TOKENS + token) * DIM;
                    for (value, error) in moved.layers[0][at..].iter_mut().zip(error) {
                        *value += error;
                    }
                }
                found += (context.output(&moved) - context.output(&context.kv)).norm_squared();
            }
            let said = square(&values, &error);
            assert!((found / said - 1.0).abs() < 0.01, "{found} {said}");
        }
    }
}
