//! What lifetimes and limits are kept with: std's types, or loom's, which can try every
//! order in which threads take their steps.
//!
//! Only the modules whose mistakes would be use after free, or memory beyond the budget,
//! take these; see `models`. loom has no `Weak`, and its `Arc` no `dyn`.

#[cfg(kvasir_loom)]
pub(crate) use loom::sync::{Arc, Mutex, MutexGuard, RwLock, RwLockReadGuard, atomic};
#[cfg(not(kvasir_loom))]
pub(crate) use std::sync::{Arc, Mutex, MutexGuard, RwLock, RwLockReadGuard, atomic};
