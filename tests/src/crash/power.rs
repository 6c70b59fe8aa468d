//! Power cuts under a store in this process.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use kvasir_store::policy::PolicyKind;
use kvasir_store::{
    DiskConfig, Environment, MemoryConfig, OpenError, PutOptions, ReadError, Store, StoreConfig,
};
use kvasir_types::{ByteSize, Durability};
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use tokio::time::Instant;

use super::{Chunks, Got, Ledger, Load, Outcome, Target, Violation, check};
use crate::faulty::{Faulty, Lie};

/// A series of crashes of one store.
#[derive(Clone, Copy, Debug)]
pub struct PowerCuts {
    /// Decides everything but the order of concurrent steps.
    pub seed: u64,
    /// How many.
    pub crashes: u32,
    /// Less than the chunks take, so that there are evictions.
    pub tight: bool,
    /// What is wrong with the device.
    pub lie: Option<Lie>,
}

impl PowerCuts {
    /// Loads a store, ends it, checks it, and goes on with what is left.
    ///
    /// About one crash in four only ends the process: nothing is lost then, and what
    /// was not synced is still in danger at the next one.
    ///
    /// # Errors
    /// The real device failed, or a store cannot be opened.
    pub async fn run(self, chunks: &Chunks) -> anyhow::Result<Outcome> {
        let mut random = StdRng::seed_from_u64(self.seed);
        let directory = tempfile::tempdir()?;
        let data = directory.path();
        let medium = Faulty::new(self.seed);
        let ledger = Ledger::new(chunks.count());
        let mut outcome = Outcome::default();
        for crash in 0..self.crashes {
            medium.lie(self.lie);
            let target = self.open(data, &medium, chunks).await?;
            let load = Load::start(&target, &ledger, CLIENTS, random.random());
            tokio::time::sleep(random.random_range(MIN_LOAD..MAX_LOAD)).await;

            let snapshot = ledger.snapshot();
            let synced = target.log_bytes.load(Ordering::SeqCst);
            medium.power_off();
            let catalog = data.join("catalog");
            let copy = data.join("catalog-after");
            let power_cut = random.random_bool(0.75);
            if power_cut {
                copy_directory(&catalog, &copy)?;
                cut_log(&copy, synced, &mut random)?;
            }
            load.stop().await;
            end(target, data).await?;
            medium.lie(None);
            if power_cut {
                fs::remove_dir_all(&catalog)?;
                fs::rename(&copy, &catalog)?;
                medium.cut_power()?;
            } else {
                medium.power_on();
            }

            let capacity = self.tight.then_some(TIGHT.as_u64());
            let expected = ledger.expectations(&snapshot, chunks, capacity);
            let target = self.open(data, &medium, chunks).await?;
            let mut checked = check(&target, data, &expected).await?;
            target.store.close().await?;
            end(target, data).await?;
            let target = self.open(data, &medium, chunks).await?;
            for number in 0..chunks.count() {
                let found = target.get(number).await == Got::Right;
                if checked.found.get(number as usize) != Some(&found) {
                    checked.violations.push(Violation::Unstable(number));
                }
            }
            end(target, data).await?;
            ledger.restart(&expected, &checked.found);
            outcome.record(self.seed, crash, &checked);
        }
        Ok(outcome)
    }

    async fn open(
        self,
        data: &Path,
        medium: &Faulty,
        chunks: &Chunks,
    ) -> Result<StoreTarget, OpenError> {
        let capacity = if self.tight { TIGHT } else { ROOMY };
        let patience = Instant::now() + PATIENCE;
        loop {
            match StoreTarget::open(data, medium, chunks, MEMORY, capacity).await {
                // A process that somebody else here is about to start has, for a moment, all
                // files that this one has open, the lock of the store before among them.
                Err(OpenError::Locked(_)) if Instant::now() < patience => {
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
                opened => return opened,
            }
        }
    }
}

/// A store on a faulty medium.
#[derive(Clone, Debug)]
pub struct StoreTarget {
    /// The store.
    pub store: Store,
    chunks: Chunks,
    catalog: PathBuf,
    /// What the catalog's log had reached when the last change was acknowledged: this
    /// much of it was synced.
    log_bytes: Arc<AtomicU64>,
}

impl StoreTarget {
    /// Opens a store in `data`.
    ///
    /// # Errors
    /// As for [`Store::open_in`].
    pub async fn open(
        data: &Path,
        medium: &Faulty,
        chunks: &Chunks,
        memory: ByteSize,
        capacity: ByteSize,
    ) -> Result<Self, OpenError> {
        let environment = Environment {
            medium: Arc::new(medium.clone()),
            ..Environment::default()
        };
        let config = StoreConfig {
            memory: MemoryConfig::with_capacity(memory),
            disk: Some(DiskConfig {
                capacity,
                policy: PolicyKind::Lru,
                ..DiskConfig::at(data)
            }),
            ..StoreConfig::default()
        };
        let catalog = data.join("catalog");
        let is_new = !catalog.exists();
        let target = Self {
            store: Store::open_in(environment, config).await?,
            chunks: chunks.clone(),
            catalog,
            log_bytes: Arc::default(),
        };
        // A new directory's id is synced. An old one starts a new log, of which
        // nothing is until something is acknowledged.
        if is_new {
            target.acknowledged();
        }
        Ok(target)
    }

