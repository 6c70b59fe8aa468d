//! Calls of a daemon.
//!
//! Each is described once, as a future, and waited for in two ways: by a thread, or by asyncio.

use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::TryStreamExt as _;
use futures::stream;
use kvasir_client::{
    CallError, Client as Calls, ClientConfig, GetEvent, GetOptions, LayerStream, PutOptions,
    PutOutcome,
};
use kvasir_plugin::{ChunkCopy, CodecConfig, Decoding};
use kvasir_types::{ChunkKey, Durability, Hints, LayerIdx, Level};
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::coding::{self, Coding};
use crate::data::{self, Data};
use crate::failure::Failure;
use crate::identity::{Layout, keys};
use crate::profile::{Profile, layers};
use crate::{invalid, runtime};

/// A daemon. Does not wait for it: calls fail until it is there.
#[pyclass(frozen, module = "kvasir")]
#[derive(Debug)]
pub(crate) struct Client {
    calls: Calls,
    coding: Arc<Coding>,
}

/// A chunk that came: its layout, its layers in order, each as the layout says, and the level that
/// it came at.
#[pyclass(frozen, get_all, module = "kvasir")]
#[derive(Debug)]
pub(crate) struct Chunk {
    layout: Layout,
    layers: Vec<Py<Data>>,
    level: String,
}

/// The same, away from Python.
struct Came {
    layout: Layout,
    layers: Vec<Bytes>,
    level: Level,
}

impl<'py> IntoPyObject<'py> for Came {
    type Target = Chunk;
    type Output = Bound<'py, Chunk>;
    type Error = PyErr;

    fn into_pyobject(self, py: Python<'py>) -> PyResult<Self::Output> {
        let layers = self.layers.into_iter();
        let layers = layers.map(|bytes| Py::new(py, Data(bytes)));
        let chunk = Chunk {
            layout: self.layout,
            layers: layers.collect::<PyResult<_>>()?,
            level: self.level.to_string(),
        };
        Bound::new(py, chunk)
    }
}

/// What comes of a get, in order.
enum Step {
    Layer {
        chunk: usize,
        layer: LayerIdx,
        decoding: Arc<Decoding>,
        parts: Vec<Bytes>,
    },
    /// This chunk and those behind it will not come.
    Lost { chunk: usize },
}

impl Step {
    /// Which chunk it is of, and the layer as an engine has it.
    async fn decoded(self, coding: &Coding) -> Result<(usize, Option<Bytes>), Failure> {
        match self {
            Self::Layer {
                chunk,
                layer,
                decoding,
                parts,
            } => {
                let raw = coding.layer(chunk, decoding, layer, parts).await?;
                Ok((chunk, Some(raw)))
            }
            Self::Lost { chunk } => Ok((chunk, None)),
        }
    }
}

/// A get under way.
struct Getting {
    coding: Arc<Coding>,
    stream: LayerStream,
    decodings: Vec<Arc<Decoding>>,
}

impl Getting {
    async fn next(&mut self) -> Result<Option<Step>, Failure> {
        while let Some(event) = self.stream.next().await? {
            match event {
                // Comes before the layers of its chunk.
                GetEvent::Prelude { chunk, data } => {
                    let info = self.stream.chunks()[chunk];
                    let decoding = self.coding.decoding(chunk, &info, data).await?;
                    self.decodings[chunk] = Arc::new(decoding);
                }
                GetEvent::Layer {
                    chunk,
                    layer,
                    parts,
                } => {
                    let decoding = Arc::clone(&self.decodings[chunk]);
                    return Ok(Some(Step::Layer {
                        chunk,
                        layer,
                        decoding,
                        parts,
                    }));
                }
                GetEvent::Lost { chunk, .. } => return Ok(Some(Step::Lost { chunk })),
            }
        }
        Ok(None)
    }
}

