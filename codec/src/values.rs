//! Numbers to the bytes of a raw layer, and its bytes to values.
//!
//! A value is `number * step + offset`; keys are then turned by the angles of their token.
//! Both are rounded after each operation, and then to the type, to nearest and even, so
//! that kernels and the code here give the same bytes.

#[cfg(target_arch = "x86_64")]
mod x86;

use half::{bf16, f16};
use kvasir_types::DType;
use multiversion::multiversion;

use crate::rans::{LANES, Row};

/// A block of channels of some tokens, as numbers.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Block<'a> {
    /// A row a token.
    pub(crate) rows: &'a [Row],
    pub(crate) offsets: &'a [f32; LANES],
    pub(crate) step: f32,
}

/// How pairs of channels are turned: by token, as many as there are pairs.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Angles<'a> {
    pub(crate) cos: &'a [f32],
    pub(crate) sin: &'a [f32],
    pub(crate) pairs: usize,
    /// What lengths are multiplied by.
    pub(crate) factor: f32,
}

/// Writes the values of a block, a token every `stride` bytes.
///
/// # Panics
/// `out` has not the bytes of so many tokens.
pub(crate) fn write(block: Block<'_>, dtype: DType, out: &mut [u8], stride: usize) {
    KERNEL.write(block, dtype, out, stride);
}

