//! Kernels one by one, beside the CPU's.

use half::{bf16, f16};

use super::super::launch::{
    Activate, AddBias, Angles, Argmax, Embed, Gather, Heads, LANES, Launch, Norm, ROW_THREADS,
    narrow, type_number,
};
use super::super::machine::{Machine, Memory, Stream};
use super::{Device, difference, on_both};
use crate::config::ModelConfig;
use crate::kernels::{Isa, noise, rms_norm as cpu_norm, rms_norm_in_place, rotate, silu_mul};
use crate::kv::KvDtype;

const TYPES: [KvDtype; 3] = [KvDtype::F32, KvDtype::Bf16, KvDtype::F16];

/// Numbers between -1 and 1.
fn numbers(count: usize, seed: u64) -> Vec<f32> {
    let mut state = seed;
    (0..count).map(|_| noise(&mut state)).collect()
}

fn put<T: bytemuck::NoUninit>(machine: &Machine, values: &[T]) -> Memory {
    let memory = machine.alloc(size_of_val(values)).unwrap();
    let bytes = bytemuck::cast_slice(values);
    machine.upload(&memory, 0, bytes).unwrap();
    memory
}

/// Memory that was not written.
fn room(machine: &Machine, bytes: usize) -> Memory {
    machine.alloc(bytes).unwrap()
}

fn get<T: bytemuck::Pod>(machine: &Machine, memory: &Memory, count: usize) -> Vec<T> {
    let mut values = vec![T::zeroed(); count];
    let bytes = bytemuck::cast_slice_mut(&mut values);
    machine.download(memory, 0, bytes).unwrap();
    values
}

fn get_typed(machine: &Machine, memory: &Memory, count: usize, dtype: KvDtype) -> Vec<f32> {
    match dtype {
        KvDtype::F32 => get(machine, memory, count),
        KvDtype::Bf16 => {
            let bits: Vec<u16> = get(machine, memory, count);
            bits.into_iter()
                .map(|b| bf16::from_bits(b).to_f32())
                .collect()
        }
        KvDtype::F16 => {
            let bits: Vec<u16> = get(machine, memory, count);
            bits.into_iter()
                .map(|b| f16::from_bits(b).to_f32())
                .collect()
        }
    }
}

fn bytes_of(values: &[f32], dtype: KvDtype) -> Vec<u8> {
    let values = values.iter();
    match dtype {
        KvDtype::F32 => values.flat_map(|value| value.to_le_bytes()).collect(),
        KvDtype::Bf16 => values
            .flat_map(|&v| bf16::from_f32(v).to_le_bytes())
            .collect(),
        KvDtype::F16 => values
            .flat_map(|&v| f16::from_f32(v).to_le_bytes())
            .collect(),
    }
}

fn rounded(values: &[f32], dtype: KvDtype) -> Vec<f32> {
    let round = |&value: &f32| match dtype {
        KvDtype::F32 => value,
        KvDtype::Bf16 => bf16::from_f32(value).to_f32(),
        KvDtype::F16 => f16::from_f32(value).to_f32(),
    };
    values.iter().map(round).collect()
}

/// Of values of up to 4, which one unit in the last place may part.
fn tolerance(dtype: KvDtype) -> f32 {
    match dtype {
        KvDtype::F32 => 4e-6,
        KvDtype::Bf16 => 4.0 / 256.0,
        KvDtype::F16 => 4.0 / 2048.0,
    }
}

fn launch(machine: &Machine, launch: Launch) {
    machine.launch(Stream::Compute, launch).unwrap();
}

fn warps() -> usize {
    (ROW_THREADS / LANES) as usize
}

fn embeddings_are_rows(device: &Device) {
    let machine = &*device.machine;
    let (vocab, hidden) = (9, 300);
    let table = numbers(vocab * hidden, 1);
    let tokens = [3u32, 0, 8, 8, 1];
    for dtype in TYPES {
        let (from, to) = (
            put(machine, &bytes_of(&table, dtype)),
            put(machine, &tokens),
        );
        let stream = room(machine, 4 * tokens.len() * hidden);
        let arguments = Embed {
            tokens: to.address,
            table: from.address,
            stream: stream.address,
            hidden: narrow(hidden),
            dtype: type_number(dtype),
        };
        launch(
            machine,
            Launch::rows("embed", tokens.len(), arguments.to_bytes()),
        );
        let found: Vec<f32> = get(machine, &stream, tokens.len() * hidden);
        let rows = tokens.map(|token| &table[token as usize * hidden..][..hidden]);
        assert_eq!(found, rounded(&rows.concat(), dtype), "{dtype:?}");
    }
}

