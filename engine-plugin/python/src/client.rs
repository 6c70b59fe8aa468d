//! Calls of a daemon.

use std::time::{Duration, Instant};

use bytes::Bytes;
use kvasir_client::{
    CallError, Client as Calls, ClientConfig, GetEvent, GetOptions, PutOptions, PutOutcome,
};
use kvasir_types::{ChunkKey, Durability, Level};
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::data::{self, Data};
use crate::identity::{Layout, keys};
use crate::{Error, failed, invalid, runtime};

/// A daemon. Does not wait for it: calls fail until it is there.
#[pyclass(frozen, module = "kvasir")]
#[derive(Debug)]
pub(crate) struct Client(Calls);

/// A chunk that came: its layout, and its layers in order, each as the layout says.
#[pyclass(frozen, get_all, module = "kvasir")]
#[derive(Debug)]
pub(crate) struct Chunk {
    layout: Layout,
    layers: Vec<Py<Data>>,
}

/// The same, away from Python.
struct Came {
    layout: Layout,
    layers: Vec<Bytes>,
}

/// Why chunks did not come.
enum Failure {
    Call(CallError),
    /// This one is not raw.
    Encoded(usize, Level),
}

impl From<CallError> for Failure {
    fn from(error: CallError) -> Self {
        Self::Call(error)
    }
}

impl From<Failure> for PyErr {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Call(error) => failed(&error),
            Failure::Encoded(chunk, level) => Error::new_err(format!(
                "chunk {chunk} is stored at level {level}; only raw chunks can be read here"
            )),
        }
    }
}

async fn get(
    client: &Calls,
    keys: Vec<ChunkKey>,
    timeout: Option<Duration>,
) -> Result<Vec<Came>, Failure> {
    let options = GetOptions {
        deadline: timeout.map(|timeout| Instant::now() + timeout),
        ..GetOptions::default()
    };
    let mut stream = client.get(&keys, options).await?;
    let mut chunks = Vec::new();
    for (index, info) in stream.chunks().iter().enumerate() {
        if info.level.is_encoded() {
            return Err(Failure::Encoded(index, info.level));
        }
        chunks.push(Came {
            layout: Layout(info.layout),
            layers: Vec::with_capacity(info.layout.layers().into()),
        });
    }
    while let Some(event) = stream.next().await? {
        match event {
            // Layers come in order; those of chunks that are lost may have come before.
            GetEvent::Layer { chunk, parts, .. } => {
                if let Some(chunk) = chunks.get_mut(chunk) {
                    chunk.layers.extend(parts);
                }
            }
            GetEvent::Lost { chunk, .. } => chunks.truncate(chunk),
            GetEvent::Prelude { .. } => (),
        }
    }
    Ok(chunks)
}

fn chunks(py: Python<'_>, came: Vec<Came>) -> PyResult<Vec<Py<Chunk>>> {
    let chunk = |came: Came| {
        let layers = came
            .layers
            .into_iter()
            .map(|bytes| Py::new(py, Data(bytes)));
        let layers = layers.collect::<PyResult<_>>()?;
        let layout = came.layout;
        Py::new(py, Chunk { layout, layers })
    };
    came.into_iter().map(chunk).collect()
}

fn chunk(
    key: [u8; 32],
    layout: Layout,
    bytes: &Bound<'_, PyAny>,
) -> PyResult<kvasir_client::Chunk> {
    let bytes = data::bytes(bytes)?;
    if bytes.len() as u64 != layout.0.chunk_bytes() {
        return Err(invalid(format!(
            "a chunk of this layout has {} bytes, the data {}",
            layout.0.chunk_bytes(),
            bytes.len()
        )));
    }
    let layer = layout.0.layer_bytes();
    let layers =
        (0..usize::from(layout.0.layers())).map(|at| bytes.slice(at * layer..(at + 1) * layer));
    Ok(kvasir_client::Chunk {
        key: ChunkKey::from_bytes(key),
        layout: layout.0,
        level: Level::RAW,
        extents: layers.collect(),
    })
}

fn put_options(durable: bool) -> PutOptions {
    PutOptions {
        durability: if durable {
            Durability::Durable
        } else {
            Durability::Memory
        },
        ..PutOptions::default()
    }
}

fn seconds(timeout: Option<f64>) -> PyResult<Option<Duration>> {
    let duration = |seconds| {
        Duration::try_from_secs_f64(seconds)
            .map_err(|_| invalid(format!("a timeout of {seconds} seconds is none")))
    };
    timeout.map(duration).transpose()
}

#[pymethods]
impl Client {
    #[new]
    #[pyo3(signature = (endpoint = "127.0.0.1:7420", *, call_timeout = None, transfer_timeout = None))]
    fn new(
        endpoint: &str,
        call_timeout: Option<f64>,
        transfer_timeout: Option<f64>,
    ) -> PyResult<Self> {
        let defaults = ClientConfig::default();
        let config = ClientConfig {
            endpoint: endpoint.parse().map_err(invalid)?,
            call_timeout: seconds(call_timeout)?.unwrap_or(defaults.call_timeout),
            transfer_timeout: seconds(transfer_timeout)?.unwrap_or(defaults.transfer_timeout),
            ..defaults
        };
        let _runtime = runtime()?.enter();
        Ok(Self(Calls::connect_lazy(config)))
    }