/// Writes the values of two blocks that are turned against each other, of which the second
/// lies `apart` bytes beyond the first.
///
/// # Panics
/// As for [`write`]; or there are fewer angles than tokens.
pub(crate) fn write_turned(
    blocks: [Block<'_>; 2],
    angles: Angles<'_>,
    dtype: DType,
    out: &mut [u8],
    (stride, apart): (usize, usize),
) {
    KERNEL.write_turned(blocks, angles, dtype, out, (stride, apart));
}

/// The loops of a kernel, whatever stores a row.
macro_rules! loops {
    ($(#[$features:meta])* $write:ident, $turn:ident, $store:path) => {
        $(#[$features])*
        pub(super) fn $write(block: Block<'_>, dtype: DType, out: &mut [u8], stride: usize) {
            let size = LANES * dtype.bytes();
            let step = block.step;
            for (row, out) in block.rows.iter().zip(out.chunks_mut(stride)) {
                let mut values = [0.0; LANES];
                for lane in 0..LANES {
                    values[lane] = f32::from(row[lane]) * step + block.offsets[lane];
                }
                $store(dtype, &values, &mut out[..size]);
            }
        }

        $(#[$features])*
        pub(super) fn $turn(
            [first, second]: [Block<'_>; 2],
            angles: Angles<'_>,
            dtype: DType,
            out: &mut [u8],
            (stride, apart): (usize, usize),
        ) {
            let size = LANES * dtype.bytes();
            let cos = angles.cos.chunks(angles.pairs);
            let sin = angles.sin.chunks(angles.pairs);
            let rows = first.rows.iter().zip(second.rows);
            let (factor, step) = (angles.factor, first.step);
            for ((out, (cos, sin)), (a, b)) in out.chunks_mut(stride).zip(cos.zip(sin)).zip(rows) {
                let (mut x, mut y) = ([0.0; LANES], [0.0; LANES]);
                let (cos, sin) = (&cos[..LANES], &sin[..LANES]);
                for lane in 0..LANES {
                    let (cos, sin) = (cos[lane], sin[lane]);
                    let a = f32::from(a[lane]) * step + first.offsets[lane];
                    let b = f32::from(b[lane]) * step + second.offsets[lane];
                    x[lane] = (a * cos - b * sin) * factor;
                    y[lane] = (b * cos + a * sin) * factor;
                }
                $store(dtype, &x, &mut out[..size]);
                $store(dtype, &y, &mut out[apart..apart + size]);
            }
        }
    };
}
#[cfg(target_arch = "x86_64")]
use loops;

mod scalar {
    use super::*;

    loops!(write, turn, store_values);

    fn store_values(dtype: DType, values: &[f32; LANES], out: &mut [u8]) {
        super::store_scalar(dtype, values, out);
    }
}
use scalar::{turn as turn_scalar, write as write_scalar};

/// Stores values.
///
/// # Panics
/// The type is none of 16 or 32 bits.
pub(crate) fn store(dtype: DType, values: &[f32], out: &mut [u8]) {
    match dtype {
        #[cfg(target_arch = "x86_64")]
        DType::F16 if *KERNEL != Kernel::Scalar => x86::store_f16(values, out),
        _ => store_scalar(dtype, values, out),
    }
}

fn store_scalar(dtype: DType, values: &[f32], out: &mut [u8]) {
    match dtype {
        DType::F16 => {
            for (slot, &value) in out.as_chunks_mut().0.iter_mut().zip(values) {
                *slot = f16::from_f32(value).to_le_bytes();
            }
        }
        DType::Bf16 => {
            for (slot, &value) in out.as_chunks_mut().0.iter_mut().zip(values) {
                *slot = bf16::from_f32(value).to_le_bytes();
            }
        }
        DType::F32 => {
            for (slot, value) in out.as_chunks_mut().0.iter_mut().zip(values) {
                *slot = value.to_le_bytes();
            }
        }
        _ => unreachable!("checked when the codec was made"),
    }
}

/// Multiplies the numbers of a block by a step: a row of values every `stride`.
#[multiversion(targets(
    "x86_64+avx512f+avx512bw+avx512vl+avx512dq+avx2+fma",
    "x86_64+avx2+fma"
))]
pub(crate) fn scale(numbers: &[Row], step: f32, values: &mut [f32], stride: usize) {
    for (numbers, values) in numbers.iter().zip(values.chunks_mut(stride)) {
        for (value, &number) in values.iter_mut().zip(numbers) {
            *value = f32::from(number) * step;
        }
    }
}

/// Reads values, with RoPE still done.
///
/// # Panics
/// As for [`store`].
pub(crate) fn load(dtype: DType, bytes: &[u8], values: &mut [f32]) {
    match dtype {
        #[cfg(target_arch = "x86_64")]
        DType::F16 if *KERNEL != Kernel::Scalar => x86::load_f16(bytes, values),
        DType::F16 => load_f16(bytes, values),
        DType::Bf16 => load_bf16(bytes, values),
        DType::F32 => {
            for (value, &bytes) in values.iter_mut().zip(bytes.as_chunks().0) {
                *value = f32::from_le_bytes(bytes);
            }
        }
        _ => unreachable!("checked when the codec was made"),
    }
}

fn load_f16(bytes: &[u8], values: &mut [f32]) {
    for (value, &bytes) in values.iter_mut().zip(bytes.as_chunks().0) {
        *value = f16::from_le_bytes(bytes).to_f32();
    }
}

#[multiversion(targets(
    "x86_64+avx512f+avx512bw+avx512vl+avx512dq+avx2+fma",
    "x86_64+avx2+fma"
))]
fn load_bf16(bytes: &[u8], values: &mut [f32]) {
    for (value, &bytes) in values.iter_mut().zip(bytes.as_chunks().0) {
        *value = f32::from_bits(u32::from(u16::from_le_bytes(bytes)) << 16);
    }
}

