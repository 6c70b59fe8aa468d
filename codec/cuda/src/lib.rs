//! Decoding of KV cache objects on a GPU.
//!
//! A [`CudaDecoder`] turns the parts of encoded layers into values in the memory of a device:
//! what travels over PCIe is what the codec made of a layer, not the layer. It writes raw
//! layers, or straight into the pages of an engine: see [`Placement`].
//!
//! # How
//! A cell, 64 tokens of a few heads, is one rANS stream of 32 lanes: a warp. The lanes share a
//! sequence of words (Giesen, arXiv 1402.3392), and each finds its next word by a vote of all
//! and a count of those before it. Base symbols come from a table in the cache; the class of a
//! channel stays the same for 64 tokens, so the tables of refinements are in registers.
//! Between levels a warp keeps its numbers in memory, 2 bytes a value. After the last it adds
//! offsets, puts back outliers and exact tokens, turns keys, rounds, and stores.
//!
//! # What is checked where
//! The host reads heads, checks every checksum and every size, and refuses all that
//! [`LayerCodec::decode`](kvasir_codec::LayerCodec::decode) refuses before it looks at symbols.
//! Only what words decode to is left: the kernel reads none beyond their end, and each cell
//! reports whether it ended as it should.
//!
//! # Where there is no GPU
//! No library of CUDA is linked: the driver and NVRTC, which compiles the kernel for the device
//! at hand, are looked for at run time, and [`CudaUnavailable`] says which is missing. The
//! same source compiles as C++ against a warp of coroutines (`emulation/`), and so tests
//! compare the kernel with the CPU's decoder on any machine.
//!
//! The engine's kernels are compiled and emulated in the same way: [`compile_kernels`] and
//! `emulation/warp.h` are theirs too.
//!
//! Not here: chunks with a profile, whose bases need a matrix product a token
//! ([`PlanError::Profile`](kvasir_codec::PlanError::Profile)); encoding; lossless layers.

mod batch;
mod compile;
mod decoder;
mod placement;
#[cfg(test)]
mod tests;

pub use batch::{BatchError, LayerJob};
pub use compile::{
    ComputeCapability, KernelSource, compile_kernels, has_compiler, known_capabilities,
};
pub use cudarc::driver::CudaSlice;
pub use decoder::{CudaDecodeError, CudaDecoder, CudaTimings, CudaUnavailable};
pub use kvasir_codec::LayerCodec;
pub use placement::{Placement, PlacementError, PlanePlacement};