async fn get(
    calls: Calls,
    coding: Arc<Coding>,
    keys: Vec<ChunkKey>,
    finest: Option<Level>,
    deadline: Option<Instant>,
) -> Result<Vec<Came>, Failure> {
    let options = GetOptions {
        deadline,
        levels: finest.into_iter().collect(),
        ..GetOptions::default()
    };
    let stream = calls.get(&keys, options).await?;
    let infos = stream.chunks().iter();
    let raw = infos.clone().map(|info| {
        let nothing = Bytes::new();
        Arc::new(Decoding::new(info.layout, info.level, nothing, None))
    });
    let mut chunks: Vec<Came> = infos
        .map(|info| Came {
            layout: Layout(info.layout),
            layers: Vec::with_capacity(info.layout.layers().into()),
            level: finest.map_or(info.level, |finest| info.level.at_most(finest)),
        })
        .collect();
    let getting = Getting {
        coding: Arc::clone(&coding),
        decodings: raw.collect(),
        stream,
    };
    // Layers are decoded while others come.
    let steps = stream::try_unfold(getting, async |mut getting| {
        let step = getting.next().await?;
        Ok(step.map(|step| (step, getting)))
    });
    let coding = &*coding;
    let decoded = steps.map_ok(|step| step.decoded(coding));
    let mut decoded = pin!(decoded.try_buffered(Coding::at_once()));
    while let Some((chunk, layer)) = decoded.try_next().await? {
        match layer {
            // They come in order; those of chunks that are lost may have come before.
            Some(layer) => {
                if let Some(chunk) = chunks.get_mut(chunk) {
                    chunk.layers.push(layer);
                }
            }
            None => chunks.truncate(chunk),
        }
    }
    Ok(chunks)
}

async fn put(
    calls: Calls,
    coding: Arc<Coding>,
    codec: CodecConfig,
    copy: ChunkCopy,
    durability: Durability,
) -> Result<bool, Failure> {
    let chunk = coding.encode(codec, copy).await?;
    let options = PutOptions {
        durability,
        ..PutOptions::default()
    };
    let put = calls.put_with(&chunk, options).await?;
    Ok(put.outcome == PutOutcome::Stored)
}

impl Client {
    fn looking_up(
        &self,
        chunks: Vec<[u8; 32]>,
    ) -> impl Future<Output = Result<usize, Failure>> + Send + use<> {
        let calls = self.calls.clone();
        async move { Ok(calls.lookup(&keys(chunks)).await?.prefix_chunks) }
    }

    #[expect(clippy::too_many_arguments, reason = "those of the call")]
    fn putting(
        &self,
        key: [u8; 32],
        layout: Layout,
        data: &Bound<'_, PyAny>,
        encoding: &str,
        profile: Option<&Profile>,
        start: u64,
        durable: bool,
    ) -> PyResult<impl Future<Output = Result<bool, Failure>> + Send + use<>> {
        let copy = ChunkCopy {
            key: ChunkKey::from_bytes(key),
            layout: layout.0,
            start,
            layers: layers(&layout.0, &data::bytes(data)?)?,
            hints: Hints::default(),
        };
        let durability = if durable {
            Durability::Durable
        } else {
            Durability::Memory
        };
        let codec = coding::codec(&layout.0, encoding, profile)?;
        let (calls, coding) = (self.calls.clone(), Arc::clone(&self.coding));
        Ok(put(calls, coding, codec, copy, durability))
    }

    fn getting(
        &self,
        chunks: Vec<[u8; 32]>,
        finest: Option<&str>,
        timeout: Option<f64>,
    ) -> PyResult<impl Future<Output = Result<Vec<Came>, Failure>> + Send + use<>> {
        let finest = finest.map(str::parse).transpose().map_err(invalid)?;
        let timeout = seconds(timeout)?;
        let (calls, coding) = (self.calls.clone(), Arc::clone(&self.coding));
        Ok(async move {
            let deadline = timeout.map(|timeout| Instant::now() + timeout);
            let get = get(calls, coding, keys(chunks), finest, deadline);
            let Some(deadline) = deadline else {
                return get.await;
            };
            // Profiles and decoding take their time too.
            match tokio::time::timeout_at(deadline.into(), get).await {
                Ok(came) => came,
                Err(_) => Err(CallError::DeadlineExceeded.into()),
            }
        })
    }

    fn deleting(
        &self,
        chunks: Vec<[u8; 32]>,
    ) -> impl Future<Output = Result<u32, Failure>> + Send + use<> {
        let calls = self.calls.clone();
        async move { Ok(calls.delete(&keys(chunks)).await?) }
    }

    fn putting_profile(
        &self,
        profile: &Profile,
    ) -> impl Future<Output = Result<bool, Failure>> + Send + use<> {
        let (calls, profile) = (self.calls.clone(), Arc::clone(&profile.0));
        async move {
            let put = calls.put_profile(&profile).await?;
            Ok(put.outcome == PutOutcome::Stored)
        }
    }
}

/// Waits for a call, while other threads go on.
fn wait<T: Send>(
    py: Python<'_>,
    call: impl Future<Output = Result<T, Failure>> + Send,
) -> PyResult<T> {
    let runtime = runtime()?;
    Ok(py.detach(|| runtime.block_on(call))?)
}

