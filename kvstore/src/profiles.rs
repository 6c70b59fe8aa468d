//! Codec profiles: what chunks of nested levels may be encoded with, kept by digest.
//!
//! ```text
//! put     reserve memory → receive → digest and checksum → disk: write, sync, rename,
//!         sync of the directory → known                              (publish last)
//! get     known → memory, or file → digest → bytes that own their budget
//! ```
//!
//! Where there is a disk tier, every profile is a file under its directory, and survives a
//! crash once its put was answered. Elsewhere it is in memory. What was damaged meanwhile is
//! set aside and no longer served: at the start, where all are read, or when it is asked for.
//!
//! Nothing is evicted: chunks that name a profile are worth nothing without it. So a put is
//! refused when the capacity is spent, until an operator deletes something. Profiles in
//! memory, and those on their way in and out, are paid for by the memory tier's budget.
//!
//! One file is read or written at a time. There are few profiles, and engines fetch each of
//! them once.

mod directory;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use kvasir_codec::{Profile, ProfileError, ProfileShape};
use kvasir_mem::ALIGNMENT;
use kvasir_types::{MAX_PROFILE_BYTES, ProfileDigest};

use self::directory::Directory;
use crate::blocking::blocking;
use crate::budget::Throttled;
use crate::buffers::{Buffer, BufferError};
use crate::config::ProfilesConfig;
use crate::disk::{DiskTier, OpenError};
use crate::memory::MemoryTier;
use crate::store::{Put, PutOutcome};
use crate::tier::DeviceError;

/// The profiles of one store. Clones are handles to the same ones.
#[derive(Clone, Debug)]
pub struct Profiles(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    kept: Mutex<Kept>,
    capacity: u64,
    memory: MemoryTier,
    directory: Option<Directory>,
    /// Held by whoever changes what is kept, or reads or writes a file, until that is done.
    turn: Arc<tokio::sync::Mutex<()>>,
}

#[derive(Debug, Default)]
struct Kept {
    by_digest: BTreeMap<ProfileDigest, Entry>,
    bytes: u64,
}

#[derive(Debug)]
struct Entry {
    shape: ProfileShape,
    bytes: u64,
    /// `None` where they are in a file.
    data: Option<Bytes>,
}

/// What is known of a profile without its bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProfileInfo {
    /// Its name.
    pub digest: ProfileDigest,
    /// Its bytes.
    pub bytes: u64,
    /// What it is of.
    pub shape: ProfileShape,
}

/// How many profiles are kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ProfileUsage {
    /// Profiles.
    pub profiles: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Limit of `bytes`. More than it may be kept only after it was lowered.
    pub capacity: u64,
}

/// A profile of which some bytes are here. Dropped, it leaves nothing.
#[derive(Debug)]
pub struct IncomingProfile {
    digest: ProfileDigest,
    buffer: Buffer,
    bytes: usize,
    received: usize,
}

