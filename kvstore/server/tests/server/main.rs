//! The daemon, over real sockets.

#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "a test that cannot go on should panic; test values are small"
)]

mod calls;
mod command;
mod daemon;
mod data_plane;
mod holding;
mod lifecycle;
mod profiles;
mod refusals;
mod support;
mod transfers;
mod watching;
