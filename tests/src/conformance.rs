//! One suite per domain trait, run against every implementation.

pub mod tier;
