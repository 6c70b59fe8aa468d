//! Slots of an engine's host memory, whose bytes only the engine understands: found, loaded and
//! stored by jobs that end behind its back.
//!
//! Jobs read and write the memory itself, and not a copy of it. A slot is the job's until the job
//! has ended, and a job ends when nothing can touch its slots any more. See [`Job`](jobs::Job).
//!
//! Not by way of `CachePlugin`, as `BlockCache` goes: that copies what is captured, because an
//! engine's blocks are its own again after the step, and fetches the leading chunks of a prompt,
//! layer by layer. A slot has no layers, is lent until its job ends, and any of a job's may be
//! missing. What is left to share is the breaker.

mod jobs;
mod transfer;

use std::num::{NonZeroU32, NonZeroUsize};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvasir_client::{Client, ClientConfig};
use kvasir_plugin::Memory as _;
use kvasir_types::{ByteSize, ChunkKey, Durability, Hints};
use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};

use crate::cache::seconds;
use crate::identity::Namespace;
use crate::memory::Region;
use crate::residency::{self, Residency};
use crate::{invalid, runtime};

use jobs::Jobs;
use transfer::{Block, Transfer, count};

/// An engine's slots in a daemon's cache. What a slot holds is named by the engine, within a
/// namespace whose layout has the bytes of a slot.
#[pyclass(frozen, module = "kvasir")]
#[derive(Debug)]
pub(crate) struct SlotCache {
    transfer: Arc<Transfer>,
    namespace: Namespace,
    slots: usize,
    slot_bytes: usize,
    store_buffer: ByteSize,
    /// Until it is closed.
    memory: Mutex<Option<Arc<Region>>>,
}

impl SlotCache {
    fn memory(&self) -> MutexGuard<'_, Option<Arc<Region>>> {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn opened(&self) -> PyResult<Arc<Region>> {
        let closed = || PyRuntimeError::new_err("the cache is closed: make another one");
        self.memory().clone().ok_or_else(closed)
    }

    fn jobs(&self) -> &Arc<Jobs> {
        &self.transfer.jobs
    }

    fn at(&self, slot: u32) -> PyResult<usize> {
        let slot = slot as usize;
        if slot >= self.slots {
            let problem = format!("there is no slot {slot}: there are {}", self.slots);
            return Err(invalid(problem));
        }
        Ok(slot * self.slot_bytes)
    }

    fn key(&self, name: &[u8]) -> ChunkKey {
        self.namespace.0.opaque(name)
    }

    fn blocks(&self, names: &[Vec<u8>], slots: &[u32]) -> PyResult<Vec<Block>> {
        if names.len() != slots.len() {
            return Err(invalid("there must be a slot for each name"));
        }
        let block = |(index, (name, slot)): (usize, (&Vec<u8>, &u32))| {
            let (key, at) = (self.key(name), self.at(*slot)?);
            Ok(Block { index, key, at })
        };
        names.iter().zip(slots).enumerate().map(block).collect()
    }
}