/// Why a profile is not kept.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PutProfileError {
    /// More bytes than any profile may have, or none.
    #[error("{0} bytes; a profile has from 1 to {max}", max = MAX_PROFILE_BYTES)]
    Size(u64),
    /// The capacity is spent. Nothing is evicted by itself.
    #[error(
        "no room for a profile of {bytes} bytes: profiles take {used} of {capacity} bytes; \
         delete some with `kvasir profiles rm`, or raise `capacity` of `[profiles]`"
    )]
    Full {
        /// Bytes of the profile.
        bytes: u64,
        /// Bytes of those that are kept.
        used: u64,
        /// The limit.
        capacity: u64,
    },
    /// There are as many as there may be.
    #[error("{max} profiles are kept, and no more may be; delete some with `kvasir profiles rm`", max = Profiles::MAX_COUNT)]
    TooMany,
    /// Fewer or more bytes came than were announced.
    #[error("{actual} bytes came of a profile of {expected}")]
    Length {
        /// Bytes announced.
        expected: u64,
        /// Bytes that came.
        actual: u64,
    },
    /// The bytes are another profile's, or nobody's.
    #[error("these bytes have the digest {actual}")]
    Digest {
        /// Their digest.
        actual: ProfileDigest,
    },
    /// The bytes are no profile.
    #[error(transparent)]
    Profile(#[from] ProfileError),
    /// No memory to receive it into; retry later, if it fits at all.
    #[error(transparent)]
    Throttled(#[from] Throttled),
    /// The device failed.
    #[error(transparent)]
    Device(#[from] DeviceError),
}

/// Why a profile that is kept could not be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GetProfileError {
    /// No memory to read it into; retry later, if it fits at all.
    #[error(transparent)]
    Throttled(#[from] Throttled),
    /// The device failed.
    #[error(transparent)]
    Device(#[from] DeviceError),
}

impl IncomingProfile {
    /// Takes the next bytes.
    ///
    /// # Errors
    /// [`PutProfileError::Length`]: more than were announced.
    pub fn push(&mut self, data: &[u8]) -> Result<(), PutProfileError> {
        let received = self.received.saturating_add(data.len());
        let place = self.buffer.as_mut().get_mut(self.received..received);
        match place.filter(|_| received <= self.bytes) {
            Some(place) => place.copy_from_slice(data),
            None => return Err(self.length_error(received)),
        }
        self.received = received;
        Ok(())
    }

    /// Its bytes, and what they are a profile of.
    fn check(self) -> Result<(Bytes, ProfileShape), PutProfileError> {
        if self.received != self.bytes {
            return Err(self.length_error(self.received));
        }
        let data = Bytes::from_owner(self.buffer).slice(..self.bytes);
        let actual = ProfileDigest::of(&data);
        if actual != self.digest {
            return Err(PutProfileError::Digest { actual });
        }
        let shape = Profile::verify(&data)?;
        Ok((data, shape))
    }

    fn length_error(&self, actual: usize) -> PutProfileError {
        PutProfileError::Length {
            expected: self.bytes as u64,
            actual: actual as u64,
        }
    }
}

impl Profiles {
    /// Most profiles of one store.
    pub const MAX_COUNT: usize = 1024;

    /// The profiles under `path`, the directory of `disk`, or none in memory.
    pub(crate) async fn open(
        config: &ProfilesConfig,
        memory: MemoryTier,
        disk: Option<(DiskTier, &Path)>,
    ) -> Result<Self, OpenError> {
        let capacity = config.capacity_bytes(memory.capacity(), disk.is_some());
        let (directory, found) = match disk {
            None => (None, Vec::new()),
            Some((disk, path)) => {
                let path = path.to_owned();
                let failed = |source| OpenError::Recover {
                    path: path.clone(),
                    source,
                };
                let root = path.join("profiles");
                let opened = blocking(move || Directory::open(root, disk)).await;
                let opened = opened.and_then(|opened| Ok(opened?));
                let (directory, found) = opened.map_err(failed)?;
                (Some(directory), found)
            }
        };
        let mut kept = Kept::default();
        for ProfileInfo {
            digest,
            bytes,
            shape,
        } in found
        {
            let data = None;
            kept.insert(digest, Entry { shape, bytes, data });
        }
        if kept.bytes > capacity {
            tracing::warn!(
                bytes = kept.bytes,
                capacity,
                "profiles take more than their capacity; delete some, or raise it",
            );
        }
        Ok(Self(Arc::new(Shared {
            kept: Mutex::new(kept),
            capacity,
            memory,
            directory,
            turn: Arc::default(),
        })))
    }

    /// Memory to receive a profile into; evicts chunks if it must.
    ///
    /// # Errors
    /// It would not be kept, or there is no memory.
    pub(crate) fn receive(
        &self,
        digest: ProfileDigest,
        bytes: u64,
    ) -> Result<IncomingProfile, PutProfileError> {
        let len = usize::try_from(bytes).ok();
        let Some(len) = len.filter(|_| (1..=MAX_PROFILE_BYTES).contains(&bytes)) else {
            return Err(PutProfileError::Size(bytes));
        };
        // Before it is sent, not after.
        self.0.lock().check_room(bytes, self.0.capacity)?;
        let buffer = self.0.buffer(bytes).map_err(|error| match error {
            BufferError::Throttled(throttled) => PutProfileError::Throttled(throttled),
            BufferError::Io(error) => DeviceError::from(error).into(),
        })?;
        Ok(IncomingProfile {
            digest,
            buffer,
            bytes: len,
            received: 0,
        })
    }

    /// Keeps a profile, durably where there is a disk tier. Once polled it runs to its end,
    /// even if the future is dropped.
    ///
    /// # Errors
    /// It is not whole, not what it says, or there is no room; or the device failed. Then
    /// nothing changed.
    pub async fn put(&self, incoming: IncomingProfile) -> Result<Put, PutProfileError> {
        let turn = Arc::clone(&self.0.turn).lock_owned().await;
        let shared = Arc::clone(&self.0);
        blocking(move || {
            let _turn = turn;
            shared.put(incoming)
        })
        .await?
    }

    /// A profile's bytes; `None` where it is not kept, or was found to be damaged.
    ///
    /// # Errors
    /// There is no memory to read it into, or the device failed.
    pub(crate) async fn get(
        &self,
        digest: ProfileDigest,
    ) -> Result<Option<Bytes>, GetProfileError> {
        match self.0.lock().by_digest.get(&digest) {
            None => return Ok(None),
            Some(Entry {
                data: Some(data), ..
            }) => return Ok(Some(data.clone())),
            Some(_) => (),
        }
        let turn = Arc::clone(&self.0.turn).lock_owned().await;
        let shared = Arc::clone(&self.0);
        blocking(move || {
            let _turn = turn;
            shared.read(&digest)
        })
        .await?
    }

    /// Forgets a profile. Says whether there was one. Once polled it runs to its end, even
    /// if the future is dropped.
    ///
    /// # Errors
    /// The device failed. The profile is no longer served, but may come back after a
    /// restart.
    pub async fn delete(&self, digest: ProfileDigest) -> Result<bool, DeviceError> {
        let turn = Arc::clone(&self.0.turn).lock_owned().await;
        let shared = Arc::clone(&self.0);
        blocking(move || {
            let _turn = turn;
            let found = shared.lock().remove(&digest);
            if let (true, Some(directory)) = (found, &shared.directory) {
                directory.remove(&digest)?;
            }
            Ok(found)
        })
        .await?
    }

    /// What is known of a profile, if it is kept.
    pub fn find(&self, digest: &ProfileDigest) -> Option<ProfileInfo> {
        let kept = self.0.lock();
        Some(kept.by_digest.get(digest)?.info(*digest))
    }

    /// All profiles, in the order of their digests.
    pub fn list(&self) -> Vec<ProfileInfo> {
        let kept = self.0.lock();
        let entries = kept.by_digest.iter();
        entries.map(|(digest, entry)| entry.info(*digest)).collect()
    }

    /// How much is kept.
    pub fn usage(&self) -> ProfileUsage {
        let kept = self.0.lock();
        ProfileUsage {
            profiles: kept.by_digest.len() as u64,
            bytes: kept.bytes,
            capacity: self.0.capacity,
        }
    }

    /// Whether profiles survive a restart.
    pub fn is_durable(&self) -> bool {
        self.0.directory.is_some()
    }
}

impl Entry {
    fn info(&self, digest: ProfileDigest) -> ProfileInfo {
        ProfileInfo {
            digest,
            bytes: self.bytes,
            shape: self.shape,
        }
    }
}

impl Kept {
    fn insert(&mut self, digest: ProfileDigest, entry: Entry) {
        self.bytes += entry.bytes;
        self.by_digest.insert(digest, entry);
    }

    fn remove(&mut self, digest: &ProfileDigest) -> bool {
        let removed = self.by_digest.remove(digest);
        self.bytes -= removed.as_ref().map_or(0, |entry| entry.bytes);
        removed.is_some()
    }

    fn check_room(&self, bytes: u64, capacity: u64) -> Result<(), PutProfileError> {
        if self.by_digest.len() >= Profiles::MAX_COUNT {
            return Err(PutProfileError::TooMany);
        }
        if self.bytes.saturating_add(bytes) > capacity {
            return Err(PutProfileError::Full {
                bytes,
                used: self.bytes,
                capacity,
            });
        }
        Ok(())
    }
}

impl Shared {
    fn put(&self, incoming: IncomingProfile) -> Result<Put, PutProfileError> {
        let digest = incoming.digest;
        let (data, shape) = incoming.check()?;
        let durable = self.directory.is_some();
        let bytes = data.len() as u64;
        {
            let kept = self.lock();
            if kept.by_digest.contains_key(&digest) {
                return Ok(Put {
                    outcome: PutOutcome::AlreadyPresent,
                    durable,
                });
            }
            // Nobody else adds anything while this has its turn.
            kept.check_room(bytes, self.capacity)?;
        }
        let data = match &self.directory {
            Some(directory) => {
                directory.write(&digest, &data).map_err(DeviceError::from)?;
                None
            }
            None => Some(data),
        };
        self.lock().insert(digest, Entry { shape, bytes, data });
        Ok(Put {
            outcome: PutOutcome::Stored,
            durable,
        })
    }

    fn read(&self, digest: &ProfileDigest) -> Result<Option<Bytes>, GetProfileError> {
        // It may have gone while this waited for its turn.
        let known = self.lock().by_digest.get(digest).map(|entry| entry.bytes);
        let (Some(bytes), Some(directory)) = (known, &self.directory) else {
            return Ok(None);
        };
        let mut buffer = self.buffer(bytes).map_err(|error| match error {
            BufferError::Throttled(throttled) => GetProfileError::Throttled(throttled),
            BufferError::Io(error) => DeviceError::from(error).into(),
        })?;
        let len = usize::try_from(bytes).unwrap_or(usize::MAX);
        let place = buffer.as_mut().get_mut(..len).unwrap_or_default();
        if directory.read(digest, place).map_err(DeviceError::from)? {
            return Ok(Some(Bytes::from_owner(buffer).slice(..len)));
        }
        self.lock().remove(digest);
        Ok(None)
    }

    /// Memory of the tier, of whole blocks.
    fn buffer(&self, bytes: u64) -> Result<Buffer, BufferError> {
        let block = ALIGNMENT as u64;
        self.memory.buffer(bytes.div_ceil(block) * block)
    }

    fn lock(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
