//! Logits, greedy tokens and KV against Hugging Face transformers.
//!
//! Each folder in `fixtures/` with a `reference.safetensors` holds a small
//! checkpoint and what transformers computes from it in f32 with eager
//! attention; `fixtures/README.md` lists their tensors.

#![expect(
    clippy::unwrap_used,
    reason = "a test; clippy exempts only functions marked as such"
)]

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use kvasir_engine::{
    BLOCK_TOKENS, BlockId, KvDtype, KvPool, LogitsWanted, Model, Pages, Positions, Scratch, Step,
    Threads,
};
use safetensors::{Dtype, SafeTensors};

/// Largest difference of a logit from transformers'.
const TOLERANCE: f32 = 1e-3;
const PROMPTS: usize = 6;
const GREEDY: usize = 12;

/// One fixture folder.
struct Fixture {
    name: String,
    model: Model,
    integers: BTreeMap<String, Vec<u32>>,
    floats: BTreeMap<String, Vec<f32>>,
}

impl Fixture {
    fn load(dir: &Path) -> Self {
        let bytes = std::fs::read(dir.join("reference.safetensors")).unwrap();
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        let (mut integers, mut floats) = (BTreeMap::new(), BTreeMap::new());
        for (name, view) in tensors.tensors() {
            let data = view.data();
            match view.dtype() {
                Dtype::I64 => {
                    let ids = data.as_chunks().0.iter().map(|&id| i64::from_le_bytes(id));
                    integers.insert(name, ids.map(|id| id.try_into().unwrap()).collect());
                }
                Dtype::F32 => {
                    let values = data.as_chunks().0.iter().map(|&x| f32::from_le_bytes(x));
                    floats.insert(name, values.collect());
                }
                other => panic!("{name} is {other:?}"),
            }
        }
        let name = dir.file_name().unwrap().to_string_lossy().into_owned();
        let model = Model::load(dir).unwrap_or_else(|error| panic!("{name}: {error:?}"));
        Self {
            name,
            model,
            integers,
            floats,
        }
    }

    /// All of them; at least one of each family.
    fn all() -> Vec<Self> {
        let root = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("fixtures");
        let mut dirs: Vec<PathBuf> = std::fs::read_dir(&root)
            .unwrap_or_else(|error| panic!("{}: {error}", root.display()))
            .map(|entry| entry.unwrap().path())
            .filter(|dir| dir.join("reference.safetensors").exists())
            .collect();
        dirs.sort();
        let fixtures: Vec<Self> = dirs.iter().map(|dir| Self::load(dir)).collect();
        for family in ["llama", "mistral", "qwen2", "qwen3"] {
            assert!(
                fixtures
                    .iter()
                    .any(|fixture| fixture.name.starts_with(family)),
                "{family}"
            );
        }
        fixtures
    }

    fn prompt(&self, index: usize) -> &[u32] {
        &self.integers[&format!("prompt.{index}")]
    }

    fn greedy(&self, index: usize) -> &[u32] {
        &self.integers[&format!("greedy.{index}")]
    }

    fn step_logits(&self, index: usize, step: usize) -> &[f32] {
        let vocab = self.model.config().vocab_size;
        &self.floats[&format!("step_logits.{index}")][step * vocab..][..vocab]
    }

    fn check(&self, what: &str, found: &[f32], expected: &[f32]) {
        assert_eq!(found.len(), expected.len(), "{}: {what}", self.name);
        let worst = found
            .iter()
            .zip(expected)
            .map(|(a, b)| (a - b).abs())
            .fold(0.0, f32::max);
        assert!(worst <= TOLERANCE, "{}: {what}: off by {worst}", self.name);
    }
}

/// Pages and buffers for some sequences of up to 192 tokens.
struct Engine<'a> {
    model: &'a Model,
    pool: KvPool,
    scratch: Scratch,
    tables: Vec<Vec<BlockId>>,
}

impl<'a> Engine<'a> {
    fn new(model: &'a Model, sequences: usize) -> Self {
        let pages = 192 / BLOCK_TOKENS;
        let mut pool = KvPool::new(model.config(), sequences * pages, KvDtype::F32);
        // Pages of all sequences interleaved, and in no order.
        let mut tables = vec![Vec::new(); sequences];
        for _ in 0..pages {
            for table in tables.iter_mut().rev() {
                table.push(pool.alloc().unwrap());
            }
        }
        let scratch = Scratch::new(Threads::new(2).unwrap());
        Self {
            model,
            pool,
            scratch,
            tables,
        }
    }

