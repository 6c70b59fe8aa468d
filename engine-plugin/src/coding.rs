//! Encoding captured chunks and decoding fetched layers, on a bounded number of threads.
//!
//! [`CodecConfig::encode`] and [`Decoding`] are also for those who look after profiles themselves,
//! such as a client that waits for them.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use kvasir_client::Chunk;
use kvasir_codec::{
    ChunkDecoder, ChunkError, EncodeError, Encoding, KeyRotation, Prelude, Profile,
    UnsupportedLayout,
};
use kvasir_types::{KvLayout, LayerIdx, Level, Planes, ProfileDigest};
use tokio::sync::Semaphore;
use tracing::warn;

use crate::ChunkCopy;
use crate::profiles::Profiles;

/// In which form chunks are stored and fetched.
#[derive(Clone, Debug)]
pub struct CodecConfig {
    /// How captured chunks are encoded. A profile is uploaded to the daemon in the
    /// background. Chunks that name another one are decoded with what the daemon keeps: the
    /// first request that meets one computes, and has it fetched for those that follow.
    /// Default: not at all, [`Level::RAW`].
    pub encoding: Encoding,
    /// The finest level that is fetched of chunks which are stored at a nested level.
    /// Default: as stored, or as fine as [`deadline`](crate::PluginConfig::deadline) allows.
    pub fetch: Option<Level>,
    /// How the engine turns keys, for nested levels: without RoPE they take fewer bits. Its
    /// `start` counts for nothing. Default: not at all.
    pub rotation: Option<KeyRotation>,
    /// Tokens at the start of a prompt that stay exact at nested levels: much attention
    /// goes to them (Xiao et al., arXiv 2309.17453), and none of the levels would do them
    /// justice. Default: 4.
    pub exact_tokens: u32,
    /// Most threads that encode or decode at once. Default: one per core.
    pub threads: usize,
}

impl Default for CodecConfig {
    fn default() -> Self {
        Self {
            encoding: Encoding::at(Level::RAW),
            fetch: None,
            rotation: None,
            exact_tokens: 4,
            threads: std::thread::available_parallelism().map_or(1, usize::from),
        }
    }
}

impl CodecConfig {
    /// Whether chunks of `layout` can be encoded like this.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn check(&self, layout: &KvLayout) -> Result<(), EncodeError> {
        let pairing = self.rotation.as_ref().map(|rotation| rotation.pairing);
        let profile = self.encoding.profile.as_ref();
        if profile.is_some_and(|profile| !profile.fits(layout, pairing)) {
            return Err(UnsupportedLayout::Profile.into());
        }
        self.encoding.check(layout)
    }

    /// A chunk in the form that it is stored in. One that would take more bytes than it has is
    /// left exact.
    ///
    /// # Errors
    /// It cannot be encoded like this, or its layers are not those of its layout.
    pub fn encode(&self, copy: ChunkCopy) -> Result<Chunk, EncodeError> {
        let rotation = self.rotation.clone().map(|rotation| KeyRotation {
            start: copy.start,
            ..rotation
        });
        let layout = copy.layout;
        let exact = u64::from(self.exact_tokens).saturating_sub(copy.start);
        let prelude = Prelude {
            rotation,
            exact_tokens: u32::try_from(exact).map_or(0, |it| it.min(layout.tokens())),
            ..Prelude::default()
        };
        let object = self
            .encoding
            .encode(copy.key, &layout, &prelude, copy.layers)?;
        let level = object.header().level();
        let (header, extents) = object.into_parts();
        Ok(Chunk {
            key: *header.key(),
            layout,
            level,
            extents,
        })
    }
}

/// A bounded number of threads for what takes a CPU, apart from those that wait for I/O.
#[derive(Debug)]
pub struct Threads(Semaphore);

impl Threads {
    /// At most so many, and at least one.
    pub fn new(most: usize) -> Self {
        Self(Semaphore::new(most.max(1)))
    }

    /// What some work comes to; waits for a thread. `None` where the runtime is shutting down.
    pub async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Option<T> {
        let _thread = self.0.acquire().await.ok()?;
        tokio::task::spawn_blocking(work).await.ok()
    }
}

/// Encodes and decodes.
#[derive(Debug)]
pub(crate) struct Coder {
    config: CodecConfig,
    profiles: Arc<Profiles>,
    threads: Threads,
    /// What came of what was stored, in thousandths: less than all where chunks are fetched
    /// coarser than they are stored.
    share: AtomicU32,
}