    /// How many of the leading chunks are there.
    fn lookup(&self, py: Python<'_>, keys: Vec<[u8; 32]>) -> PyResult<usize> {
        let (client, keys, runtime) = (&self.0, self::keys(keys), runtime()?);
        py.detach(|| runtime.block_on(client.lookup(&keys)))
            .map(|lookup| lookup.prefix_chunks)
            .map_err(|error| failed(&error))
    }

    fn lookup_async<'py>(
        &self,
        py: Python<'py>,
        keys: Vec<[u8; 32]>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let (client, keys) = (self.0.clone(), self::keys(keys));
        runtime()?;
        pyo3_async_runtimes::tokio::future_into_py(py, async move {
            let lookup = client.lookup(&keys).await;
            lookup
                .map(|it| it.prefix_chunks)
                .map_err(|error| failed(&error))
        })
    }

    /// Stores a chunk; true if it was not there. Its bytes are not copied: leave them as they are
    /// until this returns.
    #[pyo3(signature = (key, layout, data, *, durable = true))]
    fn put(
        &self,
        py: Python<'_>,
        key: [u8; 32],
        layout: Layout,
        data: &Bound<'_, PyAny>,
        durable: bool,
    ) -> PyResult<bool> {
        let (chunk, runtime) = (chunk(key, layout, data)?, runtime()?);
        let put = self.0.put_with(&chunk, put_options(durable));
        py.detach(|| runtime.block_on(put))
            .map(|put| put.outcome == PutOutcome::Stored)
            .map_err(|error| failed(&error))
    }

    #[pyo3(signature = (key, layout, data, *, durable = true))]
    fn put_async<'py>(
        &self,
        py: Python<'py>,
        key: [u8; 32],
        layout: Layout,
        data: &Bound<'_, PyAny>,
        durable: bool,
    ) -> PyResult<Bound<'py, PyAny>> {
        let (client, chunk) = (self.0.clone(), chunk(key, layout, data)?);
        runtime()?;
        pyo3_async_runtimes::tokio::future_into_py(py, async move {
            let put = client.put_with(&chunk, put_options(durable)).await;
            put.map(|put| put.outcome == PutOutcome::Stored)
                .map_err(|error| failed(&error))
        })
    }

    /// The leading chunks that are there and came whole.
    #[pyo3(signature = (keys, *, timeout = None))]
    fn get(
        &self,
        py: Python<'_>,
        keys: Vec<[u8; 32]>,
        timeout: Option<f64>,
    ) -> PyResult<Vec<Py<Chunk>>> {
        let (timeout, runtime) = (seconds(timeout)?, runtime()?);
        let came = py.detach(|| runtime.block_on(get(&self.0, self::keys(keys), timeout)))?;
        chunks(py, came)
    }

    #[pyo3(signature = (keys, *, timeout = None))]
    fn get_async<'py>(
        &self,
        py: Python<'py>,
        keys: Vec<[u8; 32]>,
        timeout: Option<f64>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let (client, timeout) = (self.0.clone(), seconds(timeout)?);
        runtime()?;
        pyo3_async_runtimes::tokio::future_into_py(py, async move {
            let came = get(&client, self::keys(keys), timeout).await?;
            Python::attach(|py| chunks(py, came))
        })
    }

    /// Deletes chunks; how many were there.
    fn delete(&self, py: Python<'_>, keys: Vec<[u8; 32]>) -> PyResult<u32> {
        let (client, keys, runtime) = (&self.0, self::keys(keys), runtime()?);
        py.detach(|| runtime.block_on(client.delete(&keys)))
            .map_err(|error| failed(&error))
    }

    fn delete_async<'py>(
        &self,
        py: Python<'py>,
        keys: Vec<[u8; 32]>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let (client, keys) = (self.0.clone(), self::keys(keys));
        runtime()?;
        pyo3_async_runtimes::tokio::future_into_py(py, async move {
            client.delete(&keys).await.map_err(|error| failed(&error))
        })
    }

    /// What the daemon holds, by tier: chunks, bytes, capacity.
    fn stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let runtime = runtime()?;
        let stats = py
            .detach(|| runtime.block_on(self.0.stats()))
            .map_err(|error| failed(&error))?;
        let tiers = PyDict::new(py);
        for tier in &stats.tiers {
            let of_tier = PyDict::new(py);
            of_tier.set_item("chunks", tier.chunks)?;
            of_tier.set_item("bytes", tier.bytes)?;
            of_tier.set_item("capacity", tier.capacity_bytes)?;
            tiers.set_item(tier.tier.to_string(), of_tier)?;
        }
        Ok(tiers)
    }

    /// How chunks come: `shared memory`, `quic` and so on; `None` over gRPC.
    #[getter]
    fn data_path(&self) -> Option<String> {
        self.0.data_path().map(|path| path.carrier.to_string())
    }
}
