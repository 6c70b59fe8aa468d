//! What kernels are launched with.
//!
//! A kernel takes one structure, whose fields are those of the structure of the same name in
//! rows.cu or attention.cu, in their order: addresses first, so that there are no gaps.

use kvasir_cuda::KernelSource;

use crate::kv::KvDtype;

/// The kernels; numbers.cu of `kvasir-cuda` comes before them.
pub(super) const SOURCE: KernelSource = KernelSource {
    name: c"engine.cu",
    text: concat!(include_str!("rows.cu"), include_str!("attention.cu")),
    options: &[],
};

/// Names of all kernels.
pub(super) const KERNELS: [&str; 26] = [
    "embed",
    "angles",
    "rms_norm",
    "heads",
    "append",
    "activate",
    "add_bias",
    "gather",
    "argmax",
    "move",
    "merge",
    "attend_rows_f32_64",
    "attend_rows_f32_128",
    "attend_rows_f32_256",
    "attend_rows_f32_512",
    "attend_tiles_f32",
    "attend_rows_f16_64",
    "attend_rows_f16_128",
    "attend_rows_f16_256",
    "attend_rows_f16_512",
    "attend_tiles_f16",
    "attend_rows_bf16_64",
    "attend_rows_bf16_128",
    "attend_rows_bf16_256",
    "attend_rows_bf16_512",
    "attend_tiles_bf16",
];

/// A launch of a kernel.
#[derive(Debug)]
pub(super) struct Launch {
    pub(super) kernel: &'static str,
    pub(super) blocks: u32,
    /// Of a block; whole warps.
    pub(super) threads: u32,
    pub(super) shared_bytes: u32,
    /// As the kernel takes them.
    pub(super) arguments: Vec<u8>,
}

impl Launch {
    /// One block for each row.
    pub(super) fn rows(kernel: &'static str, rows: usize, arguments: Vec<u8>) -> Self {
        Self {
            kernel,
            blocks: narrow(rows),
            threads: ROW_THREADS,
            shared_bytes: 0,
            arguments,
        }
    }

    /// One thread for each element.
    pub(super) fn elements(kernel: &'static str, elements: usize, arguments: Vec<u8>) -> Self {
        Self::rows(kernel, elements.div_ceil(ROW_THREADS as usize), arguments)
    }

    /// With so many floats of shared memory.
    #[must_use]
    pub(super) fn sharing(mut self, floats: usize) -> Self {
        self.shared_bytes = narrow(4 * floats);
        self
    }
}

/// Threads of blocks that go over a row.
pub(super) const ROW_THREADS: u32 = 128;
pub(super) const LANES: u32 = 32;

/// The number of an element type in kernels.
pub(super) const fn type_number(dtype: KvDtype) -> u32 {
    match dtype {
        KvDtype::F32 => 0,
        KvDtype::F16 => 1,
        KvDtype::Bf16 => 2,
    }
}

/// Counts of kernels, which are 32 bits wide.
///
/// # Panics
/// With what no device has room for.
pub(super) fn narrow(count: usize) -> u32 {
    u32::try_from(count).expect("a batch has fewer than 2^32 of anything")
}

/// Structures that kernels take.
macro_rules! arguments {
    ($($(#[$doc:meta])* $name:ident { $($field:ident: $kind:ty),* $(,)? })*) => {$(
        $(#[$doc])*
        #[derive(Clone, Copy, Debug)]
        pub(super) struct $name {
            $(pub(super) $field: $kind,)*
        }

        impl $name {
            /// As the kernel takes it: padded to whole addresses.
            pub(super) fn to_bytes(self) -> Vec<u8> {
                let mut bytes = Vec::new();
                $(bytes.extend(self.$field.to_le_bytes());)*
                bytes.resize(bytes.len().next_multiple_of(8), 0);
                bytes
            }
        }
    )*};
}

arguments! {
    /// Rows of the table of embeddings.
    Embed { tokens: u64, table: u64, stream: u64, hidden: u32, dtype: u32 }
    /// Cosines and sines of positions.
    Angles { positions: u64, radians: u64, angles: u64, pairs: u32, factor: f32 }
    /// RMSNorm of rows.
    Norm { stream: u64, weight: u64, out: u64, width: u32, dtype: u32, eps: f32 }
    /// Bias, norm and rotation of heads. Addresses may be 0.
    Heads {
        qkv: u64, bias: u64, q_norm: u64, k_norm: u64, angles: u64,
        rows: u32, heads: u32, kv_heads: u32, dim: u32, eps: f32,
    }
    /// K and V into pages.
    Append {
        qkv: u64, pool: u64, places: u64, heads: u32, kv_heads: u32, dim: u32, dtype: u32,
    }
    /// The activation of the MLP. The bias may be 0.
    Activate { gate_up: u64, bias: u64, out: u64, rows: u32, width: u32, dtype: u32 }
    /// A bias to rows.
    AddBias { values: u64, bias: u64, rows: u32, width: u32 }
    /// Some of the rows.
    Gather { from: u64, to: u64, rows: u64, width: u32 }
    /// The largest logits.
    Argmax { logits: u64, best: u64, vocab: u32 }
    /// A layer out of pages or into them.
    Move {
        pool: u64, payload: u64, blocks: u64,
        first_token: u32, tokens: u32, kv_heads: u32, row_words: u32, into_pages: u32,
    }
    /// Attention of units.
    Attend {
        queries: u64, pool: u64, positions: u64, blocks: u64, lists: u64, units: u64,
        partial: u64, out: u64,
        stride: u32, heads: u32, kv_heads: u32, dim: u32, window: u32, out_type: u32,
        scale: f32, unused: u32,
    }
    /// What units found of one row.
    Merge {
        partial: u64, units: u64, merges: u64, out: u64,
        heads: u32, dim: u32, out_type: u32, unused: u32,
    }
}
