//! Attention of one layer beside the CPU's, over pages of every kind.

use super::super::attention::{
    Plan, Queries, Shape, partial_floats, row_kernel, row_shared, tile_kernel, tile_shared,
};
use super::super::launch::{Attend, Launch, Merge, narrow, type_number};
use super::super::machine::{Memory, Stream};
use super::{Device, DevicePool, also_late, difference, on_both};
use crate::config::ModelConfig;
use crate::kernels::{AttentionShape, AttentionWork, Isa, QueryRange, attend, noise};
use crate::kv::{BLOCK_TOKENS, BlockId, KvDtype, KvPool};

/// A model of two layers.
pub(super) fn config(
    family: &str,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    window: Option<usize>,
) -> ModelConfig {
    let window = window.map_or("null".to_owned(), |window| window.to_string());
    let text = format!(
        r#"{{"architectures": ["{family}ForCausalLM"], "vocab_size": 8, "hidden_size": 64,
            "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": {heads},
            "num_key_value_heads": {kv_heads}, "head_dim": {head_dim},
            "sliding_window": {window}, "max_position_embeddings": 100000}}"#
    );
    ModelConfig::from_json(text.as_bytes()).unwrap()
}

struct Case {
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    window: Option<usize>,
    dtype: KvDtype,
    /// By sequence: positions of its queries.
    sequences: Vec<Vec<usize>>,
    /// For every third KV head none, for others some.
    chosen: bool,
}

fn cases() -> Vec<Case> {
    let decode = |contexts: &[usize]| contexts.iter().map(|&at| vec![at]).collect::<Vec<_>>();
    let prompt = |from: usize, to: usize| vec![(from..to).collect::<Vec<_>>()];
    let mut cases = Vec::new();
    let dtypes = [KvDtype::F32, KvDtype::Bf16, KvDtype::F16];
    let shapes = [
        // Heads that fill no warp, and groups that fill no unit.
        (4, 4, 2, decode(&[0, 1, 15, 16, 300])),
        (6, 2, 24, decode(&[77])),
        (7, 1, 40, decode(&[200, 3])),
        (4, 1, 64, decode(&[511])),
        (6, 1, 66, decode(&[130])),
        (2, 2, 128, decode(&[97])),
        (8, 1, 130, decode(&[64])),
        (2, 1, 256, decode(&[80])),
        (1, 1, 512, decode(&[75])),
        (4, 2, 16, prompt(0, 70)),
        (7, 1, 40, prompt(30, 75)),
        (6, 2, 64, prompt(0, 33)),
        (2, 1, 128, prompt(90, 120)),
        (40, 1, 8, prompt(0, 20)),
        (2, 1, 130, prompt(5, 20)),
        // Some of each, and positions with gaps.
        (
            4,
            2,
            32,
            vec![
                vec![100],
                (0..40).collect(),
                vec![3, 40, 41, 99],
                (20..90).step_by(3).collect(),
            ],
        ),
    ];
    for (at, (heads, kv_heads, head_dim, sequences)) in shapes.into_iter().enumerate() {
        for (kind, window) in [None, Some(20), None].into_iter().enumerate() {
            cases.push(Case {
                heads,
                kv_heads,
                head_dim,
                window,
                dtype: dtypes[(at + kind) % 3],
                sequences: sequences.clone(),
                chosen: kind == 2,
            });
        }
    }
    cases
}

/// Sequences that are as long as their last query, and their pages' contents.
struct Pages {
    cpu: KvPool,
    device: DevicePool,
    tables: Vec<Vec<BlockId>>,
}

