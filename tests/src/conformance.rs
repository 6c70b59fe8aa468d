//! One suite per domain trait, run against every implementation.

pub mod backend;
pub mod tier;
