//! Arithmetic over slices: products, attention, norms, activations.
//!
//! The only module of this crate with `unsafe` beside calls of NVIDIA's libraries in
//! [`crate::device`], in four forms: the call into
//! the `gemm` crate, calls of functions compiled for a detected instruction
//! set, vector loads and stores from slices whose length is asserted, and
//! attention's threads writing to one output, each the rows of its own units,
//! which are asserted not to overlap.
//! Every vector path has a scalar twin that gives the same bits, because both
//! take sums in the same order with fused multiply-add.

#![expect(
    unsafe_code,
    reason = "SIMD and the call into the gemm library; see above"
)]

mod attention;
mod boxes;
mod eight_bits;
mod elementwise;
mod isa;
mod matmul;
#[cfg(target_arch = "x86_64")]
mod vector;

pub use attention::KEY_TILE;
pub use elementwise::rotate;
pub use isa::{Isa, Threads};
pub use matmul::K_CHUNK;

pub(crate) use attention::{AttentionShape, AttentionWork, QueryRange, attend};
pub(crate) use boxes::{
    CODE_ROWS, Reach, Weighed, add_signs, add_weights, dots, log_means, log_sum, max_weights,
    reach, reach_ends, weigh, widen,
};
pub(crate) use eight_bits::{STEP_BYTES, dequantise, narrow_bf16, quantise};
pub(crate) use elementwise::{LANES, add_bias, rms_norm, rms_norm_in_place, silu_mul};
pub(crate) use matmul::{PANEL, PackedMatrix, matmul, matmul_row};

/// A growable buffer that starts on a cache line, so that vector loads of it
/// never straddle two.
#[derive(Debug, Default)]
pub(crate) struct AlignedBuf<T> {
    data: Vec<T>,
    start: usize,
    len: usize,
}

/// Bytes of alignment of every [`AlignedBuf`]: one cache line, one AVX-512 register.
const ALIGN: usize = 64;

impl<T: Copy + Default> AlignedBuf<T> {
    /// `len` default elements, written once, so that their memory is resident.
    pub(crate) fn new(len: usize) -> Self {
        let spare = ALIGN / size_of::<T>();
        // Hidden from the optimiser, which would make a lazily mapped zeroed
        // allocation of it; the first touch costs several times a copy.
        let mut data = std::hint::black_box(Vec::with_capacity(len + spare));
        data.resize_with(len + spare, T::default);
        let start = data.as_ptr().align_offset(ALIGN).min(spare);
        Self { data, start, len }
    }

    /// Makes it at least `len` elements long; contents are lost when it grows.
    pub(crate) fn ensure(&mut self, len: usize) {
        if self.len < len {
            *self = Self::new(len);
        }
    }
}

impl<T> std::ops::Deref for AlignedBuf<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        &self.data[self.start..self.start + self.len]
    }
}

impl<T> std::ops::DerefMut for AlignedBuf<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        &mut self.data[self.start..self.start + self.len]
    }
}

#[cfg(test)]
pub(crate) use elementwise::tests::noise;
