//! Client SDK of the Kvasir cache daemon.
//!
//! A [`Client`] is one cheap-to-clone handle for every call of a daemon. It
//! reconnects by itself, gives every call a deadline, retries what may be
//! repeated, and hands out nothing it has not checked.
//!
//! Store a chunk and read it back, layer by layer:
//!
//! ```no_run
//! use bytes::Bytes;
//! use kvasir_client::{Chunk, Client, GetEvent, GetOptions};
//! use kvasir_types::{DType, KvLayout, Level, ModelIdentity, Namespace, Planes};
//!
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! let layout = KvLayout::new(16, 4, Planes::symmetric(64), 256, DType::Bf16)?;
//! let model = ModelIdentity {
//!     architecture: "llama hidden=1024".into(),
//!     weights: "a1b2".into(),
//!     rope: "default theta=10000".into(),
//! };
//! let namespace = Namespace::new(&model, None, layout, &[7; 32], b"");
//! let tokens: Vec<u32> = (0..256).collect();
//! let keys = namespace.prefix_keys(&tokens);
//!
//! let client = Client::connect("127.0.0.1:7420").await?;
//! let layers = vec![Bytes::from(vec![0; layout.layer_bytes()]); 16];
//! client
//!     .put(&Chunk { key: keys[0], layout, level: Level::RAW, extents: layers })
//!     .await?;
//!
//! let mut stream = client.get(&keys, GetOptions::default()).await?;
//! println!("{} of {} chunks are here", stream.chunks().len(), keys.len());
//! while let Some(event) = stream.next().await? {
//!     match event {
//!         // One part, because the chunk is raw: the layer's bytes.
//!         GetEvent::Layer { chunk, layer, parts } => {
//!             println!("chunk {chunk}, layer {layer}: {} bytes", parts[0].len());
//!         }
//!         // Only encoded chunks have one.
//!         GetEvent::Prelude { .. } => (),
//!         // This chunk and every later one must be computed instead.
//!         GetEvent::Lost { chunk, reason } => println!("chunk {chunk}: {reason}"),
//!     }
//! }
//! # Ok(())
//! # }
//! ```
//!
//! An engine must start while its cache is down and recover when it comes back:
//! [`Client::connect_lazy`] never fails.
//!
//! Chunks that were encoded with a codec profile name it by digest. The daemon keeps
//! profiles too: [`Client::put_profile`], [`Client::get_profile`].
//!
//! # Deadlines
//!
//! Every call ends by its deadline, by timers of this process: a daemon that is
//! stopped, swapped out or cut off delays nobody. The defaults are
//! [`ClientConfig::call_timeout`] and [`ClientConfig::transfer_timeout`];
//! [`Client::with_call_timeout`] gives a handle with another one, and
//! [`GetOptions::deadline`] bounds one get.
//!
//! # Retries
//!
//! Calls that may be repeated without harm are repeated, with exponential backoff
//! and full jitter, when the daemon cannot be reached or asks to come back later,
//! and never past the deadline: lookup, put, delete, unpin, stats, those of profiles, and
//! the start of a get, list or watch. A [`pin`](Client::pin) is repeated only when the daemon said that
//! it did nothing, because a second pin would hold the chunks twice. A stream
//! that has begun is never restarted behind the caller's back.
//!
//! # The data plane
//!
//! Gets go over the data plane where the daemon offers one that can be reached, and over gRPC
//! else; nothing but their speed differs. [`Client::connect`] waits until that is known;
//! [`Client::data_path`] tells. A daemon that goes away is noticed by its control connection,
//! so that a get ends with it, and not by its own silence. One-sided reads of the daemon's memory
//! (RDMA) need the feature `rdma`, at both ends, and devices.
//!
//! Not here: the wire format (`kvasir-proto`), what to fetch and when
//! (`kvasir-plugin`).

#![forbid(unsafe_code)]
#![cfg_attr(not(test), deny(clippy::indexing_slicing))]

mod chunk;
mod client;
mod config;
mod deadline;
mod endpoint;
mod error;
mod get;
mod hold;
mod list;
mod one_sided;
mod paths;
mod profile;
mod retry;
mod stats;
mod watch;

pub use chunk::{Chunk, Put, PutOptions, PutOutcome};
pub use client::{Client, Found, Lookup, Pin, PinId};
pub use config::{ClientConfig, DataPlane, RetryConfig, TlsConfig, TlsFileError};
pub use kvasir_transport::quic::{Identity, TlsError, Trust};
pub use kvasir_transport::{Carrier, Status as PathStatus};

pub use endpoint::{Endpoint, ParseEndpointError};
pub use error::{CallError, ConnectError, ProtocolError};
pub use get::{ChunkInfo, GetEvent, GetOptions, LayerStream, LostReason};
pub use hold::{Held, Hold, LeaseId};
pub use list::{ListOptions, ListedChunk, Listing};
pub use profile::ListedProfile;
pub use stats::{LevelStats, Stats, Tier, TierStats};
pub use watch::{Watch, WatchEvent, WatchedChange};
