//! Fills a disk tier, faster than a daemon would.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use futures::{StreamExt as _, TryStreamExt as _, stream};
use kvasir_codec::Object;
use kvasir_store::{
    DirectIo, DiskConfig, Environment, Medium, MediumFile, MemoryConfig, Store, StoreConfig,
};
use kvasir_types::{ByteSize, DType, KvLayout, Planes};

use crate::store::key;

/// Small chunks: one layer of 512 bytes.
#[derive(Clone, Debug)]
pub(super) struct Chunks(KvLayout);

impl Chunks {
    /// A block for the header, one for the payload.
    pub(super) const FRAME_BYTES: u64 = 2 * 4096;

    pub(super) fn new() -> anyhow::Result<Self> {
        let layout = KvLayout::new(1, 1, Planes::symmetric(8), 16, DType::Bf16)?;
        Ok(Self(layout))
    }

    /// The chunk of a number; its bytes follow from it.
    pub(super) fn object(&self, number: u64) -> anyhow::Result<Object> {
        let word = number.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes();
        let layer: Bytes = word
            .iter()
            .copied()
            .cycle()
            .take(self.0.layer_bytes())
            .collect();
        Ok(Object::raw(key(number), &self.0, vec![layer])?)
    }

    /// A store with room for `count` chunks, and more to be written.
    pub(super) fn config(directory: &Path, count: u64) -> StoreConfig {
        StoreConfig {
            memory: MemoryConfig::with_capacity(ByteSize::mib(64)),
            disk: Some(DiskConfig {
                capacity: ByteSize::bytes((2 * count + SPARE_CHUNKS) * Self::FRAME_BYTES),
                ..DiskConfig::at(directory)
            }),
            ..StoreConfig::default()
        }
    }
}

/// Stores chunks in `directory`. All of them are durable when this returns, none before.
pub(super) async fn fill(directory: &Path, count: u64, hollow: bool) -> anyhow::Result<()> {
    let memory = memory_directory()?;
    let catalog = directory.join("catalog");
    if let Some(memory) = &memory {
        symlink(memory.path(), &catalog)?;
    }
    let environment = Environment {
        medium: Arc::new(Fast { hollow }),
        ..Environment::default()
    };
    let chunks = Chunks::new()?;
    let store = Store::open_in(environment, Chunks::config(directory, count)).await?;
    let progress = crate::progress(count, "storing chunks");
    stream::iter(0..count)
        .map(|number| {
            let (store, object) = (store.clone(), chunks.object(number));
            async move {
                anyhow::Ok(
                    tokio::spawn(
                        async move { store.put(object?).await.map_err(anyhow::Error::from) },
                    )
                    .await??,
                )
            }
        })
        .buffer_unordered(IN_FLIGHT)
        .try_for_each(|_| {
            progress.inc(1);
            std::future::ready(Ok(()))
        })
        .await?;
    progress.finish_and_clear();
    store.close().await?;
    drop(store);
    if let Some(memory) = memory {
        fs::remove_file(&catalog)?;
        fs::create_dir(&catalog)?;
        for file in fs::read_dir(memory.path())? {
            let file = file?;
            fs::copy(file.path(), catalog.join(file.file_name()))?;
        }
    }
    for file in fs::read_dir(directory.join("segments"))?.chain(fs::read_dir(&catalog)?) {
        File::open(file?.path())?.sync_all()?;
    }
    Ok(())
}

/// A directory whose syncs cost nothing, if the system has one.
fn memory_directory() -> io::Result<Option<tempfile::TempDir>> {
    let parent = Path::new("/dev/shm");
    parent
        .is_dir()
        .then(|| tempfile::tempdir_in(parent))
        .transpose()
}

/// Ordinary files without a sync; hollow ones hold no frames, but are as long as if they
/// did.
#[derive(Clone, Copy, Debug)]
pub(super) struct Fast {
    pub(super) hollow: bool,
}

#[derive(Debug)]
struct FastFile {
    file: File,
    hollow: bool,
}

impl Fast {
    fn file(self, options: &OpenOptions, path: &Path) -> io::Result<Box<dyn MediumFile>> {
        Ok(Box::new(FastFile {
            file: options.open(path)?,
            hollow: self.hollow,
        }))
    }
}

impl Medium for Fast {
    fn create(&self, path: &Path) -> io::Result<Box<dyn MediumFile>> {
        self.file(
            File::options().read(true).write(true).create_new(true),
            path,
        )
    }

    fn open(&self, path: &Path) -> io::Result<Box<dyn MediumFile>> {
        self.file(File::options().read(true).write(true), path)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        DirectIo.remove(path)
    }

    fn sync_directory(&self, _: &Path) -> io::Result<()> {
        Ok(())
    }
}

impl MediumFile for FastFile {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        MediumFile::read_at(&self.file, buffer, offset)
    }

    fn write_at(&self, buffer: &[u8], offset: u64) -> io::Result<usize> {
        // The segment's own header is always there.
        if self.hollow && offset > 0 {
            self.file.set_len(offset + buffer.len() as u64)?;
            return Ok(buffer.len());
        }
        MediumFile::write_at(&self.file, buffer, offset)
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    fn punch(&self, range: Range<u64>) -> io::Result<()> {
        self.file.punch(range)
    }

    fn data(&self, from: u64) -> io::Result<Option<Range<u64>>> {
        if self.hollow {
            let end = self.file.metadata()?.len();
            return Ok((from < end).then_some(from..end));
        }
        self.file.data(from)
    }
}

/// Enough to keep all of the tier's writers busy.
const IN_FLIGHT: usize = 32;
const SPARE_CHUNKS: u64 = 1 << 20;
