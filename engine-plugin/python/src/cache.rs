//! Blocks of an engine that names them itself: found, loaded into its memory, and stored.
//!
//! What may go wrong with a daemon costs what its configuration allows, once: then it is left
//! alone for a while, and what is asked for meanwhile is not there. See `kvasir_plugin`.

use std::num::NonZeroUsize;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use futures::{StreamExt as _, TryStreamExt as _};
use kvasir_plugin::{
    CachePlugin, EngineBackend as _, FetchOutcome, LayerWait, LoadPolicy, PluginConfig, Prompt,
    Strided, Strides,
};
use kvasir_types::{ByteSize, ChunkKey, Durability, LayerIdx};
use lru::LruCache;
use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};

use crate::coding;
use crate::identity::Namespace;
use crate::memory::Region;
use crate::profile::Profile;
use crate::residency::{self, Residency};
use crate::save::{Save, chunk, read};
use crate::{invalid, runtime};

/// How long a loading thread waits before it looks whether its fetch has ended.
const PATIENCE: Duration = Duration::from_millis(100);

/// Blocks that are copied and on their way at once, when storing is waited for.
const PUTS_AT_ONCE: usize = 4;

/// Keys that are remembered as stored, so that they are not sent again.
const REMEMBERED: NonZeroUsize = NonZeroUsize::new(1 << 16).unwrap();

/// An engine's blocks in a daemon's cache. A block is named by what the engine calls it, such as
/// its hash, within a namespace.
#[pyclass(frozen, module = "kvasir")]
pub(crate) struct BlockCache {
    plugin: CachePlugin,
    pages: OnceLock<Strided<Region>>,
    sent: Arc<Sent>,
}

/// Keys that were sent lately, so that they are not sent again.
pub(crate) struct Sent(Mutex<LruCache<ChunkKey, ()>>);

impl Sent {
    fn keys(&self) -> MutexGuard<'_, LruCache<ChunkKey, ()>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn has(&self, key: &ChunkKey) -> bool {
        self.keys().contains(key)
    }

    pub(crate) fn note(&self, key: ChunkKey) {
        self.keys().put(key, ());
    }
}

/// Blocks on their way into an engine's memory.
#[pyclass(frozen, module = "kvasir")]
#[derive(Debug)]
pub(crate) struct Load {
    progress: Arc<Progress>,
}

#[derive(Debug, Default)]
struct Progress {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Clone, Copy, Debug, Default)]
struct State {
    /// Leading layers that are there of all blocks.
    layers: usize,
    /// Once nothing more comes: leading blocks that are whole.
    blocks: Option<usize>,
    /// Whether these are as fine as blocks are stored here.
    may_store: bool,
}

impl Progress {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn note(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.state());
        self.changed.notify_all();
    }

    /// Waits until `is_over`, or for as long as `timeout`.
    fn wait(&self, timeout: Duration, is_over: impl Fn(&State) -> bool) -> State {
        let state = self.state();
        let waited = self
            .changed
            .wait_timeout_while(state, timeout, |state| !is_over(state));
        *waited.unwrap_or_else(PoisonError::into_inner).0
    }
}

/// Ends a load, whatever becomes of its thread: an engine waits for it.
struct Ends(Arc<Progress>);

impl Drop for Ends {
    fn drop(&mut self) {
        self.0.note(|state| {
            state.blocks.get_or_insert(0);
        });
    }
}

/// What a load came to.
struct Loaded {
    blocks: usize,
    may_store: bool,
}

fn load(
    plugin: &CachePlugin,
    keys: Vec<ChunkKey>,
    mut pages: Strided<Region>,
    blocks: &[u32],
    progress: &Progress,
) -> Loaded {
    let (tokens, wanted) = (pages.layout().tokens() as usize, keys.len());
    let layers = pages.layout().layers();
    let mut fetch = plugin.prefetch(&Prompt::named(tokens, keys));
    while fetch.wait(PATIENCE, &mut pages, blocks) == FetchOutcome::Deciding {}
    for layer in (0..layers).map(LayerIdx) {
        let landed = loop {
            match fetch.wait_layer(wanted, layer, PATIENCE, &mut pages, blocks) {
                LayerWait::Pending => (),
                other => break other,
            }
        };
        if landed == LayerWait::Short {
            break;
        }
        progress.note(|state| state.layers = usize::from(layer.0) + 1);
    }
    loop {
        if let FetchOutcome::Done { chunks } = fetch.wait(PATIENCE, &mut pages, blocks) {
            return Loaded {
                blocks: chunks,
                may_store: fetch.may_capture(),
            };
        }
    }
}

