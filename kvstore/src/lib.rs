//! Tiers, catalog, leases and budgets of the cache daemon.
//!
//! ```text
//! put     claim the key → reserve memory → disk: write, sync, catalogue → index
//!         → memory: index                                            (publish last)
//! get     index → lease → layers, verified → bytes that own their budget
//! demote  memory: what goes next → worth it? → disk, as for a put
//! ```
//!
//! * [`Store`]: what the daemon uses; composes the tiers.
//! * [`Tier`]: one storage level and its contract; [`MemoryTier`], [`DiskTier`].
//! * [`Lease`]: a reader's hold on a chunk; [`LeaseSession`]: leases that have names.
//! * [`Profiles`]: what chunks may be encoded with; kept until an operator deletes them.
//! * [`policy`]: which chunk goes first, and which is worth a write to disk.
//! * [`Budget`], [`Reservation`]: hard limits on bytes.
//! * [`Event`], [`Snapshot`]: what changed, for watchers.
//!
//! # Who owns what
//! A tier owns an index: plain data behind one mutex, locked for lookups and
//! updates, never across an await or I/O. Payload is owned by whoever reads it:
//! bytes carry their reservation, and return it when the last reader drops them,
//! so evicting or deleting a chunk never touches what a reader has. The memory
//! budget pays for stored chunks, their index entries, objects on their way in and
//! buffers on their way out. Files are owned by the disk tier; the space of a chunk
//! counts until its last lease ends, also when it was evicted or deleted. The disk
//! tier's index (about 115 bytes a chunk) is the one structure outside the budgets.
//!
//! Eviction happens in the call that needs room. One background task copies what memory
//! will evict next to disk, where it is not there yet and worth it; it ends with the
//! store. Only waiting is async: files, the catalog and checksums of large reads run on
//! the runtime's blocking threads, at most `io-depth` at once for the disk. Such a
//! step runs to its end even if its caller is dropped, so cancellation leaves
//! whole chunks or none.
//!
//! # Overload
//! Nothing queues without bound. Where everything that fills a budget is pinned or
//! held, the answer is [`Throttled`], at once. A put that would evict what is about to
//! be copied to disk waits for that, a second at most. Disk requests beyond `io-depth`
//! wait, each with its memory already reserved, so the memory budget bounds them.
//! Watchers that lag lose events and are told so.
//!
//! # What a crash loses
//! Writes that were not acknowledged as durable, recency (the restarted disk tier starts
//! in order of writing), pins, leases, and what is in memory alone; closing the store
//! first moves that to disk. A chunk that was acknowledged as durable is whole and synced,
//! and its catalog record is too. See [`DiskTier`] for the order of steps.
//!
//! Not here: the object format (`kvasir_codec`), protocols and tenants
//! (`kvasir-server`), which chunks to fetch (`kvasir-plugin`).

#![forbid(unsafe_code)]

mod blocking;
mod budget;
mod buffers;
mod claims;
mod clock;
mod config;
mod demotion;
mod disk;
mod environment;
mod events;
mod index;
mod lease;
mod leases;
mod levels;
mod memory;
#[cfg(all(test, kvasir_loom))]
mod models;
mod payload;
mod pins;
pub mod policy;
mod profiles;
mod promotion;
mod store;
mod sync;
mod tier;

pub use budget::{Budget, ChargedBytes, Reservation, Throttled};
pub use clock::Clock;
pub use config::{ClassConfig, DiskConfig, MemoryConfig, ProfilesConfig, StoreConfig};
pub use disk::{DirectIo, DiskTier, Medium, MediumFile, OpenError};
pub use environment::Environment;
pub use events::{Event, EventKind, EventLog, Snapshot};
pub use lease::Lease;
pub use leases::{HoldRefused, LeaseId, LeaseSession};
pub use levels::{LevelUsage, LevelUsages};
pub use memory::MemoryTier;
pub use payload::{Payload, PayloadShape, Received};
pub use pins::{PinId, PinRefused};
pub use profiles::{
    GetProfileError, IncomingProfile, ProfileInfo, ProfileUsage, Profiles, PutProfileError,
};
pub use store::{Found, Listed, LookupResult, Put, PutError, PutOptions, PutOutcome, Stats, Store};
pub use tier::{
    ChunkReader, DeviceError, Facts, Read, ReadError, Tier, TierKind, Usage, WriteError, Written,
};