/// How a chunk under way is decoded; found out when it is first needed.
#[derive(Debug)]
pub struct Decoding {
    layout: KvLayout,
    level: Level,
    prelude: Bytes,
    /// The one that the prelude names.
    profile: Option<Arc<Profile>>,
    decoder: OnceLock<Result<ChunkDecoder, ChunkError>>,
}

/// A layer of a chunk, as it came.
#[derive(Debug)]
pub(crate) struct Encoded {
    pub(crate) decoding: Arc<Decoding>,
    pub(crate) layer: LayerIdx,
    pub(crate) parts: Vec<Bytes>,
}

/// Decodes layers one after another, on one of `threads` if need be. `None` where the runtime is
/// shutting down.
async fn decode(threads: &Threads, layers: Vec<Encoded>) -> Option<Vec<Result<Bytes, ChunkError>>> {
    let raw = layers.iter().map(|it| it.decoding.as_it_is(&it.parts));
    if let Some(raw) = raw.map(|it| it.map(Ok)).collect() {
        return Some(raw);
    }
    let now = |it: Encoded| it.decoding.layer_now(it.layer, &it.parts);
    let work = move || layers.into_iter().map(now).collect();
    threads.run(work).await
}

/// A layer that came.
#[derive(Debug)]
pub(crate) struct Decoded {
    /// The level that it came at.
    pub(crate) level: Level,
    /// Raw.
    pub(crate) data: Bytes,
    /// Bytes that came for it.
    pub(crate) received: u64,
}

impl Decoding {
    /// Of a chunk of this layout, level and prelude, and the profile that
    /// [its prelude names](Self::profile_of), if it does.
    pub fn new(
        layout: KvLayout,
        level: Level,
        prelude: Bytes,
        profile: Option<Arc<Profile>>,
    ) -> Self {
        Self {
            prelude,
            profile,
            ..Self::raw(layout, level)
        }
    }

    /// The profile that the prelude of a chunk of `layout` names. A prelude that is damaged names
    /// none, and says so when layers are decoded.
    pub fn profile_of(layout: &KvLayout, prelude: &[u8]) -> Option<ProfileDigest> {
        let parsed = Prelude::parse(prelude, layout).ok()?;
        parsed.profile.map(ProfileDigest::from_bytes)
    }

    /// A raw layer from those of its parts that came, decoded on one of `threads`. `None` where
    /// the runtime is shutting down.
    pub async fn layer(
        self: Arc<Self>,
        threads: &Threads,
        layer: LayerIdx,
        parts: Vec<Bytes>,
    ) -> Option<Result<Bytes, ChunkError>> {
        let layer = Encoded {
            decoding: self,
            layer,
            parts,
        };
        decode(threads, vec![layer]).await?.pop()
    }

    /// A layer that is raw as it came.
    fn as_it_is(&self, parts: &[Bytes]) -> Option<Bytes> {
        match parts {
            [layer] if !self.level.is_encoded() && layer.len() == self.layout.layer_bytes() => {
                Some(layer.clone())
            }
            _ => None,
        }
    }

    fn layer_now(&self, layer: LayerIdx, parts: &[Bytes]) -> Result<Bytes, ChunkError> {
        // Among others that are not.
        if let Some(raw) = self.as_it_is(parts) {
            return Ok(raw);
        }
        let Self {
            layout,
            level,
            prelude,
            profile,
            ..
        } = self;
        let decoder = || ChunkDecoder::new(*layout, *level, prelude, profile.as_slice());
        let decoder = self.decoder.get_or_init(decoder).as_ref();
        let mut raw = vec![0; layout.layer_bytes()];
        let decoder = decoder.map_err(ChunkError::clone)?;
        decoder.layer(layer, parts, &mut raw)?;
        Ok(raw.into())
    }

    /// Of a chunk without a prelude.
    pub(crate) fn raw(layout: KvLayout, level: Level) -> Self {
        Self {
            layout,
            level,
            prelude: Bytes::new(),
            profile: None,
            decoder: OnceLock::new(),
        }
    }

    /// The level that the chunk is stored at.
    pub(crate) fn level(&self) -> Level {
        self.level
    }

    /// The level of a layer that is decoded from so many parts.
    pub(crate) fn level_of(&self, parts: usize) -> Level {
        let nested = [Level::L0, Level::L1, Level::L2].into_iter();
        let of_parts = nested.take(parts).next_back();
        of_parts.map_or(self.level, |level| self.level.at_most(level))
    }
}