pub(crate) fn seconds(name: &str, value: f64) -> PyResult<Duration> {
    Duration::try_from_secs_f64(value)
        .map_err(|_| invalid(format!("{name} of {value} seconds is no time")))
}

impl BlockCache {
    fn keys(&self, names: &[Vec<u8>]) -> Vec<ChunkKey> {
        let namespace = self.plugin.namespace();
        names.iter().map(|name| namespace.opaque(name)).collect()
    }

    fn pages(&self) -> PyResult<&Strided<Region>> {
        let missing = || PyRuntimeError::new_err("no memory was registered: call register first");
        self.pages.get().ok_or_else(missing)
    }
}

#[pymethods]
impl BlockCache {
    /// Of the daemon at `endpoint`, which need not be there yet.
    ///
    /// All times are in seconds: `lookup_timeout` bounds `find`, `load_timeout` a load,
    /// `store_timeout` the storing of one block; `cooldown` is how long a daemon that has failed is left alone, twice as long each time.
    /// `store_buffer` bounds the bytes that wait to be stored. Blocks are stored at the level
    /// `encoding`, with a profile if there is one.
    #[new]
    #[pyo3(signature = (
        endpoint, namespace, *,
        lookup_timeout = 0.05, load_timeout = 2.0, store_timeout = 10.0, cooldown = 1.0,
        store_buffer = 512 << 20, durable = true, encoding = "raw", profile = None,
    ))]
    #[expect(clippy::too_many_arguments, reason = "named, and each has a default")]
    fn new(
        endpoint: &str,
        namespace: Namespace,
        lookup_timeout: f64,
        load_timeout: f64,
        store_timeout: f64,
        cooldown: f64,
        store_buffer: u64,
        durable: bool,
        encoding: &str,
        profile: Option<&Profile>,
    ) -> PyResult<Self> {
        let config = PluginConfig {
            codec: coding::codec(namespace.0.layout(), encoding, profile)?,
            // What loading is worth is the engine's to say: it has asked for it.
            load: LoadPolicy::Always,
            lookup_timeout: seconds("lookup_timeout", lookup_timeout)?,
            fetch_timeout: seconds("load_timeout", load_timeout)?,
            store_timeout: seconds("store_timeout", store_timeout)?,
            cooldown: seconds("cooldown", cooldown)?,
            capture_buffer: ByteSize::bytes(store_buffer),
            durability: if durable {
                Durability::Durable
            } else {
                Durability::Memory
            },
            ..PluginConfig::default()
        };
        let handle = runtime()?.handle().clone();
        let plugin = CachePlugin::connect(endpoint, handle, namespace.0, config);
        Ok(Self {
            plugin: plugin.map_err(invalid)?,
            pages: OnceLock::new(),
            sent: Arc::new(Sent(Mutex::new(LruCache::new(REMEMBERED)))),
        })
    }

    /// The same cache, of other memory, which is to be registered.
    fn beside(&self) -> Self {
        Self {
            plugin: self.plugin.clone(),
            pages: OnceLock::new(),
            sent: Arc::clone(&self.sent),
        }
    }

    /// Says where the engine's KV is: a buffer a layer, all alike, of `blocks` blocks, whose rows
    /// are where the strides say, in bytes. Once.
    #[pyo3(signature = (layers, *, blocks, block, plane, head, token, start = 0))]
    #[expect(
        clippy::too_many_arguments,
        reason = "named, and all numbers of one tensor"
    )]
    fn register(
        &self,
        layers: Vec<Bound<'_, PyAny>>,
        blocks: u32,
        block: usize,
        plane: usize,
        head: usize,
        token: usize,
        start: usize,
    ) -> PyResult<()> {
        let layers = layers
            .iter()
            .map(Region::new)
            .collect::<PyResult<Vec<_>>>()?;
        let strides = Strides {
            start,
            block,
            plane,
            head,
            token,
        };
        let layout = *self.plugin.namespace().layout();
        let pages = Strided::new(layout, strides, blocks, layers).map_err(invalid)?;
        let again = |_| PyRuntimeError::new_err("memory was registered before");
        self.pages.set(pages).map_err(again)
    }

    /// A block of the engine's memory, as a chunk holds it.
    fn read<'py>(&self, py: Python<'py>, block: u32) -> PyResult<Bound<'py, PyBytes>> {
        let pages = self.pages()?;
        let chunk = read(pages, block).map_err(invalid)?.concat();
        Ok(PyBytes::new(py, &chunk))
    }

    /// Writes a block of the engine's memory; `chunk` is what `read` gives.
    fn write(&self, block: u32, chunk: &[u8]) -> PyResult<()> {
        let mut pages = self.pages()?.clone();
        let layout = *pages.layout();
        if chunk.len() as u64 != layout.chunk_bytes() {
            return Err(invalid(format!(
                "a block has {} bytes, the data {}",
                layout.chunk_bytes(),
                chunk.len()
            )));
        }
        let layers = (0..).map(LayerIdx).zip(chunk.chunks(layout.layer_bytes()));
        for (layer, payload) in layers {
            pages
                .write_layer(&[block], 0, layer, payload)
                .map_err(invalid)?;
        }
        Ok(())
    }

    /// How many of the leading blocks of these names can be loaded. Costs `lookup_timeout` at most,
    /// and nothing while the daemon is left alone.
    fn find(&self, py: Python<'_>, names: Vec<Vec<u8>>) -> PyResult<usize> {
        let runtime = runtime()?;
        Ok(py.detach(|| {
            let keys = self.keys(&names);
            let found = runtime.block_on(self.plugin.find(&keys));
            let mut sent = self.sent.keys();
            for key in &keys[found.min(keys.len())..] {
                sent.pop(key);
            }
            found
        }))
    }

    /// Starts to load blocks of these names into these blocks of memory, which must stay the
    /// load's until it has ended.
    fn load(&self, py: Python<'_>, names: Vec<Vec<u8>>, blocks: Vec<u32>) -> PyResult<Load> {
        if names.len() != blocks.len() {
            return Err(invalid("there must be a block of memory for each name"));
        }
        let (pages, runtime) = (self.pages()?.clone(), runtime()?);
        let progress = Arc::new(Progress::default());
        let (plugin, ends) = (self.plugin.clone(), Ends(Arc::clone(&progress)));
        py.detach(|| {
            let keys = self.keys(&names);
            runtime.spawn_blocking(move || {
                let loaded = load(&plugin, keys, pages, &blocks, &ends.0);
                ends.0.note(|state| {
                    state.may_store = loaded.may_store;
                    state.blocks = Some(loaded.blocks);
                });
            });
        });
        Ok(Load { progress })
    }

    /// Copies blocks out of memory, and has them stored behind the caller's back; `parent` is the
    /// name of the block before them. Returns how many will be: those that were sent before will
    /// not, and neither will those for which there is no room.
    #[pyo3(signature = (names, blocks, *, parent = None))]
    fn store(
        &self,
        py: Python<'_>,
        names: Vec<Vec<u8>>,
        blocks: Vec<u32>,
        parent: Option<Vec<u8>>,
    ) -> PyResult<usize> {
        let save = self.save(py, names, blocks, parent)?;
        py.detach(|| save.end()).map_err(invalid)
    }

    /// The same, layer by layer as they are computed: none is copied yet.
    #[pyo3(signature = (names, blocks, *, parent = None))]
    fn save(
        &self,
        py: Python<'_>,
        names: Vec<Vec<u8>>,
        blocks: Vec<u32>,
        parent: Option<Vec<u8>>,
    ) -> PyResult<Save> {
        if names.len() != blocks.len() {
            return Err(invalid("there must be a block of memory for each name"));
        }
        let (pages, plugin) = (self.pages()?.clone(), self.plugin.clone());
        Ok(py.detach(|| {
            let parent = parent.map(|name| plugin.namespace().opaque(&name));
            let blocks = self.keys(&names).into_iter().zip(blocks);
            Save::new(plugin, pages, Arc::clone(&self.sent), parent, blocks)
        }))
    }

    /// Stores those blocks that the daemon lacks, and waits for it: which of them it has now. Costs
    /// `lookup_timeout` and `store_timeout` at most where it does not answer, and nothing while it
    /// is left alone.
    #[pyo3(signature = (names, blocks, *, parent = None))]
    fn put(
        &self,
        py: Python<'_>,
        names: Vec<Vec<u8>>,
        blocks: Vec<u32>,
        parent: Option<Vec<u8>>,
    ) -> PyResult<Vec<bool>> {
        if names.len() != blocks.len() {
            return Err(invalid("there must be a block of memory for each name"));
        }
        let (pages, runtime) = (self.pages()?, runtime()?);
        py.detach(|| {
            let keys = self.keys(&names);
            let first = parent.map(|name| self.plugin.namespace().opaque(&name));
            let parents = std::iter::once(first).chain(keys.iter().copied().map(Some));
            let present = runtime.block_on(self.plugin.present(&keys));
            let puts = keys.iter().zip(parents).zip(blocks).zip(present);
            let puts = puts.map(|(((key, parent), block), is_there)| async move {
                if is_there {
                    return Ok(true);
                }
                let layers = read(pages, block).map_err(invalid)?;
                let copied = chunk(pages, *key, parent, layers);
                Ok(self.plugin.store(copied).await)
            });
            let puts = futures::stream::iter(puts).buffered(PUTS_AT_ONCE);
            runtime.block_on(puts.try_collect())
        })
    }

    /// Deletes blocks of these names; how many there were. Costs `lookup_timeout` at most, and
    /// nothing while the daemon is left alone.
    fn delete(&self, py: Python<'_>, names: Vec<Vec<u8>>) -> PyResult<u32> {
        let runtime = runtime()?;
        Ok(py.detach(|| {
            let keys = self.keys(&names);
            let deleted = runtime.block_on(self.plugin.delete(&keys));
            let mut sent = self.sent.keys();
            for key in &keys {
                sent.pop(key);
            }
            deleted
        }))
    }

    /// Follows which of the blocks that are to be named the daemon has: `limit` of them, and then
    /// the last ones.
    #[pyo3(signature = (*, limit = residency::LIMIT))]
    fn follow(&self, limit: NonZeroUsize) -> Residency {
        let namespace = Namespace(*self.plugin.namespace());
        Residency::new(namespace, self.plugin.follow(limit))
    }

    /// What became of loads and stores so far.
    fn stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let (loads, stores) = (self.plugin.fetch_stats(), self.plugin.capture_stats());
        let stats = PyDict::new(py);
        for (name, value) in [
            ("loads", loads.loads),
            ("loads_late", loads.late),
            ("calls_failed", loads.failed),
            ("calls_skipped", loads.skipped),
            ("stores_waiting", stores.waiting),
            ("stored", stores.stored),
            ("stores_failed", stores.failed),
            ("stores_dropped", stores.dropped),
        ] {
            stats.set_item(name, value)?;
        }
        Ok(stats)
    }

    /// Waits until nothing waits to be stored; false after `timeout` seconds.
    fn flush(&self, py: Python<'_>, timeout: f64) -> PyResult<bool> {
        let until = Instant::now() + seconds("timeout", timeout)?;
        Ok(py.detach(|| {
            while self.plugin.capture_stats().waiting > 0 {
                if Instant::now() >= until {
                    return false;
                }
                std::thread::sleep(Duration::from_millis(1));
            }
            true
        }))
    }
}

#[pymethods]
impl Load {
    /// How many leading blocks have come whole, once nothing more comes; `None` before.
    fn poll(&self) -> Option<usize> {
        self.progress.state().blocks
    }

    /// Whether what is computed over these blocks may be stored, once nothing more comes. Not where
    /// they came coarser than blocks are stored here: it is no better than they are, and nobody
    /// could tell.
    fn may_store(&self) -> bool {
        self.progress.state().may_store
    }

    /// As `poll`, and waits for it for up to `timeout` seconds.
    fn wait(&self, py: Python<'_>, timeout: f64) -> PyResult<Option<usize>> {
        let timeout = seconds("timeout", timeout)?;
        let over = |state: &State| state.blocks.is_some();
        Ok(py.detach(|| self.progress.wait(timeout, over).blocks))
    }

    /// Waits until a layer of all blocks is there: false if it will not be.
    fn wait_layer(&self, py: Python<'_>, layer: usize) -> bool {
        let over = |state: &State| state.layers > layer || state.blocks.is_some();
        // It ends by the load's own deadlines.
        py.detach(|| self.progress.wait(Duration::MAX, over).layers > layer)
    }
}