fn fill(device: &Device, case: &Case, config: &ModelConfig) -> Pages {
    let lengths: Vec<usize> = case
        .sequences
        .iter()
        .map(|it| it[it.len() - 1] + 1)
        .collect();
    let blocks = lengths.iter().map(|length| length.div_ceil(BLOCK_TOKENS));
    let blocks: usize = blocks.sum::<usize>() + 3;
    let mut cpu = KvPool::new(config, blocks, case.dtype);
    let mut on_device = DevicePool::new(device, config, blocks, case.dtype).unwrap();
    let mut ids: Vec<BlockId> = std::iter::from_fn(|| on_device.alloc()).collect();
    ids.reverse();
    let mut state = 7;
    let tables: Vec<Vec<BlockId>> = lengths
        .iter()
        .map(|length| ids.drain(..length.div_ceil(BLOCK_TOKENS)).collect())
        .collect();
    for (table, &length) in tables.iter().zip(&lengths) {
        // Tokens beyond the last are not written on the CPU, and are no numbers here.
        let rows = table.len() * BLOCK_TOKENS;
        let none = vec![0xff; on_device.layer_bytes(rows)];
        on_device.write_layer(table, 0, rows, 1, &none).unwrap();
        let width = config.kv_heads * config.head_dim;
        for position in 0..length {
            let mut row = || -> Vec<f32> { (0..width).map(|_| noise(&mut state)).collect() };
            let (keys, values) = (row(), row());
            cpu.write_token(table, position, 1, &keys, &values);
        }
        let mut payload = vec![0; cpu.layer_bytes(length)];
        cpu.read_layer(table, 0, length, 1, &mut payload).unwrap();
        on_device
            .write_layer(table, 0, length, 1, &payload)
            .unwrap();
    }
    Pages {
        cpu,
        device: on_device,
        tables,
    }
}

fn attention_is_the_cpus(device: &Device) {
    for case in cases() {
        let config = config(
            "Mistral",
            case.heads,
            case.kv_heads,
            case.head_dim,
            case.window,
        );
        let mut pages = fill(device, &case, &config);
        let mut state = 9;
        let rows: usize = case.sequences.iter().map(Vec::len).sum();
        let stride = config.qkv_width();
        let queries: Vec<f32> = (0..rows * stride)
            .map(|_| 4.0 * noise(&mut state))
            .collect();
        // Every query's own page is among the chosen.
        let chosen: Vec<Vec<Vec<u32>>> = case
            .sequences
            .iter()
            .map(|positions| {
                let mut own: Vec<u32> = positions
                    .iter()
                    .map(|&at| u32::try_from(at / BLOCK_TOKENS).unwrap())
                    .collect();
                own.dedup();
                let last = own[own.len() - 1];
                let list = |kv_head: usize| {
                    let some = (0..=last).filter(|page| kv_head % 3 < 2 && page % 3 == 0);
                    let mut list: Vec<u32> = some.chain(own.iter().copied()).collect();
                    list.sort_unstable();
                    list.dedup();
                    list
                };
                (0..case.kv_heads).map(list).collect()
            })
            .collect();

        let mut first_row = 0;
        let ranges: Vec<QueryRange<'_>> = case
            .sequences
            .iter()
            .enumerate()
            .map(|(at, positions)| {
                first_row += positions.len();
                QueryRange {
                    first_row: first_row - positions.len(),
                    positions,
                    blocks: &pages.tables[at],
                    pages: case.chosen.then_some(&chosen[at][..]),
                }
            })
            .collect();
        let work = AttentionWork {
            shape: AttentionShape {
                heads: case.heads,
                kv_heads: case.kv_heads,
                head_dim: case.head_dim,
                window: case.window,
            },
            ranges: &ranges,
            queries: &queries,
            query_stride: stride,
            pool: &pages.cpu,
            layer: 1,
        };
        let width = case.heads * case.head_dim;
        let mut expected = vec![0.0; rows * width];
        attend(Isa::detect(), &work, &mut expected);

        let found = run(device, &case, &mut pages.device, &ranges, &queries, stride);
        let worst = difference(&found, &expected);
        let Case {
            heads,
            kv_heads,
            head_dim,
            window,
            dtype,
            ..
        } = case;
        let what = format!("{heads}/{kv_heads}·{head_dim} {window:?} {dtype:?}");
        assert!(worst < 4e-6, "{what}: off by {worst}");
    }
}

