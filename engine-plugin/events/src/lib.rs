//! Which serving engine holds which blocks of KV.
//!
//! Engines publish what they store and evict; a router that reads it sends a prompt to the
//! engine that has computed its beginning. This crate is the part of that without sockets:
//!
//! * [`wire`]: batches of events as vLLM and SGLang send them, in msgpack, both ways;
//! * [`hash`]: vLLM's block hash `sha256_cbor`, so that a prompt's blocks have names before any
//!   engine has seen it;
//! * [`Publisher`] and [`Mirror`]: what one engine, or one cache daemon, holds, and whether that
//!   is known for certain;
//! * [`Index`]: all of them, and [`Index::locate`].
//!
//! It lies beside the engine plugin, because it speaks the engines' formats and names; the
//! sockets, the service and the program `kvasir-index` are the package around it, so that this
//! one is built and fuzzed without them.
//!
//! # What an answer promises
//! A publisher is in one of three [standings](Standing):
//!
//! | standing | offered | |
//! |---|---|---|
//! | [`Complete`](Standing::Complete) | all that it holds | every change since its start is known |
//! | [`Partial`](Standing::Partial) | some of what it holds | its beginning is not known, or the index was full |
//! | [`Behind`](Standing::Behind) | nothing | changes were missed, or it cannot be reached |
//!
//! So what is offered was there at the last change that has arrived. It may be gone since: an
//! engine evicts whenever it likes. An index never makes an answer wrong, only slower.
//!
//! # What it does not know
//! * An engine may hold a block twice under one hash, and says `BlockRemoved` when it drops the
//!   first. The index believes it: it offers too little rather than too much.
//! * Groups of layers with windows or state (`kv_cache_spec_kind` other than full attention) are
//!   kept and not counted: for models of both kinds, the prefix is what the full layers have.
//! * Event types that are not known are counted and left out. An engine that removes blocks by
//!   one of those is not followed correctly.
//! * Nothing of what is published is authenticated.
//!
//! # What bounds what
//! | resource | bound | at the bound |
//! |---|---|---|
//! | blocks of a publisher | [`Limits::blocks`] | more are not taken; it is [`Partial`](Standing::Partial) until it clears or starts over |
//! | media, groups, owners of a publisher | [`Limits::PLACES`] | blocks in further ones are not taken, likewise |
//! | batches that wait for a replay | [`Limits::held`], [`Limits::held_bytes`] | they are dropped, and replayed |
//!
//! A block takes 10 to 21 bytes of memory in each medium that holds it, half as much again while
//! its table grows (`cargo test --release -p kvasir-events --test memory -- --nocapture` prints
//! them).

#![forbid(unsafe_code)]

pub mod hash;
mod holdings;
mod index;
mod mirror;
mod publisher;
pub mod wire;

pub use holdings::{Held, Limits};
pub use index::{Index, Located, Source, SourceId};
pub use mirror::{Copy, Message, Mirror, OutOfStep};
pub use publisher::{Ask, Counts, Publisher, Standing};