    fn acknowledged(&self) {
        if let Ok(Some((_, bytes))) = newest_log(&self.catalog) {
            self.log_bytes.fetch_max(bytes, Ordering::SeqCst);
        }
    }
}

impl Target for StoreTarget {
    async fn put(&self, number: u32, durability: Durability) -> bool {
        let options = PutOptions {
            durability,
            ..PutOptions::default()
        };
        let object = self.chunks.object(number).clone();
        let put = self.store.put_with(object, options).await;
        let durable = put.is_ok_and(|put| put.durable);
        if durable {
            self.acknowledged();
        }
        durable
    }

    async fn get(&self, number: u32) -> Got {
        get(&self.store, &self.chunks, number).await
    }

    async fn delete(&self, number: u32) -> bool {
        let deleted = self.store.delete(self.chunks.key(number)).await;
        if matches!(deleted, Ok(true)) {
            self.acknowledged();
        }
        deleted.is_ok()
    }

    async fn disk_usage(&self) -> (u64, u64) {
        let usage = self.store.stats().disk.unwrap_or_default();
        (usage.bytes, usage.capacity)
    }
}

/// Reads all of a chunk.
pub async fn get(store: &Store, chunks: &Chunks, number: u32) -> Got {
    let Some(lease) = store.lease(chunks.key(number)).await else {
        return Got::Miss;
    };
    match lease.read_extents(lease.header().all()).await {
        Ok(layers) => chunks.compare(number, lease.layout(), &layers),
        Err(ReadError::Corrupt { .. }) => Got::Miss,
        Err(_) => Got::Failed,
    }
}

/// Drops a store and waits until the last of its work ended.
async fn end(target: StoreTarget, data: &Path) -> anyhow::Result<()> {
    // It may have no power.
    let _ = target.store.close().await;
    drop(target);
    let lock = File::options().write(true).open(data.join("LOCK"))?;
    let patience = Instant::now() + PATIENCE;
    while lock.try_lock().is_err() {
        ensure!(Instant::now() < patience, "the store never ends");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    Ok(())
}

/// Loses any part of a catalog's log beyond `synced` bytes.
fn cut_log(catalog: &Path, synced: u64, random: &mut StdRng) -> anyhow::Result<()> {
    let (path, len) = newest_log(catalog)?.context("a catalog has a log")?;
    let synced = synced.min(len);
    let cut = random.random_range(synced..=len);
    let log = File::options().write(true).open(path)?;
    log.set_len(cut)?;
    if random.random_bool(0.3) {
        let sector = (cut.saturating_sub(1) / SECTOR_BYTES * SECTOR_BYTES).max(synced);
        let torn = usize::try_from(cut - sector)?;
        log.write_all_at(&vec![0; torn], sector)?;
    }
    Ok(())
}

/// The log that the catalog writes now, and its length.
fn newest_log(catalog: &Path) -> io::Result<Option<(PathBuf, u64)>> {
    let mut newest = None;
    for entry in fs::read_dir(catalog)? {
        let path = entry?.path();
        // Names are numbers of one length.
        let is_log = path.extension().is_some_and(|extension| extension == "log");
        if is_log && newest.as_ref().is_none_or(|newest| *newest < path) {
            newest = Some(path);
        }
    }
    let Some(path) = newest else { return Ok(None) };
    let bytes = fs::metadata(&path)?.len();
    Ok(Some((path, bytes)))
}

fn copy_directory(from: &Path, to: &Path) -> io::Result<()> {
    fs::create_dir(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        fs::copy(entry.path(), to.join(entry.file_name()))?;
    }
    Ok(())
}

/// Clients of a load.
pub(super) const CLIENTS: u32 = 6;
const MIN_LOAD: Duration = Duration::from_millis(2);
const MAX_LOAD: Duration = Duration::from_millis(60);
/// With what is about to end.
const PATIENCE: Duration = Duration::from_secs(30);
const MEMORY: ByteSize = ByteSize::mib(4);
pub(super) const ROOMY: ByteSize = ByteSize::mib(64);
pub(super) const TIGHT: ByteSize = ByteSize::mib(1);
const SECTOR_BYTES: u64 = 512;