#[pymethods]
impl SlotCache {
    /// Of the daemon at `endpoint`, which need not be there yet. `memory` is one buffer of slots.
    ///
    /// All times are in seconds: `lookup_timeout` bounds `find`, `load_timeout` a load,
    /// `store_timeout` the storing of one slot; `cooldown` is how long a daemon that has failed is
    /// left alone, twice as long each time. `store_buffer` bounds the bytes of slots that stores
    /// hold.
    #[new]
    #[pyo3(signature = (
        endpoint, namespace, memory, *,
        lookup_timeout = 0.05, load_timeout = 2.0, store_timeout = 5.0, cooldown = 1.0,
        store_buffer = 512 << 20, durable = true,
    ))]
    #[expect(
        clippy::too_many_arguments,
        reason = "named, and with defaults, on the other side"
    )]
    fn new(
        endpoint: &str,
        namespace: Namespace,
        memory: &Bound<'_, PyAny>,
        lookup_timeout: f64,
        load_timeout: f64,
        store_timeout: f64,
        cooldown: f64,
        store_buffer: u64,
        durable: bool,
    ) -> PyResult<Self> {
        let memory = Region::new(memory)?;
        let layout = *namespace.0.layout();
        let slot_bytes = layout.layer_bytes();
        if layout.layers() != 1 || !memory.len().is_multiple_of(slot_bytes) {
            return Err(invalid(format!(
                "{} bytes are no number of slots of {slot_bytes} bytes, in one layer",
                memory.len()
            )));
        }
        let config = ClientConfig {
            endpoint: endpoint.parse().map_err(invalid)?,
            call_timeout: seconds("lookup_timeout", lookup_timeout)?,
            transfer_timeout: seconds("store_timeout", store_timeout)?,
            ..ClientConfig::default()
        };
        let durability = if durable {
            Durability::Durable
        } else {
            Durability::Memory
        };
        let runtime = runtime()?.enter();
        let client = Client::connect_lazy(config);
        drop(runtime);
        let transfer = Transfer::new(
            client,
            layout,
            durability,
            seconds("load_timeout", load_timeout)?,
            seconds("cooldown", cooldown)?,
        );
        Ok(Self {
            transfer: Arc::new(transfer),
            namespace,
            slots: memory.len() / slot_bytes,
            slot_bytes,
            store_buffer: ByteSize::bytes(store_buffer),
            memory: Mutex::new(Some(Arc::new(memory))),
        })
    }

    /// What a slot holds.
    fn read<'py>(&self, py: Python<'py>, slot: u32) -> PyResult<Bound<'py, PyBytes>> {
        let (memory, at) = (self.opened()?, self.at(slot)?);
        let mut bytes = vec![0; self.slot_bytes];
        memory.read(at, &mut bytes).map_err(invalid)?;
        Ok(PyBytes::new(py, &bytes))
    }

    /// Writes a slot.
    fn write(&self, slot: u32, bytes: &[u8]) -> PyResult<()> {
        if bytes.len() != self.slot_bytes {
            let problem = format!("a slot has {} bytes, not {}", self.slot_bytes, bytes.len());
            return Err(invalid(problem));
        }
        let (memory, at) = (self.opened()?, self.at(slot)?);
        memory.write(at, bytes).map_err(invalid)
    }

    /// Of each of these names, whether it can be loaded. Costs `lookup_timeout` at most, and
    /// nothing while the daemon is left alone.
    fn find(&self, py: Python<'_>, names: Vec<Vec<u8>>) -> PyResult<Vec<bool>> {
        let runtime = runtime()?;
        Ok(py.detach(|| {
            let keys: Vec<ChunkKey> = names.iter().map(|name| self.key(name)).collect();
            runtime.block_on(self.transfer.find(&keys))
        }))
    }

    /// Deletes what has these names; how many there were. Costs `lookup_timeout` at most, and
    /// nothing while the daemon is left alone.
    fn delete(&self, py: Python<'_>, names: Vec<Vec<u8>>) -> PyResult<u32> {
        let runtime = runtime()?;
        Ok(py.detach(|| {
            let keys: Vec<ChunkKey> = names.iter().map(|name| self.key(name)).collect();
            runtime.block_on(self.transfer.delete(&keys))
        }))
    }

    /// Begins a job that loads these names into these slots, which are the job's until it ends.
    fn load(&self, py: Python<'_>, job: u64, names: Vec<Vec<u8>>, slots: Vec<u32>) -> PyResult<()> {
        let (memory, runtime) = (self.opened()?, runtime()?);
        py.detach(|| {
            let blocks = self.blocks(&names, &slots)?;
            let job = self.jobs().begin(job, blocks.len());
            let transfer = Arc::clone(&self.transfer);
            runtime.spawn(async move { transfer.load(memory, job, blocks).await });
            Ok(())
        })
    }

    /// Begins a job that stores these slots by these names, in order; the slots must stay as they
    /// are until it ends. `parents` are the names before them, where there are any, and `tokens`
    /// what it costs to compute one. Blocks for which `store_buffer` has no room are left out: the
    /// last ones.
    fn store(
        &self,
        py: Python<'_>,
        job: u64,
        names: Vec<Vec<u8>>,
        slots: Vec<u32>,
        parents: Vec<Option<Vec<u8>>>,
        tokens: Option<NonZeroU32>,
    ) -> PyResult<()> {
        if parents.len() != names.len() {
            return Err(invalid("there must be a parent, or none, for each name"));
        }
        let (memory, runtime) = (self.opened()?, runtime()?);
        py.detach(|| {
            let blocks = self.blocks(&names, &slots)?;
            let mut job = self.jobs().begin(job, blocks.len());
            let room = job.lend(blocks.len(), self.slot_bytes, self.store_buffer.as_u64());
            count(&self.transfer.counters.stores_dropped, blocks.len() - room);
            let hints = parents.iter().map(|parent| Hints {
                parent: parent.as_deref().map(|name| self.key(name)),
                recompute: tokens,
                ..Hints::default()
            });
            let blocks = blocks.into_iter().zip(hints).take(room).collect();
            let transfer = Arc::clone(&self.transfer);
            runtime.spawn(async move { transfer.store(memory, job, blocks).await });
            Ok(())
        })
    }

    /// Jobs that have ended since this was called last: of each its number, which of its blocks
    /// came whole, and how many seconds it took.
    fn finished(&self) -> Vec<(u64, Vec<bool>, f64)> {
        let ended = self.jobs().ended().into_iter();
        ended
            .map(|job| (job.id, job.whole, job.elapsed.as_secs_f64()))
            .collect()
    }

    /// Waits until all jobs have ended; false after `timeout` seconds. Those that store can be
    /// `cut` short: they end after the slot that they are at.
    #[pyo3(signature = (timeout, *, cut = false))]
    fn drain(&self, py: Python<'_>, timeout: f64, cut: bool) -> PyResult<bool> {
        let timeout = seconds("timeout", timeout)?;
        Ok(py.detach(|| self.jobs().drain(timeout, cut)))
    }

    /// Whether the daemon is left alone at this moment, so that nothing is found.
    #[getter]
    fn rests(&self) -> bool {
        self.transfer.rests()
    }

    /// Gives the memory back, as soon as no job is in it. Nothing can be done with it afterwards.
    fn close(&self) {
        drop(self.memory().take());
    }

    /// Follows which of what is to be named the daemon has: `limit` names, and then the last ones.
    #[pyo3(signature = (*, limit = residency::LIMIT))]
    fn follow(&self, limit: NonZeroUsize) -> PyResult<Residency> {
        let (client, runtime) = (self.transfer.client.clone(), runtime()?);
        let of = kvasir_plugin::Residency::follow(client, runtime.handle(), limit);
        Ok(Residency::new(self.namespace, of))
    }

    /// What became of jobs and calls so far.
    fn stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let counters = &self.transfer.counters;
        let stats = PyDict::new(py);
        for (name, counter) in [
            ("loads", &counters.loads),
            ("loads_late", &counters.loads_late),
            ("calls_failed", &counters.calls_failed),
            ("calls_skipped", &counters.calls_skipped),
            ("stored", &counters.stored),
            ("stores_failed", &counters.stores_failed),
            ("stores_dropped", &counters.stores_dropped),
        ] {
            stats.set_item(name, counter.load(Ordering::Relaxed))?;
        }
        Ok(stats)
    }
}