    /// Runs a batch of `(sequence, position, tokens)`; last logits of each.
    fn run(&mut self, batch: &[(usize, usize, &[u32])]) -> Vec<Vec<f32>> {
        let logits = self.run_rows(batch, LogitsWanted::Last);
        logits
            .into_iter()
            .map(|mut rows| rows.pop().unwrap())
            .collect()
    }

    fn run_rows(
        &mut self,
        batch: &[(usize, usize, &[u32])],
        logits: LogitsWanted,
    ) -> Vec<Vec<Vec<f32>>> {
        self.run_over(batch, logits, &Pages::All)
    }

    /// As [`Self::run_rows`], every step and layer over the same pages.
    fn run_over(
        &mut self,
        batch: &[(usize, usize, &[u32])],
        logits: LogitsWanted,
        pages: &Pages,
    ) -> Vec<Vec<Vec<f32>>> {
        let steps: Vec<Step<'_>> = batch
            .iter()
            .map(|&(sequence, position, tokens)| Step {
                tokens,
                positions: Positions::From(position),
                blocks: &self.tables[sequence],
                logits,
            })
            .collect();
        let found = self
            .model
            .forward(&mut self.pool, &mut self.scratch, &steps, &mut |before| {
                before.pages.fill(pages.clone());
                ControlFlow::Continue(())
            })
            .unwrap();
        (0..steps.len())
            .map(|step| found.rows(step).map(<[f32]>::to_vec).collect())
            .collect()
    }
}

fn argmax(logits: &[f32]) -> u32 {
    let best = (0..logits.len())
        .max_by(|&a, &b| logits[a].total_cmp(&logits[b]))
        .unwrap();
    u32::try_from(best).unwrap()
}

#[test]
fn prompts_and_greedy_continuations_alone() {
    for fixture in Fixture::all() {
        for prompt in 0..PROMPTS {
            let mut engine = Engine::new(&fixture.model, 1);
            let tokens = fixture.prompt(prompt);
            let mut logits = engine.run(&[(0, 0, tokens)]).remove(0);
            fixture.check(
                &format!("prompt {prompt}"),
                &logits,
                &fixture.floats[&format!("logits.{prompt}")],
            );
            for (step, &expected) in fixture.greedy(prompt).iter().enumerate() {
                let what = format!("prompt {prompt}, step {step}");
                fixture.check(&what, &logits, fixture.step_logits(prompt, step));
                assert_eq!(argmax(&logits), expected, "{}: {what}", fixture.name);
                logits = engine
                    .run(&[(0, tokens.len() + step, &[expected])])
                    .remove(0);
            }
        }
    }
}

/// All prompts in one batch, then all decoding together, while the longest
/// prompt is still being prefilled in parts.
#[test]
fn prompts_and_greedy_continuations_together() {
    for fixture in Fixture::all() {
        let mut engine = Engine::new(&fixture.model, PROMPTS);
        let prompts: Vec<&[u32]> = (0..PROMPTS).map(|prompt| fixture.prompt(prompt)).collect();
        let batch: Vec<_> = (0..PROMPTS)
            .map(|prompt| (prompt, 0, prompts[prompt]))
            .collect();
        let mut logits = engine.run(&batch);
        for step in 0..GREEDY {
            let next: Vec<u32> = logits.iter().map(|logits| argmax(logits)).collect();
            for (prompt, (logits, &next)) in logits.iter().zip(&next).enumerate() {
                let what = format!("prompt {prompt}, step {step}, batched");
                fixture.check(&what, logits, fixture.step_logits(prompt, step));
                assert_eq!(
                    next,
                    fixture.greedy(prompt)[step],
                    "{}: {what}",
                    fixture.name
                );
            }
            let batch: Vec<_> = (0..PROMPTS)
                .map(|prompt| (prompt, prompts[prompt].len() + step, &next[prompt..=prompt]))
                .collect();
            logits = engine.run(&batch);
        }
    }
}