impl Coder {
    pub(crate) fn new(config: CodecConfig, profiles: Arc<Profiles>) -> Self {
        Self {
            threads: Threads::new(config.threads),
            config,
            profiles,
            share: AtomicU32::new(WHOLE),
        }
    }

    pub(crate) fn config(&self) -> &CodecConfig {
        &self.config
    }

    /// Bytes that are expected to come of chunks that take so many in the store.
    pub(crate) fn expected_bytes(&self, stored: u64) -> u64 {
        let share = u64::from(self.share.load(Ordering::Relaxed));
        stored.saturating_mul(share) / u64::from(WHOLE)
    }

    /// The level that chunks are stored at.
    pub(crate) fn stores_at(&self) -> Level {
        self.config.encoding.level
    }

    /// So many came.
    pub(crate) fn note_received(&self, received: u64, stored: u64) {
        let share = received.saturating_mul(WHOLE.into()).checked_div(stored);
        let share = share.map_or(WHOLE, |share| u32::try_from(share).unwrap_or(WHOLE));
        self.share.store(share.min(WHOLE), Ordering::Relaxed);
    }

    /// Whether what was computed over chunks that came at `level` may be stored: it is no
    /// better than they are, and nobody could tell.
    pub(crate) fn may_store_over(&self, level: Level) -> bool {
        let stored = self.config.encoding.level;
        level.is_exact() || level.serves(stored)
    }

    /// A chunk in the form that it is stored in. One that cannot be encoded stays raw.
    pub(crate) async fn encode(self: &Arc<Self>, copy: ChunkCopy) -> Chunk {
        let raw = |copy: ChunkCopy| Chunk {
            key: copy.key,
            layout: copy.layout,
            level: Level::RAW,
            extents: copy.layers,
        };
        // One number a token is what was recorded of a chunk, no KV.
        let is_kv = copy.layout.planes() != Planes::Single { dim: 1 };
        if !self.config.encoding.level.is_encoded() || !is_kv {
            return raw(copy);
        }
        let coder = Arc::clone(self);
        let job = {
            let copy = copy.clone();
            move || coder.config.encode(copy)
        };
        match self.threads.run(job).await {
            Some(Ok(chunk)) => chunk,
            Some(Err(error)) => {
                warn!(key = %copy.key, %error, "a chunk cannot be encoded; storing it raw");
                raw(copy)
            }
            None => raw(copy),
        }
    }

    /// How a chunk of this layout and prelude is decoded; `None` where it names a profile that
    /// is not here, yet.
    pub(crate) fn decoding(
        &self,
        layout: KvLayout,
        level: Level,
        prelude: Bytes,
    ) -> Option<Decoding> {
        let profile = match Decoding::profile_of(&layout, &prelude) {
            Some(named) => Some(self.profiles.get(named)?),
            None => None,
        };
        Some(Decoding::new(layout, level, prelude, profile))
    }

    /// Layers of some chunks from those of their parts that came, in order. `None` for those that
    /// cannot be decoded.
    pub(crate) async fn layers(&self, layers: Vec<Encoded>) -> Vec<Option<Decoded>> {
        let came = |it: &Encoded| {
            let received = it.parts.iter().map(|part| part.len() as u64).sum();
            (it.layer, it.decoding.level_of(it.parts.len()), received)
        };
        let came: Vec<(LayerIdx, Level, u64)> = layers.iter().map(came).collect();
        let Some(decoded) = decode(&self.threads, layers).await else {
            // The runtime is shutting down.
            return came.iter().map(|_| None).collect();
        };
        let outcome = |((layer, level, received), data): (_, Result<Bytes, ChunkError>)| {
            let failed = |error: &ChunkError| {
                warn!(%layer, %error, "a cached chunk cannot be decoded; computing it");
            };
            let data = data.inspect_err(failed).ok()?;
            Some(Decoded {
                level,
                data,
                received,
            })
        };
        came.into_iter().zip(decoded).map(outcome).collect()
    }

    /// One layer.
    pub(crate) async fn layer(
        &self,
        decoding: Arc<Decoding>,
        layer: LayerIdx,
        parts: Vec<Bytes>,
    ) -> Option<Decoded> {
        let layer = Encoded {
            decoding,
            layer,
            parts,
        };
        self.layers(vec![layer]).await.pop().flatten()
    }
}

/// In thousandths.
const WHOLE: u32 = 1000;