/// The same on the device.
fn run(
    device: &Device,
    case: &Case,
    pool: &mut DevicePool,
    ranges: &[QueryRange<'_>],
    queries: &[f32],
    stride: usize,
) -> Vec<f32> {
    let machine = &*device.machine;
    let mut blocks = Vec::new();
    let mut positions = Vec::new();
    let device_queries: Vec<Queries<'_>> = ranges
        .iter()
        .map(|range| {
            let table = blocks.len();
            blocks.extend(range.blocks.iter().map(|block| block.0));
            positions.extend(range.positions.iter().map(|&at| narrow(at)));
            Queries {
                first_row: range.first_row,
                positions: range.positions,
                table,
                pages: range.pages,
            }
        })
        .collect();
    let shape = Shape {
        heads: case.heads,
        kv_heads: case.kv_heads,
        head_dim: case.head_dim,
        window: case.window,
        processors: machine.processors(),
    };
    let plan = Plan::new(shape, &device_queries);
    let words = |words: &[u32]| -> Memory {
        let memory = machine.alloc(size_of_val(words)).unwrap();
        let bytes = bytemuck::cast_slice(words);
        machine.upload(&memory, 0, bytes).unwrap();
        memory
    };
    let units = |units: &[super::super::attention::Unit]| {
        words(
            &units
                .iter()
                .flat_map(|unit| unit.words())
                .collect::<Vec<_>>(),
        )
    };
    let (rows, tiles) = (units(&plan.rows), units(&plan.tiles));
    let merges = words(plan.merges.as_flattened());
    let [lists, blocks, positions] = [&plan.lists, &blocks, &positions].map(|it| words(it));
    let queries_memory = machine.alloc(size_of_val(queries)).unwrap();
    let bytes = bytemuck::cast_slice(queries);
    machine.upload(&queries_memory, 0, bytes).unwrap();
    let dim = case.head_dim;
    let partial = machine
        .alloc(4 * plan.rows.len() * partial_floats(dim))
        .unwrap();
    let count = queries.len() / stride * case.heads * dim;
    let out = machine.alloc(4 * count).unwrap();
    pool.before_computing(1).unwrap();
    #[expect(clippy::cast_precision_loss, reason = "head_dim is at most 512")]
    let scale = 1.0 / (dim as f32).sqrt();
    let attend = Attend {
        queries: queries_memory.address,
        pool: pool.layer_address(1),
        positions: positions.address,
        blocks: blocks.address,
        lists: lists.address,
        units: rows.address,
        partial: partial.address,
        out: out.address,
        stride: narrow(stride),
        heads: narrow(case.heads),
        kv_heads: narrow(case.kv_heads),
        dim: narrow(dim),
        window: case.window.map_or(u32::MAX, narrow),
        out_type: type_number(KvDtype::F32),
        scale,
        unused: 0,
    };
    let kernel = row_kernel(case.dtype, dim);
    let launch = Launch::rows(kernel, plan.rows.len(), attend.to_bytes());
    let launch = launch.sharing(row_shared(dim));
    machine.launch(Stream::Compute, launch).unwrap();
    let merge = Merge {
        partial: partial.address,
        units: rows.address,
        merges: merges.address,
        out: out.address,
        heads: attend.heads,
        dim: attend.dim,
        out_type: attend.out_type,
        unused: 0,
    };
    let launch = Launch::rows("merge", plan.merges.len(), merge.to_bytes());
    machine.launch(Stream::Compute, launch).unwrap();
    let attend = Attend {
        units: tiles.address,
        ..attend
    };
    let kernel = tile_kernel(case.dtype);
    let launch = Launch::rows(kernel, plan.tiles.len(), attend.to_bytes());
    machine
        .launch(Stream::Compute, launch.sharing(tile_shared(dim)))
        .unwrap();
    pool.after_computing(1).unwrap();
    let mut found = vec![0.0; count];
    machine
        .download(&out, 0, bytemuck::cast_slice_mut(&mut found))
        .unwrap();
    found
}

on_both!(attention_is_the_cpus);

also_late!(attention_is_the_cpus,);