/// Has asyncio wait for it.
fn awaitable<'py, T>(
    py: Python<'py>,
    call: impl Future<Output = Result<T, Failure>> + Send + 'static,
) -> PyResult<Bound<'py, PyAny>>
where
    T: for<'a> IntoPyObject<'a> + Send + 'static,
{
    runtime()?;
    pyo3_async_runtimes::tokio::future_into_py(py, async move { Ok(call.await?) })
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
        let calls = Calls::connect_lazy(config);
        let coding = Arc::new(Coding::new(calls.clone()));
        Ok(Self { calls, coding })
    }

    /// How many of the leading chunks are there.
    fn lookup(&self, py: Python<'_>, keys: Vec<[u8; 32]>) -> PyResult<usize> {
        wait(py, self.looking_up(keys))
    }

    fn lookup_async<'py>(
        &self,
        py: Python<'py>,
        keys: Vec<[u8; 32]>,
    ) -> PyResult<Bound<'py, PyAny>> {
        awaitable(py, self.looking_up(keys))
    }

    /// Stores a chunk; true if it was not there. It is stored at the level `encoding`, with a
    /// profile if there is one; `start` is the position of its first token. Its bytes are not
    /// copied: leave them as they are until this returns.
    #[pyo3(signature = (key, layout, data, *, encoding = "raw", profile = None, start = 0, durable = true))]
    #[expect(clippy::too_many_arguments, reason = "named, and with defaults")]
    fn put(
        &self,
        py: Python<'_>,
        key: [u8; 32],
        layout: Layout,
        data: &Bound<'_, PyAny>,
        encoding: &str,
        profile: Option<&Profile>,
        start: u64,
        durable: bool,
    ) -> PyResult<bool> {
        let put = self.putting(key, layout, data, encoding, profile, start, durable)?;
        wait(py, put)
    }

    #[pyo3(signature = (key, layout, data, *, encoding = "raw", profile = None, start = 0, durable = true))]
    #[expect(clippy::too_many_arguments, reason = "named, and with defaults")]
    fn put_async<'py>(
        &self,
        py: Python<'py>,
        key: [u8; 32],
        layout: Layout,
        data: &Bound<'_, PyAny>,
        encoding: &str,
        profile: Option<&Profile>,
        start: u64,
        durable: bool,
    ) -> PyResult<Bound<'py, PyAny>> {
        let put = self.putting(key, layout, data, encoding, profile, start, durable)?;
        awaitable(py, put)
    }

    /// The leading chunks that are there and came whole, decoded; no finer than the level
    /// `finest`, of those that are stored at nested levels.
    #[pyo3(signature = (keys, *, finest = None, timeout = None))]
    fn get(
        &self,
        py: Python<'_>,
        keys: Vec<[u8; 32]>,
        finest: Option<&str>,
        timeout: Option<f64>,
    ) -> PyResult<Vec<Came>> {
        wait(py, self.getting(keys, finest, timeout)?)
    }

    #[pyo3(signature = (keys, *, finest = None, timeout = None))]
    fn get_async<'py>(
        &self,
        py: Python<'py>,
        keys: Vec<[u8; 32]>,
        finest: Option<&str>,
        timeout: Option<f64>,
    ) -> PyResult<Bound<'py, PyAny>> {
        awaitable(py, self.getting(keys, finest, timeout)?)
    }

    /// Deletes chunks; how many were there.
    fn delete(&self, py: Python<'_>, keys: Vec<[u8; 32]>) -> PyResult<u32> {
        wait(py, self.deleting(keys))
    }

    fn delete_async<'py>(
        &self,
        py: Python<'py>,
        keys: Vec<[u8; 32]>,
    ) -> PyResult<Bound<'py, PyAny>> {
        awaitable(py, self.deleting(keys))
    }

    /// Gives the daemon a profile to keep; true if it was not there. Chunks that are put with one
    /// bring it along.
    fn put_profile(&self, py: Python<'_>, profile: &Profile) -> PyResult<bool> {
        wait(py, self.putting_profile(profile))
    }

    fn put_profile_async<'py>(
        &self,
        py: Python<'py>,
        profile: &Profile,
    ) -> PyResult<Bound<'py, PyAny>> {
        awaitable(py, self.putting_profile(profile))
    }

    /// What the daemon holds, by tier: chunks, bytes, capacity.
    fn stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let calls = self.calls.clone();
        let stats = wait(py, async move { Ok(calls.stats().await?) })?;
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
        self.calls.data_path().map(|path| path.carrier.to_string())
    }
}