/// However a prompt is cut, and whatever runs beside it: the same bits.
#[test]
fn cuts_and_company_change_no_bit() {
    for fixture in Fixture::all() {
        for prompt in 1..PROMPTS {
            let tokens = fixture.prompt(prompt);
            let whole = Engine::new(&fixture.model, 1)
                .run(&[(0, 0, tokens)])
                .remove(0);
            let rows = Engine::new(&fixture.model, 1)
                .run_rows(&[(0, 0, tokens)], LogitsWanted::All)
                .remove(0);
            assert_eq!(rows.last(), Some(&whole), "{}: all rows", fixture.name);
            for part in [1, 3, 7, 16, 37, 64] {
                let mut engine = Engine::new(&fixture.model, 2);
                let mut all = Vec::new();
                for (index, part_tokens) in tokens.chunks(part).enumerate() {
                    let beside = fixture.prompt(index % PROMPTS);
                    let batch = [(1, 0, beside), (0, index * part, part_tokens)];
                    // Alone and beside another prompt, by turns.
                    let batch = &batch[index % 2..];
                    all.extend(engine.run_rows(batch, LogitsWanted::All).pop().unwrap());
                }
                assert_eq!(
                    all, rows,
                    "{}: prompt {prompt} in parts of {part}",
                    fixture.name
                );
            }
        }
    }
}

#[test]
fn every_row_of_a_prompt() {
    for fixture in Fixture::all() {
        let rows = Engine::new(&fixture.model, 1)
            .run_rows(&[(0, 0, fixture.prompt(1))], LogitsWanted::All)
            .remove(0);
        fixture.check("every row", &rows.concat(), &fixture.floats["logits_all.1"]);
    }
}

/// K after RoPE, in the order `[kv_head][token][head_dim]`.
#[test]
fn pages_hold_what_transformers_caches() {
    let mut compared = 0;
    for fixture in Fixture::all() {
        let tokens = fixture.prompt(3);
        let mut engine = Engine::new(&fixture.model, 1);
        engine.run(&[(0, 0, tokens)]);
        for layer in 0..fixture.model.config().layers {
            let Some(k) = fixture.floats.get(&format!("k.{layer}")) else {
                continue;
            };
            let mut bytes = vec![0; engine.pool.layer_bytes(tokens.len())];
            engine
                .pool
                .read_layer(&engine.tables[0], 0, tokens.len(), layer, &mut bytes)
                .unwrap();
            let values: Vec<f32> = bytes
                .as_chunks()
                .0
                .iter()
                .map(|&b| f32::from_le_bytes(b))
                .collect();
            let expected = [&k[..], &fixture.floats[&format!("v.{layer}")]].concat();
            fixture.check(&format!("pages of layer {layer}"), &values, &expected);
            compared += 1;
        }
    }
    assert!(compared >= 2, "fixtures with K and V");
}

/// A prefix landed layer by layer, as from the cache: the same bits as computed.
#[test]
fn landed_prefixes_change_no_bit() {
    for fixture in Fixture::all() {
        let tokens = fixture.prompt(5);
        let mut source = Engine::new(&fixture.model, 1);
        let computed = source.run(&[(0, 0, tokens)]).remove(0);
        for prefix in [16, 48, 149] {
            let mut engine = Engine::new(&fixture.model, 1);
            let table = engine.tables[0].clone();
            let step = Step {
                tokens: &tokens[prefix..],
                positions: Positions::From(prefix),
                blocks: &table,
                logits: LogitsWanted::Last,
            };
            let mut payload = vec![0; source.pool.layer_bytes(prefix)];
            let logits = fixture
                .model
                .forward(
                    &mut engine.pool,
                    &mut engine.scratch,
                    &[step],
                    &mut |before| {
                        let from = &source.tables[0];
                        source
                            .pool
                            .read_layer(from, 0, prefix, before.layer, &mut payload)
                            .unwrap();
                        let pool = before.pool;
                        pool.write_layer(&table, 0, prefix, before.layer, &payload)
                            .unwrap();
                        ControlFlow::Continue(())
                    },
                )
                .unwrap();
            assert_eq!(
                logits.last(0),
                Some(&computed[..]),
                "{}: {prefix}",
                fixture.name
            );
        }
    }
}

