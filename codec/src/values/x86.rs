//! Kernels for x86-64: the loops of the scalar code, compiled for wider registers, and the
//! conversions that have instructions of their own.

#![expect(
    unsafe_code,
    reason = "features are checked at run time, and stores take pointers"
)]

use std::arch::x86_64::*;

use half::f16;
use kvasir_types::DType;

use super::{Angles, Block, LANES, loops};

pub(super) fn has_avx512() -> bool {
    is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512dq")
}

pub(super) fn has_avx2() -> bool {
    is_x86_feature_detected!("avx2") && is_x86_feature_detected!("f16c")
}

pub(super) fn write_avx512(block: Block<'_>, dtype: DType, out: &mut [u8], stride: usize) {
    assert!(has_avx512(), "checked when the kernel was chosen");
    // SAFETY: the CPU has the features.
    unsafe { avx512::write(block, dtype, out, stride) }
}

pub(super) fn write_avx2(block: Block<'_>, dtype: DType, out: &mut [u8], stride: usize) {
    assert!(has_avx2(), "checked when the kernel was chosen");
    // SAFETY: the CPU has the features.
    unsafe { avx2::write(block, dtype, out, stride) }
}

pub(super) fn turn_avx512(
    blocks: [Block<'_>; 2],
    angles: Angles<'_>,
    dtype: DType,
    out: &mut [u8],
    places: (usize, usize),
) {
    assert!(has_avx512(), "checked when the kernel was chosen");
    // SAFETY: the CPU has the features.
    unsafe { avx512::turn(blocks, angles, dtype, out, places) }
}

pub(super) fn turn_avx2(
    blocks: [Block<'_>; 2],
    angles: Angles<'_>,
    dtype: DType,
    out: &mut [u8],
    places: (usize, usize),
) {
    assert!(has_avx2(), "checked when the kernel was chosen");
    // SAFETY: the CPU has the features.
    unsafe { avx2::turn(blocks, angles, dtype, out, places) }
}

/// # Panics
/// The CPU has no AVX2.
pub(super) fn load_f16(bytes: &[u8], values: &mut [f32]) {
    assert!(has_avx2(), "checked when the kernel was chosen");
    // SAFETY: the CPU has the features.
    unsafe { avx2::load_f16(bytes, values) }
}

/// # Panics
/// The CPU has no AVX2.
pub(super) fn store_f16(values: &[f32], out: &mut [u8]) {
    assert!(has_avx2(), "checked when the kernel was chosen");
    // SAFETY: the CPU has the features.
    unsafe { avx2::store_f16(values, out) }
}

mod avx512 {
    use super::*;

    loops!(
        #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
        write,
        turn,
        store
    );

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
    fn store(dtype: DType, values: &[f32; LANES], out: &mut [u8]) {
        if dtype != DType::F16 {
            return store_others(dtype, values, out);
        }
        let out: &mut [u8; 2 * LANES] = out.first_chunk_mut().expect("room for a row");
        let (halves, _) = out.as_chunks_mut::<LANES>();
        for (half, values) in halves.iter_mut().zip(values.as_chunks::<16>().0) {
            // SAFETY: 16 values are a register, and half of one once they are converted.
            unsafe {
                let values = _mm512_loadu_ps(values.as_ptr());
                let converted = _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(values);
                _mm256_storeu_si256(half.as_mut_ptr().cast(), converted);
            }
        }
    }
}

mod avx2 {
    use super::*;

    loops!(
        #[target_feature(enable = "avx2,f16c")]
        write,
        turn,
        store
    );

    #[inline]
    #[target_feature(enable = "avx2,f16c")]
    fn store(dtype: DType, values: &[f32; LANES], out: &mut [u8]) {
        if dtype != DType::F16 {
            return store_others(dtype, values, out);
        }
        let out: &mut [u8; 2 * LANES] = out.first_chunk_mut().expect("room for a row");
        let (quarters, _) = out.as_chunks_mut::<16>();
        for (quarter, values) in quarters.iter_mut().zip(values.as_chunks::<8>().0) {
            // SAFETY: eight values are a register, and half of one once they are converted.
            unsafe {
                let values = _mm256_loadu_ps(values.as_ptr());
                let converted = _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(values);
                _mm_storeu_si128(quarter.as_mut_ptr().cast(), converted);
            }
        }
    }

    #[target_feature(enable = "avx2,f16c")]
    pub(super) fn store_f16(values: &[f32], out: &mut [u8]) {
        let (some, rest) = values.as_chunks::<8>();
        let (to, last) = out.as_chunks_mut::<16>();
        for (values, bytes) in some.iter().zip(to) {
            // SAFETY: eight values are a register, and half of one once they are converted.
            unsafe {
                let values = _mm256_loadu_ps(values.as_ptr());
                let converted = _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(values);
                _mm_storeu_si128(bytes.as_mut_ptr().cast(), converted);
            }
        }
        for (&value, bytes) in rest.iter().zip(last.as_chunks_mut().0) {
            *bytes = f16::from_f32(value).to_le_bytes();
        }
    }

    #[target_feature(enable = "avx2,f16c")]
    pub(super) fn load_f16(bytes: &[u8], values: &mut [f32]) {
        let (some, rest) = bytes.as_chunks::<16>();
        let (to, last) = values.as_chunks_mut::<8>();
        for (bytes, values) in some.iter().zip(to) {
            // SAFETY: eight values are a register, and half of one before they are converted.
            unsafe {
                let halves = _mm_loadu_si128(bytes.as_ptr().cast());
                _mm256_storeu_ps(values.as_mut_ptr(), _mm256_cvtph_ps(halves));
            }
        }
        for (value, &bytes) in last.iter_mut().zip(rest.as_chunks().0) {
            *value = f16::from_le_bytes(bytes).to_f32();
        }
    }
}

/// What needs no instructions of its own, in the terms of whole numbers, so that the
/// compiler has it in the registers that its caller has.
#[inline(always)]
fn store_others(dtype: DType, values: &[f32; LANES], out: &mut [u8]) {
    match dtype {
        DType::Bf16 => {
            let (slots, _) = out.as_chunks_mut();
            for (slot, value) in slots.iter_mut().zip(values) {
                let bits = value.to_bits();
                let upper = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
                let quiet = bits >> 16 | 0x40;
                let [a, b, ..] = if value.is_nan() { quiet } else { upper }.to_le_bytes();
                *slot = [a, b];
            }
        }
        _ => super::store_scalar(dtype, values, out),
    }
}
