//! Content chunks: text whose KV is reused wherever it stands in a prompt.
//!
//! A prompt of retrieval is the same pieces of text in changing order. A prefix cache finds
//! none of them behind the first that moved. A *content chunk* is such a piece, of any length;
//! its key covers its own tokens and the canonical prefix that it was computed behind, usually
//! the one token that every prompt begins with. Putting one at another place turns its keys from
//! the positions they were computed at to those they have now, and leaves its values alone
//! ([`EngineBackend::write_moved`](crate::EngineBackend::write_moved)). The idea of reuse at any
//! position, with some tokens computed again, is that of CacheBlend (Yao et al.,
//! arXiv 2405.16444).
//!
//! ```text
//! Segmented   segments of a prompt ─ cut ─▶ ranges and keys
//! Gather      lookup ─ decide ─ get, decode ─▶ write_moved ─ the engine repairs some tokens
//! compile     a chunk alone behind the prefix ─ capture  (the engine does, in idle time)
//! ```
//!
//! Reuse of such a chunk is wrong where it depends on what stands before it; computing a few of
//! its tokens anew brings most of the quality of full prefill back. [`Selector`] says which,
//! [`Gate`] whether that was shown for a model, [`BlendPlan`] whether it is worth it for a prompt.
//!
//! # Why chunks are compiled alone
//! KV that was taken out of a request carries what stood before it: whoever writes the prefix
//! of a popular text could steer every prompt that reuses it, and recomputing some of its
//! tokens does not undo that. So the serving engine computes each chunk by itself behind the
//! canonical prefix, the key says which, and what is stored never changes. What was computed
//! *over* moved chunks is an approximation; engines must not capture it as prefix chunks.
//!
//! # Tenants
//! Keys carry the namespace of the tenant, so nobody reaches, or times, the chunks of others.
//! [`PluginConfig::corpus`](crate::PluginConfig::corpus) opts in to one more namespace, which is
//! looked in and never written.
//!
//! # What is not kept
//! Repaired rows live as long as their request. Cache-Craft (Agarwal et al., SIGMOD 2025) keeps them
//! as variants of a chunk, for requests that have the same chunks before it; over retrieval
//! traces that saves one percent at best of what is computed here (`kvasir-bench retrieval`, rows of
//! `variants`), since a repair is of few rows, and the same order again comes as a prefix.
//!
//! Not here: the layer loop that computes tokens anew, which is the engine's.

mod cuts;
mod gate;
mod gather;
mod gathering;
mod plan;
mod recorder;
mod segmented;
mod selector;

pub use cuts::ContentCuts;
pub use gate::{Gate, GateError, Quality, Repair};
pub use gather::{Gather, GatherOutcome};
pub use plan::{BlendPlan, Situation, Why};
pub use recorder::Recorder;
pub use segmented::{ChunkLimits, ContentChunk, Segment, Segmented};
pub use selector::{Check, Compared, Reused, Rule, Selection, Selector, largest};

pub(crate) use gather::start;