fn norms_are_the_cpus(device: &Device) {
    let machine = &*device.machine;
    for (dtype, width) in [
        (KvDtype::F32, 4),
        (KvDtype::Bf16, 36),
        (KvDtype::F16, 128),
        (KvDtype::F32, 1000),
    ] {
        let rows = 3;
        let (stream, weight) = (numbers(rows * width, 2), numbers(width, 3));
        let (from, by) = (put(machine, &stream), put(machine, &weight));
        let out = room(machine, rows * width * dtype.bytes());
        let arguments = Norm {
            stream: from.address,
            weight: by.address,
            out: out.address,
            width: narrow(width),
            dtype: type_number(dtype),
            eps: 1e-5,
        };
        let launched = Launch::rows("rms_norm", rows, arguments.to_bytes()).sharing(warps());
        launch(machine, launched);
        let found = get_typed(machine, &out, rows * width, dtype);
        let mut expected = vec![0.0; rows * width];
        for (row, out) in stream.chunks(width).zip(expected.chunks_mut(width)) {
            cpu_norm(Isa::detect(), row, &weight, 1e-5, out);
        }
        let worst = difference(&found, &expected);
        assert!(worst <= tolerance(dtype), "{dtype:?} {width}: {worst}");
    }
}

fn angles_are_the_cpus(device: &Device) {
    let machine = &*device.machine;
    for name in ["llama2-mha", "llama-linear", "llama3-gqa", "llama-yarn"] {
        let path = format!("{}/fixtures/{name}/config.json", env!("CARGO_MANIFEST_DIR"));
        let config = ModelConfig::from_json(&std::fs::read(path).unwrap()).unwrap();
        let frequencies = config.rope.frequencies(128);
        let positions = [0u32, 1, 77, 4095, 100_000, 1_000_003];
        let (at, radians) = (put(machine, &positions), put(machine, &frequencies.radians));
        let out = room(machine, 4 * positions.len() * 128);
        let arguments = Angles {
            positions: at.address,
            radians: radians.address,
            angles: out.address,
            pairs: 64,
            factor: frequencies.attention_factor,
        };
        launch(
            machine,
            Launch::rows("angles", positions.len(), arguments.to_bytes()),
        );
        let found: Vec<f32> = get(machine, &out, positions.len() * 128);
        for (&position, found) in positions.iter().zip(found.chunks(128)) {
            let (mut cos, mut sin) = ([0.0; 64], [0.0; 64]);
            frequencies.angles(position as usize, &mut cos, &mut sin);
            let worst = difference(found, &[cos, sin].concat());
            assert!(worst < 2e-7, "{name} at {position}: {worst}");
        }
    }
}

fn heads_are_the_cpus(device: &Device) {
    let machine = &*device.machine;
    let isa = Isa::detect();
    for (dim, has_bias, has_norms) in [
        (2, false, false),
        (24, true, false),
        (64, false, true),
        (128, true, true),
        (512, true, true),
    ] {
        let (rows, heads, kv_heads) = (3, 3, 2);
        let width = (heads + 2 * kv_heads) * dim;
        let qkv = numbers(rows * width, 4);
        let bias = numbers(width, 5);
        let (q_norm, k_norm) = (numbers(dim, 6), numbers(dim, 7));
        let angles = numbers(rows * dim, 8);
        let [memory, bias_memory, q_memory, k_memory, angles_memory] =
            [&qkv, &bias, &q_norm, &k_norm, &angles].map(|values| put(machine, values));
        let arguments = Heads {
            qkv: memory.address,
            bias: if has_bias { bias_memory.address } else { 0 },
            q_norm: if has_norms { q_memory.address } else { 0 },
            k_norm: if has_norms { k_memory.address } else { 0 },
            angles: angles_memory.address,
            rows: narrow(rows),
            heads: narrow(heads),
            kv_heads: narrow(kv_heads),
            dim: narrow(dim),
            eps: 1e-6,
        };
        let lanes = rows * (heads + 2 * kv_heads) * LANES as usize;
        launch(
            machine,
            Launch::elements("heads", lanes, arguments.to_bytes()),
        );
        let found: Vec<f32> = get(machine, &memory, rows * width);

        let mut expected = qkv.clone();
        for (row, angles) in expected.chunks_mut(width).zip(angles.chunks(dim)) {
            if has_bias {
                row.iter_mut().zip(&bias).for_each(|(x, bias)| *x += bias);
            }
            let rotated = row.chunks_mut(dim).take(heads + kv_heads);
            for (index, head) in rotated.enumerate() {
                let weight = if index < heads { &q_norm } else { &k_norm };
                if has_norms {
                    rms_norm_in_place(isa, head, weight, 1e-6);
                }
                let (cos, sin) = angles.split_at(dim / 2);
                rotate(isa, head, cos, sin);
            }
        }
        let worst = difference(&found, &expected);
        assert!(worst < 4e-6, "{dim}: {worst}");
    }
}

