//! Conformance suites, fault injection and end-to-end tests.
//!
//! Suites in [`conformance`] state a trait's contract and run against every
//! implementation; [`harness`] starts real processes and sits between them.

#![forbid(unsafe_code)]

pub mod conformance;
pub mod harness;
