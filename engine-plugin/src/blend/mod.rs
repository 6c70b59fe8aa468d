//! Reuse of chunks at any position, repaired where it matters.
//!
//! A prompt of retrieval holds the same chunks in changing order. KV of each, computed alone,
//! is wrong where a chunk depends on those before it; computing a few of its tokens anew brings
//! most of the quality of full prefill back (CacheBlend, Yao et al., arXiv 2405.16444).

mod gate;
mod plan;
mod selector;

pub use gate::{Gate, GateError, Quality, Repair};
pub use plan::{BlendPlan, Situation, Why};
pub use selector::{Check, Compared, Reused, Rule, Selection, Selector, largest};
