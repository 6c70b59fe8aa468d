//! Conformance suites, fault injection and end-to-end tests.
//!
//! Suites in [`conformance`] state a trait's contract and run against every
//! implementation; [`faulty`] is a device that fails; [`frame`]
//! finds a chunk on a stopped daemon's disk; [`crash`] ends stores and daemons at
//! any moment and checks what is left; [`soak`] keeps a daemon busy and watches its memory;
//! [`harness`] starts real processes and sits between them; [`relay`] does so with datagrams,
//! as a bad network; [`network`] makes hosts and links.

#![forbid(unsafe_code)]

pub mod conformance;
pub mod crash;
pub mod faulty;
pub mod frame;
pub mod harness;
pub mod network;
pub mod relay;
pub mod soak;
