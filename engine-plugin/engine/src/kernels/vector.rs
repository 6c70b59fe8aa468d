//! Loads and stores of AVX-512 registers from arrays.
//!
//! Arithmetic intrinsics are safe inside functions compiled for their
//! instruction set; only memory access is not.

use std::arch::x86_64::{__m512, _mm512_loadu_ps, _mm512_storeu_ps};

/// f32 lanes of one register.
pub(crate) const LANES: usize = 16;

/// The 16 elements of `from`.
#[target_feature(enable = "avx512f")]
#[inline]
pub(crate) fn load(from: &[f32; LANES]) -> __m512 {
    // SAFETY: `from` is 16 readable f32; the load needs no alignment.
    unsafe { _mm512_loadu_ps(from.as_ptr()) }
}

/// Overwrites `to`.
#[target_feature(enable = "avx512f")]
#[inline]
pub(crate) fn store(to: &mut [f32; LANES], value: __m512) {
    // SAFETY: `to` is 16 writable f32; the store needs no alignment.
    unsafe { _mm512_storeu_ps(to.as_mut_ptr(), value) }
}
