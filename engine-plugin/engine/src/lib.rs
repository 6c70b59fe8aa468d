//! A CPU inference engine for Llama-family models with paged KV.
//!
//! The compute half: [`checkpoint`] reads weights, [`config`] says what the
//! model is and refuses what the engine cannot run exactly, [`kv`] holds the
//! pages, [`model`] runs batches of steps over them, [`paging`] says which of them are
//! worth reading, [`kernels`] does the arithmetic.
//!
//! The serving half: [`scheduler`] batches sequences over the pages on one engine
//! thread, [`cache`] shows those pages to the plugin, [`blend`] computes a part of chunks anew
//! that are reused elsewhere, [`sampling`] chooses tokens,
//! [`request`] is what callers ask and are told. [`logits`] is what measurements read of a row.
//!
//! [`device`] is the compute half on a GPU.
//!
//! # Determinism
//!
//! A row of logits depends on the weights, on the tokens up to that row and on
//! the K and V bytes in its pages; not on what else is in the batch, on how a
//! prompt was split into steps, nor on the number of threads. Every sum is
//! taken in one fixed order: products in chunks of [`kernels::K_CHUNK`],
//! attention in tiles of [`kernels::KEY_TILE`] keys counted from position 0.
//! This holds for finite V; otherwise which rows become NaN may depend on the
//! split into steps. So a prefix loaded from the cache in the pool's own element type gives the
//! same bits as one computed here.
//!
//! The arithmetic differs in its last bits between instruction sets only where
//! a CPU has no fused multiply-add. Nothing of this holds on a [`device`].

#![deny(unsafe_code)]

pub mod blend;
pub mod cache;
pub mod chat;
pub mod checkpoint;
pub mod config;
pub mod device;
pub mod http;
pub mod kernels;
pub mod kv;
pub mod logits;
pub mod metrics;
pub mod model;
pub mod paging;
pub mod request;
pub mod rope;
pub mod sampling;
pub mod scheduler;
pub mod tokenizer;

pub use checkpoint::CheckpointError;
pub use config::{Architecture, ConfigError, ModelConfig};
pub use kernels::Threads;
pub use kv::{BLOCK_TOKENS, BlockId, KvDtype, KvError, KvPool};
pub use model::{
    BeforeLayer, Fate, ForwardError, LoadError, Logits, LogitsWanted, Model, Pages, Positions,
    Scratch, Step,
};
pub use paging::{
    Backing, Pager, PagerStats, PagingError, Replacement, ScratchBits, ScratchFile, Stalls,
};
