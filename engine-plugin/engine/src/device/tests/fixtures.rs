//! Whole models: every fixture, beside the CPU's engine with pages of the same type.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use safetensors::{Dtype, SafeTensors};

use super::super::{BeforeDeviceLayer, DeviceModel, DevicePool, DeviceScratch};
use super::{Device, also_late, difference, on_both};
use crate::kernels::Threads;
use crate::kv::{BLOCK_TOKENS, BlockId, KvDtype, KvPool};
use crate::model::{
    BeforeLayer, Fate, ForwardError, LogitsWanted, Model, Pages, Positions, Scratch, Step,
};

/// Largest difference of a logit from the CPU's, with weights and pages of f32. Logits have a
/// standard deviation of 2 to 3.6; two that are chosen from differ by 4e-3 at least.
const TOLERANCE: f32 = 5e-5;
const PROMPTS: usize = 6;
const GREEDY: usize = 12;
const PAGES: usize = 192 / BLOCK_TOKENS;

struct Fixture {
    name: String,
    dir: PathBuf,
    model: Model,
    prompts: Vec<Vec<u32>>,
}

impl Fixture {
    fn load(dir: &Path) -> Self {
        let bytes = std::fs::read(dir.join("reference.safetensors")).unwrap();
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        let prompts = (0..PROMPTS).map(|prompt| {
            let view = tensors.tensor(&format!("prompt.{prompt}")).unwrap();
            assert_eq!(view.dtype(), Dtype::I64);
            let ids = view.data().as_chunks().0.iter();
            let ids = ids.map(|&id| u32::try_from(i64::from_le_bytes(id)).unwrap());
            ids.collect()
        });
        Self {
            name: dir.file_name().unwrap().to_string_lossy().into_owned(),
            prompts: prompts.collect(),
            model: Model::load(dir).unwrap(),
            dir: dir.to_owned(),
        }
    }

    fn all() -> Vec<Self> {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures");
        let mut dirs: Vec<PathBuf> = std::fs::read_dir(&root)
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .filter(|dir| dir.join("reference.safetensors").exists())
            .collect();
        dirs.sort();
        assert!(dirs.len() >= 12, "{dirs:?}");
        dirs.iter().map(|dir| Self::load(dir)).collect()
    }

    fn named(names: &[&str]) -> Vec<Self> {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures");
        names
            .iter()
            .map(|name| Self::load(&root.join(name)))
            .collect()
    }
}

/// Both engines, with the same page tables.
struct Pair<'a> {
    fixture: &'a Fixture,
    model: DeviceModel,
    pool: DevicePool,
    scratch: DeviceScratch,
    cpu_pool: KvPool,
    cpu_scratch: Scratch,
    tables: Vec<Vec<BlockId>>,
}

type Rows = Vec<Vec<f32>>;

impl<'a> Pair<'a> {
    fn new(
        device: &Device,
        fixture: &'a Fixture,
        sequences: usize,
        weights: KvDtype,
        pages: KvDtype,
    ) -> Self {
        let model = DeviceModel::load(device, &fixture.dir, weights).unwrap();
        assert_eq!(model.weights_digest(), fixture.model.weights_digest());
        let config = fixture.model.config();
        let mut pool = DevicePool::new(device, config, sequences * PAGES, pages).unwrap();
        // Pages of all sequences interleaved, and in no order.
        let mut tables = vec![Vec::new(); sequences];
        for _ in 0..PAGES {
            for table in tables.iter_mut().rev() {
                table.push(pool.alloc().unwrap());
            }
        }
        Self {
            fixture,
            model,
            pool,
            scratch: DeviceScratch::new(device),
            cpu_pool: KvPool::new(config, sequences * PAGES, pages),
            cpu_scratch: Scratch::new(Threads::new(1).unwrap()),
            tables,
        }
    }

    fn exact(device: &Device, fixture: &'a Fixture, sequences: usize) -> Self {
        Self::new(device, fixture, sequences, KvDtype::F32, KvDtype::F32)
    }

