//! Kvasir for Python: `kvasir._native`, on which the package `kvasir` is built.
//!
//! - `identity`: `Layout`, `Namespace`: what KV is, and how chunks are named;
//! - `client`: `Client`: calls of a daemon, blocking and for asyncio;
//! - `coding`: chunks in the form that they are stored in, and back; `profile`: `Profile`;
//! - `data`: bytes that come from a daemon, seen by Python without a copy;
//! - `cache`: `BlockCache`: blocks of an engine, found, loaded into its memory and stored;
//! - `save`: `Save`: blocks that are stored layer by layer;
//! - `residency`: `Residency`: which of an engine's blocks the daemon has;
//! - `slots`: `SlotCache`: the same, of an engine whose blocks only it understands;
//! - `memory`: that memory.
//!
//! All I/O, waiting, coding and copying runs without the GIL, on one runtime a process.

mod cache;
mod client;
mod coding;
mod data;
mod dlpack;
mod failure;
mod identity;
mod memory;
mod profile;
mod residency;
mod save;
mod slots;

use std::sync::OnceLock;

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use tokio::runtime::{Builder, Runtime};

use failure::{DecodeError, Error, ProfileError};

/// Threads for I/O. Decoding and copying have threads of their own.
const THREADS: usize = 2;

/// Where all calls run.
fn runtime() -> PyResult<&'static Runtime> {
    static RUNTIME: OnceLock<Result<Runtime, String>> = OnceLock::new();
    let runtime = RUNTIME.get_or_init(|| {
        let runtime = Builder::new_multi_thread()
            .worker_threads(THREADS)
            .thread_name("kvasir")
            .enable_all()
            .build();
        runtime.map_err(|error| error.to_string())
    });
    let runtime = runtime
        .as_ref()
        .map_err(|error| Error::new_err(error.clone()))?;
    // Whether it was told before does not matter: it is the same one.
    let _ = pyo3_async_runtimes::tokio::init_with_runtime(runtime);
    Ok(runtime)
}

fn invalid(error: impl std::fmt::Display) -> PyErr {
    PyValueError::new_err(error.to_string())
}

/// The native half of the package.
#[pymodule]
#[pyo3(name = "_native")]
fn native(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("Error", module.py().get_type::<Error>())?;
    module.add("DecodeError", module.py().get_type::<DecodeError>())?;
    module.add("ProfileError", module.py().get_type::<ProfileError>())?;
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    module.add_class::<identity::Layout>()?;
    module.add_class::<identity::Namespace>()?;
    module.add_class::<client::Client>()?;
    module.add_class::<client::Chunk>()?;
    module.add_class::<data::Data>()?;
    module.add_class::<profile::Profile>()?;
    module.add_class::<cache::BlockCache>()?;
    module.add_class::<cache::Load>()?;
    module.add_class::<save::Save>()?;
    module.add_class::<residency::Residency>()?;
    module.add_class::<slots::SlotCache>()?;
    Ok(())
}