fn activations_are_the_cpus(device: &Device) {
    let machine = &*device.machine;
    for (dtype, has_bias) in [
        (KvDtype::F32, false),
        (KvDtype::F32, true),
        (KvDtype::Bf16, true),
        (KvDtype::F16, false),
    ] {
        let (rows, width) = (3, 100);
        let mut gate_up = numbers(rows * 2 * width, 9);
        gate_up.iter_mut().for_each(|x| *x *= 2.0);
        // Where e^-x overflows, and where it vanishes.
        (gate_up[0], gate_up[1]) = (-120.0, 120.0);
        let bias = numbers(2 * width, 10);
        let (from, by) = (put(machine, &gate_up), put(machine, &bias));
        let out = room(machine, rows * width * dtype.bytes());
        let arguments = Activate {
            gate_up: from.address,
            bias: if has_bias { by.address } else { 0 },
            out: out.address,
            rows: narrow(rows),
            width: narrow(width),
            dtype: type_number(dtype),
        };
        let launched = Launch::elements("activate", rows * width, arguments.to_bytes());
        launch(machine, launched);
        let found = get_typed(machine, &out, rows * width, dtype);
        let mut expected = vec![0.0; rows * width];
        for (row, out) in gate_up
            .chunks_mut(2 * width)
            .zip(expected.chunks_mut(width))
        {
            if has_bias {
                row.iter_mut().zip(&bias).for_each(|(x, bias)| *x += bias);
            }
            silu_mul(Isa::detect(), row, out);
        }
        // Of values of up to 240.
        let worst = difference(&found, &expected);
        assert!(worst <= 60.0 * tolerance(dtype), "{dtype:?}: {worst}");
        let worst = difference(&found[2..], &expected[2..]);
        assert!(worst <= 4.0 * tolerance(dtype), "{dtype:?}: {worst}");
    }
}

fn biases_and_rows_are_exact(device: &Device) {
    let machine = &*device.machine;
    let (rows, width) = (4, 70);
    let (values, bias) = (numbers(rows * width, 11), numbers(width, 12));
    let (memory, by) = (put(machine, &values), put(machine, &bias));
    let arguments = AddBias {
        values: memory.address,
        bias: by.address,
        rows: narrow(rows),
        width: narrow(width),
    };
    let launched = Launch::elements("add_bias", rows * width, arguments.to_bytes());
    launch(machine, launched);
    let added = values.chunks(width).flat_map(|row| row.iter().zip(&bias));
    let added: Vec<f32> = added.map(|(x, bias)| x + bias).collect();
    assert_eq!(get::<f32>(machine, &memory, rows * width), added);

    let kept = [3u32, 0, 3];
    let (list, out) = (put(machine, &kept), room(machine, 4 * 3 * width));
    let arguments = Gather {
        from: memory.address,
        to: out.address,
        rows: list.address,
        width: narrow(width),
    };
    launch(machine, Launch::rows("gather", 3, arguments.to_bytes()));
    let rows = kept.map(|row| &added[row as usize * width..][..width]);
    assert_eq!(get::<f32>(machine, &out, 3 * width), rows.concat());
}

fn the_largest_logit_is_the_first_of_equals(device: &Device) {
    let machine = &*device.machine;
    for vocab in [1usize, 31, 128, 131, 1000] {
        let mut rows: Vec<Vec<f32>> = (0..6).map(|seed| numbers(vocab, 20 + seed)).collect();
        let last = vocab - 1;
        rows[0][last] = 2.0;
        rows[1][0] = 2.0;
        // Two equals, of which a later warp may find the first.
        (rows[2][last], rows[2][vocab / 2], rows[2][vocab / 3]) = (3.0, 3.0, 3.0);
        rows[3][vocab / 2] = f32::NAN;
        rows[4][last] = f32::NEG_INFINITY;
        rows[5].fill(-7.0);
        let logits = put(machine, &rows.concat());
        let best = room(machine, 4 * rows.len());
        let arguments = Argmax {
            logits: logits.address,
            best: best.address,
            vocab: narrow(vocab),
        };
        let launched = Launch::rows("argmax", rows.len(), arguments.to_bytes());
        launch(machine, launched.sharing(2 * warps()));
        let found: Vec<u32> = get(machine, &best, rows.len());
        let third = narrow(vocab / 3);
        let expected = [narrow(last), 0, third, u32::MAX, u32::MAX, 0];
        assert_eq!(found, expected, "{vocab}");
    }
}

on_both!(
    embeddings_are_rows,
    norms_are_the_cpus,
    angles_are_the_cpus,
    heads_are_the_cpus,
    activations_are_the_cpus,
    biases_and_rows_are_exact,
    the_largest_logit_is_the_first_of_equals,
);
