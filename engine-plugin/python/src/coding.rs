//! Chunks in the form that they are stored in, and back.
//!
//! What is encoded or decoded is on threads of its own, apart from those for I/O. A profile that a
//! chunk names is fetched when the first chunk names it, and kept; those of chunks that are put are
//! uploaded before them.

use std::num::NonZeroUsize;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use kvasir_client::{CallError, Chunk, ChunkInfo, Client, ProtocolError};
use kvasir_plugin::{ChunkCopy, ChunkError, CodecConfig, Decoding, Encoding, Threads};
use kvasir_types::{KvLayout, LayerIdx, Level, ProfileDigest};
use lru::LruCache;
use pyo3::prelude::*;
use tokio::sync::Semaphore;

use crate::failure::Failure;
use crate::invalid;
use crate::profile::Profile;

/// Profiles that are kept in memory. One may have 70 MB.
const PROFILES: NonZeroUsize = NonZeroUsize::new(4).unwrap();

/// How long a daemon is believed to have a profile still.
const LOOK_AGAIN: Duration = Duration::from_secs(10);

/// How chunks of a layout are to be encoded.
pub(crate) fn codec(
    layout: &KvLayout,
    level: &str,
    profile: Option<&Profile>,
) -> PyResult<CodecConfig> {
    let level: Level = level.parse().map_err(invalid)?;
    if profile.is_some() && !level.is_nested() {
        return Err(invalid(format!(
            "chunks at level {level} take no profile; use l0, l1 or l2"
        )));
    }
    let config = CodecConfig {
        encoding: Encoding {
            profile: profile.map(|profile| Arc::clone(&profile.0)),
            ..Encoding::at(level)
        },
        ..CodecConfig::default()
    };
    config.check(layout).map_err(invalid)?;
    Ok(config)
}

/// Encodes and decodes what goes to a daemon and comes from it.
#[derive(Debug)]
pub(crate) struct Coding {
    client: Client,
    threads: Threads,
    profiles: Mutex<LruCache<ProfileDigest, Arc<kvasir_plugin::Profile>>>,
    /// One is fetched or uploaded at a time, so that none is on its way twice.
    turn: Semaphore,
    uploaded: Mutex<LruCache<ProfileDigest, Instant>>,
}

impl Coding {
    pub(crate) fn new(client: Client) -> Self {
        Self {
            client,
            threads: Threads::new(CodecConfig::default().threads),
            profiles: Mutex::new(LruCache::new(PROFILES)),
            turn: Semaphore::new(1),
            uploaded: Mutex::new(LruCache::new(PROFILES)),
        }
    }

    /// Layers that are decoded at once, and wait for it.
    pub(crate) fn at_once() -> usize {
        2 * CodecConfig::default().threads
    }

    /// A chunk as it is to be stored. Its profile is uploaded first, for all who get the chunk.
    pub(crate) async fn encode(
        &self,
        codec: CodecConfig,
        copy: ChunkCopy,
    ) -> Result<Chunk, Failure> {
        if !codec.encoding.level.is_encoded() {
            return codec.encode(copy).map_err(Failure::Encode);
        }
        if let Some(profile) = &codec.encoding.profile {
            self.upload(profile).await?;
        }
        let encoded = self.threads.run(move || codec.encode(copy)).await;
        encoded.ok_or(Failure::Ending)?.map_err(Failure::Encode)
    }

    async fn upload(&self, profile: &Arc<kvasir_plugin::Profile>) -> Result<(), Failure> {
        let digest = ProfileDigest::from_bytes(*profile.digest());
        let _turn = self.turn.acquire().await.map_err(|_| Failure::Ending)?;
        let known = self.uploaded().get(&digest).copied();
        if known.is_none_or(|known| known.elapsed() > LOOK_AGAIN) {
            self.client.put_profile(profile).await?;
            self.uploaded().put(digest, Instant::now());
            self.profiles().put(digest, Arc::clone(profile));
        }
        Ok(())
    }

    /// How a chunk is decoded that has this prelude; fetches the profile that it names.
    pub(crate) async fn decoding(
        &self,
        chunk: usize,
        info: &ChunkInfo,
        prelude: Bytes,
    ) -> Result<Decoding, Failure> {
        let profile = match Decoding::profile_of(&info.layout, &prelude) {
            Some(digest) => Some(self.profile(chunk, digest).await?),
            None => None,
        };
        Ok(Decoding::new(info.layout, info.level, prelude, profile))
    }

    async fn profile(
        &self,
        chunk: usize,
        digest: ProfileDigest,
    ) -> Result<Arc<kvasir_plugin::Profile>, Failure> {
        if let Some(profile) = self.profiles().get(&digest) {
            return Ok(Arc::clone(profile));
        }
        let _turn = self.turn.acquire().await.map_err(|_| Failure::Ending)?;
        // Whoever had the turn before may have fetched it.
        if let Some(profile) = self.profiles().get(&digest) {
            return Ok(Arc::clone(profile));
        }
        let profile = match self.client.get_profile(digest).await {
            Ok(Some(profile)) => Arc::new(profile),
            Ok(None) => return Err(Failure::NoProfile { chunk, digest }),
            Err(CallError::Profile { source, .. }) => {
                return Err(Failure::Profile {
                    chunk,
                    digest,
                    source,
                });
            }
            Err(CallError::Protocol(ProtocolError::ProfileDigest(_))) => {
                return Err(Failure::Profile {
                    chunk,
                    digest,
                    source: kvasir_plugin::ProfileError::Checksum,
                });
            }
            Err(error) => return Err(error.into()),
        };
        self.profiles().put(digest, Arc::clone(&profile));
        Ok(profile)
    }

    /// A raw layer of a chunk, from its parts.
    pub(crate) async fn layer(
        &self,
        chunk: usize,
        decoding: Arc<Decoding>,
        layer: LayerIdx,
        parts: Vec<Bytes>,
    ) -> Result<Bytes, Failure> {
        let decoded = decoding.layer(&self.threads, layer, parts).await;
        let failed = |source: ChunkError| Failure::Decode { chunk, source };
        decoded.ok_or(Failure::Ending)?.map_err(failed)
    }

    fn profiles(&self) -> MutexGuard<'_, LruCache<ProfileDigest, Arc<kvasir_plugin::Profile>>> {
        self.profiles.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn uploaded(&self) -> MutexGuard<'_, LruCache<ProfileDigest, Instant>> {
        self.uploaded.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
