//! Long contexts without all of their KV: which pages are worth attending to.
//!
//! Decoding a token reads all K and V of its sequence, of which attention makes little use.
//! [`Digests`] stay in memory when pages do not; a [`Selector`] judges pages by them and the
//! queries of the token at hand, per layer and KV head; and attention reads what was chosen
//! ([`crate::Pages`]), nothing else.
//!
//! ```text
//! digests.extend(pool, blocks, tokens)            after prefill, and every 16 tokens
//! model.forward(…, |before| {
//!     let pages = selector.choose(&before, step, &digests, blocks);
//!     // here whoever moves pages has them come, into the blocks of the table
//!     before.pages[step] = pages;
//! })
//! ```
//!
//! What is never read may be anywhere: the blocks that the page table names for pages that
//! are not chosen need not hold them. Nothing here does I/O, nor knows where pages are.
//!
//! # What is always read
//!
//! Pages without a digest, that is the last one that is not full yet; the first pages and the
//! most recent ones ([`Options::sinks`], [`Options::recent`]); all pages in the first layers,
//! on request ([`Options::exact_layers`]), and in layers with a window of their own, which
//! see few pages anyway. They count against the budget. With a budget of everything, the
//! result has the bits of full attention.
//!
//! # Costs
//!
//! Digests take 5.7 % of K and V in f16 ([`Digests::bytes`]). A choice looks at the box of every
//! group, and at all tokens of the groups that it opens, once a query: most, where attention is
//! even, and then it takes longer than reading the pages that it chose. `kvasir-bench select`
//! measures that.
//!
//! Units: scores are logits, `query · key / sqrt(head_dim)`; budgets are shares of a
//! sequence's pages, which is its bytes.

mod digest;
mod estimate;
mod refine;
mod select;
mod vote;

pub use digest::{Detail, Digests, GROUP_PAGES};
pub use estimate::page_weights;
pub use select::{Options, Rule, Selector, Vote};

#[cfg(test)]
mod tests;