/// 16-bit pages stay near, and the stored bytes are what attention reads.
#[test]
fn sixteen_bit_pages_are_close() {
    for fixture in Fixture::all() {
        for (dtype, tolerance) in [(KvDtype::Bf16, 0.5), (KvDtype::F16, 0.05)] {
            let mut engine = Engine::new(&fixture.model, 1);
            engine.pool = KvPool::new(fixture.model.config(), 192 / BLOCK_TOKENS, dtype);
            let logits = engine.run(&[(0, 0, fixture.prompt(4))]).remove(0);
            let expected = &fixture.floats["logits.4"];
            let worst = logits
                .iter()
                .zip(expected)
                .map(|(a, b)| (a - b).abs())
                .fold(0.0, f32::max);
            assert!(
                worst < tolerance,
                "{}: {dtype:?}: off by {worst}",
                fixture.name
            );
        }
    }
}

/// Every page named instead of none, in one step and in several, beside others: the same
/// bits. So are steps of all tokens with no page named, which see their own rows.
#[test]
fn all_pages_chosen_change_no_bit() {
    for fixture in Fixture::all() {
        let heads = fixture.model.config().kv_heads;
        let every = Pages::Chosen(vec![(0..12).rev().chain(3..40).collect(); heads]);
        let none = Pages::Chosen(Vec::new());
        let tokens = fixture.prompt(5);
        let cut = tokens.len() - 40;
        for dtype in [KvDtype::F32, KvDtype::Bf16, KvDtype::F16] {
            let run = |parts: &[(usize, &[u32])], logits, pages: &Pages| {
                let mut engine = Engine::new(&fixture.model, 2);
                engine.pool = KvPool::new(fixture.model.config(), 2 * 192 / BLOCK_TOKENS, dtype);
                let beside = (1, 0, fixture.prompt(2));
                let steps = parts.iter().map(|&(at, tokens)| (0, at, tokens));
                steps
                    .flat_map(|step| engine.run_over(&[step, beside], logits, pages).remove(0))
                    .collect::<Vec<_>>()
            };
            let parts = [(0, &tokens[..cut]), (cut, &tokens[cut..])];
            let full = run(&parts, LogitsWanted::All, &Pages::All);
            let name = &fixture.name;
            assert_eq!(
                run(&parts, LogitsWanted::All, &every),
                full,
                "{name}: {dtype:?}"
            );
            let whole = run(&[(0, tokens)], LogitsWanted::Last, &none);
            assert_eq!(whole.last(), full.last(), "{name}: {dtype:?}, own rows");
        }
    }
}

/// Pages that are not chosen are not read, by any layer, whatever they hold.
#[test]
fn pages_that_are_not_chosen_do_not_matter() {
    for fixture in Fixture::all() {
        let config = fixture.model.config();
        let tokens = fixture.prompt(5);
        let (last, context) = tokens.split_last().unwrap();
        let chosen = |pages: &[u32]| Pages::Chosen(vec![pages.to_vec(); config.kv_heads]);
        let decode = |poisoned: &[usize], pages: &Pages| {
            let mut engine = Engine::new(&fixture.model, 1);
            engine.run(&[(0, 0, context)]);
            let table = engine.tables[0].clone();
            for (page, layer) in poisoned
                .iter()
                .flat_map(|page| (0..config.layers).map(move |layer| (page, layer)))
            {
                let nan = f32::NAN
                    .to_le_bytes()
                    .repeat(engine.pool.layer_bytes(16) / 4);
                let written = engine.pool.write_layer(&table, page * 16, 16, layer, &nan);
                written.unwrap();
            }
            let step = [(0, context.len(), std::slice::from_ref(last))];
            let rows = engine.run_over(&step, LogitsWanted::All, pages);
            rows.concat().concat()
        };
        let some = decode(&[], &chosen(&[0, 2, 5]));
        assert!(
            some.iter().all(|logit| logit.is_finite()),
            "{}",
            fixture.name
        );
        assert_ne!(some, decode(&[], &Pages::All), "{}", fixture.name);
        let poisoned = decode(&[1, 3, 4, 6], &chosen(&[5, 0, 2, 2, 99]));
        assert_eq!(some, poisoned, "{}", fixture.name);
    }
}
