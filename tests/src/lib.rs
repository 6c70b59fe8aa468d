//! Suites that every implementation of a trait must pass, and end-to-end tests.
//!
//! * [`conformance`]: one suite per domain trait, run from `tests/tests`.

#![forbid(unsafe_code)]

pub mod conformance;
