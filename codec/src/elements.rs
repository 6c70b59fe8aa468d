//! The numbers of a layout's element type, as f32 and back.

use half::slice::HalfFloatSliceExt as _;
use half::{bf16, f16};
use kvasir_types::{DType, HeadRange, KvLayout, Plane};

/// One head of one plane of a layer.
#[derive(Clone, Debug)]
pub(crate) struct Head {
    pub(crate) plane: Plane,
    /// Channels.
    pub(crate) dim: usize,
    /// Where its rows lie in the raw layer, a row a token.
    pub(crate) place: std::ops::Range<usize>,
}

/// The heads of a raw layer, in its order.
pub(crate) fn heads(layout: &KvLayout) -> impl Iterator<Item = Head> + use<> {
    let layout = *layout;
    let row = layout.tokens() as usize * layout.dtype().bytes();
    [Plane::Key, Plane::Value]
        .into_iter()
        .flat_map(move |plane| {
            let dim = layout.head_bytes(plane) / row;
            (0..layout.kv_heads()).filter_map(move |head| {
                let place = layout.head_slice(plane, HeadRange::new(head, head + 1).ok()?)?;
                Some(Head { plane, dim, place })
            })
        })
}

/// Whether numbers of the type can be read and written here.
pub(crate) fn is_float(dtype: DType) -> bool {
    matches!(dtype, DType::F32 | DType::F16 | DType::Bf16)
}

/// Reads numbers: as many as there is room for.
pub(crate) fn read(dtype: DType, bytes: &[u8], values: &mut [f32]) {
    let size = dtype.bytes();
    for (values, bytes) in values.chunks_mut(SOME).zip(bytes.chunks(SOME * size)) {
        match dtype {
            DType::F16 => {
                let mut halves = [f16::ZERO; SOME];
                for (half, &bytes) in halves.iter_mut().zip(bytes.as_chunks().0) {
                    *half = f16::from_le_bytes(bytes);
                }
                halves[..values.len()].convert_to_f32_slice(values);
            }
            DType::Bf16 => {
                for (value, &bytes) in values.iter_mut().zip(bytes.as_chunks().0) {
                    *value = bf16::from_le_bytes(bytes).to_f32();
                }
            }
            _ => {
                for (value, &bytes) in values.iter_mut().zip(bytes.as_chunks().0) {
                    *value = f32::from_le_bytes(bytes);
                }
            }
        }
    }
}

/// Writes numbers, rounded to the nearest of the type.
pub(crate) fn write(dtype: DType, values: &[f32], bytes: &mut [u8]) {
    // A few at a time, where they stay close.
    let size = dtype.bytes();
    for (values, bytes) in values.chunks(SOME).zip(bytes.chunks_mut(SOME * size)) {
        match dtype {
            DType::F16 => {
                let mut halves = [f16::ZERO; SOME];
                let halves = &mut halves[..values.len()];
                halves.convert_from_f32_slice(values);
                for (slot, half) in bytes.as_chunks_mut().0.iter_mut().zip(halves) {
                    *slot = half.to_le_bytes();
                }
            }
            DType::Bf16 => {
                let mut halves = [bf16::ZERO; SOME];
                let halves = &mut halves[..values.len()];
                halves.convert_from_f32_slice(values);
                for (slot, half) in bytes.as_chunks_mut().0.iter_mut().zip(halves) {
                    *slot = half.to_le_bytes();
                }
            }
            _ => {
                for (slot, value) in bytes.as_chunks_mut().0.iter_mut().zip(values) {
                    *slot = value.to_le_bytes();
                }
            }
        }
    }
}

const SOME: usize = 64;