/// Turns pairs of values by angles given as cosine and sine: `first[i]` and `second[i]`.
#[multiversion(targets(
    "x86_64+avx512f+avx512bw+avx512vl+avx512dq+avx2+fma",
    "x86_64+avx2+fma"
))]
pub(crate) fn turn(first: &mut [f32], second: &mut [f32], cos: &[f32], sin: &[f32]) {
    let pairs = first.iter_mut().zip(second).zip(cos.iter().zip(sin));
    for ((a, b), (&cos, &sin)) in pairs {
        (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kernel {
    #[cfg(target_arch = "x86_64")]
    Avx512,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    Scalar,
}

static KERNEL: std::sync::LazyLock<Kernel> = std::sync::LazyLock::new(|| Kernel::available()[0]);

impl Kernel {
    /// Those that this CPU has, best first.
    fn available() -> Vec<Self> {
        let mut kernels = vec![Self::Scalar];
        #[cfg(target_arch = "x86_64")]
        {
            if x86::has_avx2() {
                kernels.push(Self::Avx2);
            }
            if x86::has_avx512() {
                kernels.push(Self::Avx512);
            }
        }
        kernels.reverse();
        kernels
    }

    fn write(self, block: Block<'_>, dtype: DType, out: &mut [u8], stride: usize) {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => x86::write_avx512(block, dtype, out, stride),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => x86::write_avx2(block, dtype, out, stride),
            Self::Scalar => write_scalar(block, dtype, out, stride),
        }
    }

    fn write_turned(
        self,
        blocks: [Block<'_>; 2],
        angles: Angles<'_>,
        dtype: DType,
        out: &mut [u8],
        places: (usize, usize),
    ) {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => x86::turn_avx512(blocks, angles, dtype, out, places),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => x86::turn_avx2(blocks, angles, dtype, out, places),
            Self::Scalar => turn_scalar(blocks, angles, dtype, out, places),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Of all sizes: what is rounded to nothing, what is subnormal, what overflows.
    fn any_value() -> impl Strategy<Value = f32> {
        prop_oneof![
            (-10.0..10.0f32),
            (-30.0..30.0f32).prop_map(|exponent| exponent.exp2()),
            (-1e5..1e5f32),
            Just(3.3e38)
        ]
    }

    proptest! {
        #[test]
        fn kernels_write_the_same_bytes(
            numbers in prop::collection::vec(-571..=571i16, LANES),
            offsets in prop::collection::vec(any_value(), 2 * LANES),
            (step, factor) in (any_value(), 0.5..2.0f32),
            angles in prop::collection::vec(-1.0..1.0f32, 4 * 48),
            dtype in prop::sample::select(vec![DType::F16, DType::Bf16, DType::F32]),
        ) {
            let rows: Vec<Row> = (0..4i16)
                .map(|token| std::array::from_fn(|lane| numbers[lane].wrapping_mul(token)))
                .collect();
            let (offsets, _) = offsets.as_chunks();
            let block = |at: usize| Block { rows: &rows, offsets: &offsets[at], step };
            let angles = Angles { cos: &angles, sin: &angles[16..], pairs: 48, factor };
            let stride = 5 * LANES * dtype.bytes();
            let apart = 3 * LANES * dtype.bytes();
            let mut reference = vec![7; 4 * stride];
            let mut turned = reference.clone();
            write_scalar(block(0), dtype, &mut reference, stride);
            turn_scalar([block(0), block(1)], angles, dtype, &mut turned, (stride, apart));
            for kernel in Kernel::available() {
                let mut out = vec![7; 4 * stride];
                kernel.write(block(0), dtype, &mut out, stride);
                prop_assert_eq!(&out, &reference, "{:?}", kernel);
                out.fill(7);
                let blocks = [block(0), block(1)];
                kernel.write_turned(blocks, angles, dtype, &mut out, (stride, apart));
                prop_assert_eq!(&out, &turned, "{:?}", kernel);
            }
        }

        #[test]
        fn kernels_store_the_same_bytes(values in prop::collection::vec(any_value(), 0..50)) {
            let mut reference = vec![7; 2 * values.len()];
            let mut out = reference.clone();
            store_scalar(DType::F16, &values, &mut reference);
            store(DType::F16, &values, &mut out);
            prop_assert_eq!(out, reference);
        }

        #[test]
        fn every_half_is_read_as_it_is(from in any::<u16>(), count in 0..50u16) {
            let halves = (0..count).map(|at| from.wrapping_add(at * 77));
            let bytes: Vec<u8> = halves.flat_map(u16::to_le_bytes).collect();
            let mut reference = vec![0.0; count.into()];
            let mut values = reference.clone();
            load_f16(&bytes, &mut reference);
            load(DType::F16, &bytes, &mut values);
            let bits = |values: &[f32]| values.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
            prop_assert_eq!(bits(&values), bits(&reference));
        }
    }
}