    /// Runs steps on both; rows of all steps, ours and the CPU's.
    fn run(&mut self, steps: &[(usize, Positions<'_>, &[u32])], logits: LogitsWanted) -> [Rows; 2] {
        let go_on = |_: BeforeDeviceLayer<'_>| ControlFlow::Continue(());
        let cpu_goes_on = |_: BeforeLayer<'_>| ControlFlow::Continue(());
        self.run_with(steps, logits, go_on, cpu_goes_on)
    }

    fn run_with(
        &mut self,
        steps: &[(usize, Positions<'_>, &[u32])],
        logits: LogitsWanted,
        mut before: impl FnMut(BeforeDeviceLayer<'_>) -> ControlFlow<()>,
        mut cpu_before: impl FnMut(BeforeLayer<'_>) -> ControlFlow<()> + Send,
    ) -> [Rows; 2] {
        let steps: Vec<Step<'_>> = steps
            .iter()
            .map(|&(sequence, positions, tokens)| Step {
                tokens,
                positions,
                blocks: &self.tables[sequence],
                logits,
            })
            .collect();
        let found = self
            .model
            .forward(&mut self.pool, &mut self.scratch, &steps, &mut before)
            .unwrap();
        let expected = self
            .fixture
            .model
            .forward(
                &mut self.cpu_pool,
                &mut self.cpu_scratch,
                &steps,
                &mut cpu_before,
            )
            .unwrap();
        [found, expected].map(|logits| {
            let rows = (0..steps.len()).flat_map(|step| logits.rows(step));
            rows.map(<[f32]>::to_vec).collect()
        })
    }

    fn check(&self, what: &str, [found, expected]: [Rows; 2]) -> f32 {
        let worst = difference(&found.concat(), &expected.concat());
        let name = &self.fixture.name;
        assert!(worst <= TOLERANCE, "{name}: {what}: off by {worst}");
        worst
    }

    fn read(&self, sequence: usize, tokens: usize, layer: usize) -> [Vec<u8>; 2] {
        let table = &self.tables[sequence];
        let mut both = [(); 2].map(|()| vec![0; self.cpu_pool.layer_bytes(tokens)]);
        let [found, expected] = &mut both;
        self.pool
            .read_layer(table, 0, tokens, layer, found)
            .unwrap();
        let read = self.cpu_pool.read_layer(table, 0, tokens, layer, expected);
        read.unwrap();
        both
    }
}

fn argmax(logits: &[f32]) -> u32 {
    let best = (0..logits.len())
        .rev()
        .max_by(|&a, &b| logits[a].total_cmp(&logits[b]));
    u32::try_from(best.unwrap()).unwrap()
}

/// All prompts in one batch, then all decoding together: logits, tokens, and what the pages hold.
fn prompts_and_continuations_are_the_cpus(device: &Device) {
    for fixture in Fixture::all() {
        let mut pair = Pair::exact(device, &fixture, PROMPTS);
        let prompts: Vec<_> = (0..PROMPTS)
            .map(|at| (at, Positions::From(0), &fixture.prompts[at][..]))
            .collect();
        let mut both = pair.run(&prompts, LogitsWanted::Last);
        for step in 0..GREEDY {
            let next: Vec<[u32; 2]> = (0..PROMPTS)
                .map(|at| [&both[0], &both[1]].map(|rows| argmax(&rows[at])))
                .collect();
            pair.check(&format!("step {step}"), both);
            assert!(
                next.iter().all(|[a, b]| a == b),
                "{}: {next:?}",
                fixture.name
            );
            let batch: Vec<_> = (0..PROMPTS)
                .map(|at| {
                    let position = Positions::From(fixture.prompts[at].len() + step);
                    (at, position, &next[at][..1])
                })
                .collect();
            both = pair.run(&batch, LogitsWanted::Last);
        }
        pair.check("the last step", both);
        for (at, prompt) in fixture.prompts.iter().enumerate() {
            for layer in 0..fixture.model.config().layers {
                let [found, expected] = pair.read(at, prompt.len() + GREEDY, layer);
                let [found, expected] = [found, expected].map(|bytes| {
                    let values = bytes.as_chunks().0.iter().map(|&b| f32::from_le_bytes(b));
                    values.collect::<Vec<f32>>()
                });
                let worst = difference(&found, &expected);
                assert!(worst < 2e-5, "{}: pages of {at}: {worst}", fixture.name);
            }
        }
    }
}

/// However a prompt is cut, and whatever runs beside it; every row.
fn parts_of_prompts_are_the_cpus(device: &Device) {
    for fixture in Fixture::all() {
        let tokens = &fixture.prompts[5];
        for part in [5, 37] {
            let mut pair = Pair::exact(device, &fixture, 2);
            for (index, part_tokens) in tokens.chunks(part).enumerate().take(6) {
                let beside = (1, Positions::From(0), &fixture.prompts[index % 4][..]);
                let step = (0, Positions::From(index * part), part_tokens);
                let batch = [beside, step];
                let both = pair.run(&batch[index % 2..], LogitsWanted::All);
                pair.check(&format!("part {index} of {part}"), both);
            }
        }
    }
}

/// Some tokens anew, at positions with gaps, over what is in the pages.
fn tokens_at_any_positions_are_the_cpus(device: &Device) {
    for fixture in Fixture::all() {
        let mut pair = Pair::exact(device, &fixture, 1);
        let tokens = &fixture.prompts[5];
        pair.run(&[(0, Positions::From(0), tokens)], LogitsWanted::None);
        let some: Vec<usize> = (3..140).filter(|at| at % 7 == 0 || at % 11 == 3).collect();
        // Others than stood there.
        let others: Vec<u32> = some.iter().map(|&at| tokens[(at * 5 + 1) % 150]).collect();
        let both = pair.run(&[(0, Positions::At(&some), &others)], LogitsWanted::All);
        pair.check("some positions", both);
        let last = [149];
        let both = pair.run(
            &[(0, Positions::At(&last), &tokens[149..])],
            LogitsWanted::Last,
        );
        pair.check("what follows", both);
    }
}

/// Pages that are chosen by KV head; those that are not hold what is no number.
fn chosen_pages_are_the_cpus(device: &Device) {
    for fixture in Fixture::all() {
        let config = fixture.model.config();
        let mut pair = Pair::exact(device, &fixture, 1);
        let (context, rest) = fixture.prompts[5].split_at(128);
        pair.run(&[(0, Positions::From(0), context)], LogitsWanted::None);
        let table = pair.tables[0].clone();
        for layer in 0..config.layers {
            let nan = f32::NAN
                .to_le_bytes()
                .repeat(pair.cpu_pool.layer_bytes(16) / 4);
            for page in [1, 3, 4, 6] {
                pair.pool
                    .write_layer(&table, page * 16, 16, layer, &nan)
                    .unwrap();
                pair.cpu_pool
                    .write_layer(&table, page * 16, 16, layer, &nan)
                    .unwrap();
            }
        }
        let lists = [vec![5, 0, 2, 2, 99], vec![7, 2], vec![], vec![0]];
        let chosen: Vec<Vec<u32>> = (0..config.kv_heads)
            .map(|head| lists[head % 4].clone())
            .collect();
        for (position, tokens) in [(128, &rest[..1]), (129, &rest[1..])] {
            // All rows see the pages in which they stand.
            let (ours, cpus) = (Pages::Chosen(chosen.clone()), Pages::Chosen(chosen.clone()));
            let both = pair.run_with(
                &[(0, Positions::From(position), tokens)],
                LogitsWanted::All,
                |before| {
                    before.pages.fill(ours.clone());
                    ControlFlow::Continue(())
                },
                |before| {
                    before.pages.fill(cpus.clone());
                    ControlFlow::Continue(())
                },
            );
            assert!(both[0].concat().iter().all(|logit| logit.is_finite()));
            pair.check(&format!("chosen at {position}"), both);
        }
    }
}

/// Rows that end early, and rows whose K and V stay as they were.
fn rows_that_end_are_the_cpus(device: &Device) {
    let all = Fixture::all();
    for (fixture, dropped) in all.iter().flat_map(|it| [(it, false), (it, true)]) {
        let mut pair = Pair::exact(device, fixture, 2);
        let (a, b) = (&fixture.prompts[4], &fixture.prompts[3]);
        let first = [
            (0, Positions::From(0), &b[..33]),
            (1, Positions::From(0), &a[..20]),
        ];
        pair.run(&first, LogitsWanted::None);
        let fate = |layer: usize, row: usize, fate: &mut Fate| {
            *fate = match (layer, row % 5) {
                (0, 1) => Fate::Ends,
                (0, 3) if dropped => Fate::Dropped,
                (1, 2) if dropped => Fate::Dropped,
                _ => Fate::GoesOn,
            };
        };
        let both = pair.run_with(
            &[
                (0, Positions::From(0), &a[..]),
                (1, Positions::From(20), &b[..9]),
            ],
            LogitsWanted::Last,
            |before| {
                let rows = before.fates.iter_mut().enumerate();
                rows.for_each(|(row, of)| fate(before.layer, row, of));
                ControlFlow::Continue(())
            },
            |before| {
                let rows = before.fates.iter_mut().enumerate();
                rows.for_each(|(row, of)| fate(before.layer, row, of));
                ControlFlow::Continue(())
            },
        );
        pair.check("rows that end", both);
    }
}

/// A prefix landed layer by layer while layers compute, one ahead, as from the cache; and what
/// the layer is told of its rows.
fn landed_prefixes_are_the_cpus(device: &Device) {
    for fixture in Fixture::all() {
        let layers = fixture.model.config().layers;
        let tokens = &fixture.prompts[5];
        for prefix in [16, 149] {
            let mut pair = Pair::exact(device, &fixture, 2);
            let whole = (1, Positions::From(0), &tokens[..]);
            pair.run(&[whole], LogitsWanted::None);
            let payloads: Vec<Vec<u8>> = (0..layers)
                .map(|layer| {
                    let mut payload = vec![0; pair.cpu_pool.layer_bytes(prefix)];
                    let from = &pair.tables[1];
                    pair.cpu_pool
                        .read_layer(from, 0, prefix, layer, &mut payload)
                        .unwrap();
                    payload
                })
                .collect();
            let table = pair.tables[0].clone();
            let mut rows = Vec::new();
            let mut cpu_rows = Vec::new();
            let both = pair.run_with(
                &[(0, Positions::From(prefix), &tokens[prefix..])],
                LogitsWanted::All,
                |before| {
                    rows.push(before.rows.read().unwrap());
                    // The first two, then the one behind the next.
                    let from = if before.layer == 0 {
                        0
                    } else {
                        before.layer + 1
                    };
                    let payloads = payloads.iter().enumerate();
                    for (layer, payload) in payloads.take(before.layer + 2).skip(from) {
                        let pool = &mut *before.pool;
                        pool.write_layer(&table, 0, prefix, layer, payload).unwrap();
                    }
                    ControlFlow::Continue(())
                },
                |before| {
                    cpu_rows.push(before.rows.to_vec());
                    let payload = &payloads[before.layer];
                    let pool = before.pool;
                    pool.write_layer(&table, 0, prefix, before.layer, payload)
                        .unwrap();
                    ControlFlow::Continue(())
                },
            );
            pair.check(&format!("after {prefix} tokens"), both);
            assert!(difference(&rows.concat(), &cpu_rows.concat()) < 1e-4);
        }
    }
}

/// Pages that are read and overwritten between batches nobody waits for.
fn pages_are_overwritten_after_they_were_read(device: &Device) {
    for fixture in Fixture::named(&["llama3-gqa", "qwen3"]) {
        let layers = fixture.model.config().layers;
        let mut pair = Pair::exact(device, &fixture, 1);
        let tokens = &fixture.prompts[4];
        let table = pair.tables[0].clone();
        let zeros = vec![0; pair.pool.layer_bytes(70)];
        // After a layer has read its pages, and before the batch is over.
        let both = pair.run_with(
            &[(0, Positions::From(0), &tokens[..])],
            LogitsWanted::All,
            |before| {
                if let Some(done) = before.layer.checked_sub(1) {
                    let pool = &mut *before.pool;
                    pool.write_layer(&table, 0, 70, done, &zeros).unwrap();
                }
                ControlFlow::Continue(())
            },
            |_| ControlFlow::Continue(()),
        );
        pair.check("overwritten", both);
        for layer in 0..layers {
            let [found, expected] = pair.read(0, 70, layer);
            let last = layer + 1 == layers;
            assert_eq!(found == zeros, !last, "{layer}");
            assert_ne!(expected, zeros);
        }
    }
}

/// Weights and pages of 16 bits, beside the CPU with weights of f32 and the same pages: near.
fn sixteen_bits_are_near(device: &Device) {
    let mut worst = [0.0f32; 4];
    for fixture in Fixture::named(&["stored-bf16", "stored-f16", "qwen3", "llama-bias"]) {
        for (at, (weights, pages, tolerance)) in [
            (KvDtype::F32, KvDtype::F16, 0.002),
            (KvDtype::F32, KvDtype::Bf16, 0.02),
            (KvDtype::F16, KvDtype::F16, 0.03),
            (KvDtype::Bf16, KvDtype::Bf16, 0.3),
        ]
        .into_iter()
        .enumerate()
        {
            let mut pair = Pair::new(device, &fixture, 2, weights, pages);
            let prompts =
                [4, 5].map(|at: usize| (at - 4, Positions::From(0), &fixture.prompts[at][..]));
            let [found, expected] = pair.run(&prompts, LogitsWanted::Last);
            let off = difference(&found.concat(), &expected.concat());
            worst[at] = worst[at].max(off);
            assert!(
                off < tolerance,
                "{}: {weights:?} {pages:?}: {off}",
                fixture.name
            );
        }
    }
    eprintln!("{}: 16 bits are off by {worst:?}", device.name().unwrap());
}

/// A batch of which nothing goes on, and nothing is wanted but what the first layer writes.
fn batches_that_end_are_the_cpus(device: &Device) {
    for fixture in Fixture::named(&["llama3-gqa", "llama-bias"]) {
        let mut pair = Pair::exact(device, &fixture, 1);
        let tokens = &fixture.prompts[3];
        let prompt = [(0, Positions::From(0), &tokens[..])];
        let both = pair.run_with(
            &prompt,
            LogitsWanted::None,
            |before| {
                before.fates.fill(Fate::Ends);
                ControlFlow::Continue(())
            },
            |before| {
                before.fates.fill(Fate::Ends);
                ControlFlow::Continue(())
            },
        );
        assert!(both.iter().all(Vec::is_empty));
        let next = [(0, Positions::From(33), &tokens[..1])];
        let both = pair.run(&next, LogitsWanted::Last);
        pair.check("over a first layer alone", both);
    }
}

/// A layer that sees all beside one with a window: the fixture's weights, and another config.
fn layers_of_different_windows_are_the_cpus(device: &Device) {
    let mut fixture = Fixture::named(&["qwen3"]).remove(0);
    let directory = tempfile::tempdir().unwrap();
    let config = std::fs::read(fixture.dir.join("config.json")).unwrap();
    let mut config: serde_json::Value = serde_json::from_slice(&config).unwrap();
    config["use_sliding_window"] = true.into();
    config["sliding_window"] = 8.into();
    config["layer_types"][0] = "sliding_attention".into();
    std::fs::write(directory.path().join("config.json"), config.to_string()).unwrap();
    let weights = "model.safetensors";
    std::fs::copy(fixture.dir.join(weights), directory.path().join(weights)).unwrap();
    fixture.dir = directory.path().to_owned();
    fixture.model = Model::load(&fixture.dir).unwrap();
    assert_eq!(fixture.model.config().windows, [Some(8), None, None]);
    let mut pair = Pair::exact(device, &fixture, 2);
    let prompts = [4, 5].map(|at: usize| (at - 4, Positions::From(0), &fixture.prompts[at][..]));
    let both = pair.run(&prompts, LogitsWanted::All);
    pair.check("windows of a prompt", both);
    let token = [7];
    let next = [
        (0, Positions::From(70), &token[..]),
        (1, Positions::From(150), &token[..]),
    ];
    let both = pair.run(&next, LogitsWanted::Last);
    pair.check("windows of a token", both);
}

/// Tokens chosen on the device are those of the logits.
fn greedy_tokens_are_those_of_the_logits(device: &Device) {
    for fixture in Fixture::named(&["llama2-mha", "qwen2"]) {
        let mut pair = Pair::exact(device, &fixture, 2);
        let prompts =
            [2, 3].map(|at: usize| (at - 2, Positions::From(0), &fixture.prompts[at][..]));
        let [rows, _] = pair.run(&prompts, LogitsWanted::All);
        let expected: Vec<Option<u32>> = rows.iter().map(|row| Some(argmax(row))).collect();
        let steps = prompts.map(|(sequence, positions, tokens)| Step {
            tokens,
            positions,
            blocks: &pair.tables[sequence],
            logits: LogitsWanted::All,
        });
        let chosen =
            pair.model
                .forward_greedy(&mut pair.pool, &mut pair.scratch, &steps, &mut |_| {
                    ControlFlow::Continue(())
                });
        let chosen = chosen.unwrap();
        assert_eq!(chosen.iter().map(Vec::len).collect::<Vec<_>>(), [16, 33]);
        assert_eq!(chosen.concat(), expected, "{}", fixture.name);
    }
}

/// Steps that do not fit are refused as on the CPU, and a batch that is broken off has a result
/// no more.
fn refusals_are_the_cpus(device: &Device) {
    let fixture = &Fixture::named(&["mistral"])[0];
    let mut pair = Pair::exact(device, fixture, 1);
    let table = pair.tables[0].clone();
    let mut refusal = |tokens: &[u32], position, blocks: &[BlockId], stop| {
        let step = Step {
            tokens,
            positions: Positions::From(position),
            blocks,
            logits: LogitsWanted::Last,
        };
        let mut before = |_: BeforeDeviceLayer<'_>| match stop {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        };
        pair.model
            .forward(&mut pair.pool, &mut pair.scratch, &[step], &mut before)
            .unwrap_err()
    };
    let empty = refusal(&[], 0, &table, false);
    assert!(matches!(empty, ForwardError::Empty { step: 0 }));
    let token = refusal(&[128], 0, &table, false);
    assert!(matches!(token, ForwardError::Token { token: 128, .. }));
    let long = refusal(&[1], 256, &table, false);
    assert!(matches!(long, ForwardError::TooLong { end: 257, .. }));
    let short = refusal(&[1], 16, &table[..1], false);
    assert!(matches!(short, ForwardError::Pages { .. }));
    let none = refusal(&[1], 0, &[BlockId(99)], false);
    assert!(matches!(none, ForwardError::Pages { .. }));
    let stopped = refusal(&[1], 0, &table, true);
    assert!(matches!(stopped, ForwardError::Stopped));
}

on_both!(
    prompts_and_continuations_are_the_cpus,
    parts_of_prompts_are_the_cpus,
    tokens_at_any_positions_are_the_cpus,
    chosen_pages_are_the_cpus,
    rows_that_end_are_the_cpus,
    landed_prefixes_are_the_cpus,
    pages_are_overwritten_after_they_were_read,
    batches_that_end_are_the_cpus,
    layers_of_different_windows_are_the_cpus,
    sixteen_bits_are_near,
    greedy_tokens_are_those_of_the_logits,
    refusals_are_the_cpus,
);

also_late!(
    landed_prefixes_are_the_cpus,
    pages_are_overwritten_after_they_were_read,
    greedy_tokens_are_those_of_the_logits,
    layers_of_different_windows_are_the_cpus,
);
