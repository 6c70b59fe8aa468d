//! The handle.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use kvasir_proto::sequence::Wanted;
use kvasir_proto::v1::cache_client::CacheClient;
use kvasir_proto::{InvalidField, MAX_FRAME_BYTES, MAX_KEYS, MAX_MESSAGE_BYTES, convert, v1};
use kvasir_transport::{FetchOptions, Status as PathStatus};
use kvasir_types::ChunkKey;
use prost::Message as _;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Code, Status, Streaming};

use crate::chunk::{Chunk, Put, PutOptions, check_count};
use crate::config::ClientConfig;
use crate::deadline::Deadline;
use crate::error::{CallError, ConnectError, Origin, invalid};
use crate::get::{Doubts, GetOptions, LayerStream};
use crate::hold::Hold;
use crate::list::{ListOptions, Listing};
use crate::paths::Paths;
use crate::retry::{Attempts, Repeat};
use crate::stats::{Stats, Tier};
use crate::watch::Watch;

/// A handle to one daemon. Clones share one connection.
///
/// See the [crate documentation](crate) for deadlines and retries.
#[derive(Clone)]
pub struct Client {
    config: Arc<ClientConfig>,
    grpc: CacheClient<Channel>,
    paths: Arc<Paths>,
}

/// Which of some keys a daemon has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lookup {
    /// How many leading keys are present without a gap.
    pub prefix_chunks: usize,
    /// One entry per key, in order; `None` where the chunk is absent.
    pub found: Vec<Option<Found>>,
}

/// Where a chunk was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Found {
    /// The fastest tier that has it.
    pub tier: Tier,
    /// Bytes of the stored object, header included.
    pub bytes: u64,
}

/// Name of a pin.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PinId(u64);

impl fmt::Display for PinId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

/// Chunks that are kept from eviction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pin {
    /// What ends it early; see [`Client::unpin`].
    pub id: PinId,
    /// Keys that were present and are pinned now.
    pub pinned: u32,
}

impl Client {
    /// Most keys of one [`get`](Self::get).
    pub const MAX_GET_KEYS: usize = MAX_KEYS;

    /// Connects to the daemon at `endpoint` (`HOST:PORT`) with the default settings
    /// and checks that it answers.
    ///
    /// # Errors
    /// The endpoint is malformed, or no daemon answers there.
    pub async fn connect(endpoint: &str) -> Result<Self, ConnectError> {
        let config = ClientConfig {
            endpoint: endpoint.parse()?,
            ..ClientConfig::default()
        };
        Self::connect_with(config).await
    }

    /// Connects with other settings and checks that the daemon answers. Waits for its data
    /// plane, [`ClientConfig::connect_timeout`] at most.
    ///
    /// # Errors
    /// No daemon answers.
    pub async fn connect_with(config: ClientConfig) -> Result<Self, ConnectError> {
        let client = Self::connect_lazy(config);
        client.stats().await?;
        client.paths.settle(client.config.connect_timeout).await;
        Ok(client)
    }

    /// A handle that connects with its first call, and again whenever the
    /// connection is lost. Never fails and never waits, so that an engine can start
    /// before its cache.
    ///
    /// ```
    /// use kvasir_client::{CallError, Client, ClientConfig, RetryConfig};
    /// use kvasir_types::ChunkKey;
    ///
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let client = Client::connect_lazy(ClientConfig {
    ///     endpoint: "127.0.0.1:9".parse()?, // nobody listens here
    ///     retry: RetryConfig::NEVER,
    ///     ..ClientConfig::default()
    /// });
    /// let answer = client.lookup(&[ChunkKey::from_bytes([7; 32])]).await;
    /// assert!(matches!(answer, Err(CallError::Unavailable { .. })));
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Panics
    /// Outside of a Tokio runtime.
    pub fn connect_lazy(config: ClientConfig) -> Self {
        let channel = Channel::builder(config.endpoint.uri().clone())
            .connect_timeout(config.connect_timeout)
            .tcp_nodelay(true)
            .initial_stream_window_size(config.window_bytes)
            .initial_connection_window_size(config.window_bytes)
            .max_frame_size(MAX_FRAME_BYTES)
            .http2_keep_alive_interval(config.keep_alive)
            .keep_alive_timeout(config.keep_alive)
            .connect_lazy();
        let grpc = CacheClient::new(channel)
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES);
        let config = Arc::new(config);
        let paths = Arc::new(Paths::follow(Arc::clone(&config), grpc.clone()));
        Self {
            config,
            grpc,
            paths,
        }
    }

    /// How gets go at this moment: over which path of the data plane, and how that is. `None`
    /// is gRPC.
    pub fn data_path(&self) -> Option<PathStatus> {
        self.paths.status()
    }

    /// The settings of this handle.
    pub fn config(&self) -> &ClientConfig {
        &self.config
    }

    /// A handle on the same connection whose calls that move no payload end after
    /// `timeout`.
    #[must_use]
    pub fn with_call_timeout(&self, timeout: Duration) -> Self {
        let config = ClientConfig {
            call_timeout: timeout,
            ..ClientConfig::clone(&self.config)
        };
        Self {
            config: Arc::new(config),
            grpc: self.grpc.clone(),
            paths: Arc::clone(&self.paths),
        }
    }

    /// Which of these chunks are present, and where. Any number of keys.
    ///
    /// # Errors
    /// See [`CallError`]; an absent chunk is none.
    pub async fn lookup(&self, keys: &[ChunkKey]) -> Result<Lookup, CallError> {
        let deadline = Deadline::after(self.config.call_timeout);
        let mut found = Vec::with_capacity(keys.len());
        for part in keys.chunks(MAX_KEYS) {
            let wire = wire_keys(part);
            let response = self
                .call(deadline, Repeat::Always, |mut grpc| {
                    let request = v1::LookupRequest { keys: wire.clone() };
                    async move { grpc.lookup(request).await }
                })
                .await?;
            check_count(part.len(), response.tiers.len())?;
            check_count(part.len(), response.bytes.len())?;
            found.extend(response.tiers().zip(&response.bytes).map(|(tier, bytes)| {
                Some(Found {
                    tier: Tier::from_wire(tier)?,
                    bytes: *bytes,
                })
            }));
        }
        let prefix_chunks = found.iter().take_while(|entry| entry.is_some()).count();
        Ok(Lookup {
            prefix_chunks,
            found,
        })
    }

    /// Stores a chunk, durably if the daemon has a disk tier.
    ///
    /// # Errors
    /// As for [`put_with`](Self::put_with).
    pub async fn put(&self, chunk: &Chunk) -> Result<Put, CallError> {
        self.put_with(chunk, PutOptions::default()).await
    }

    /// Stores a chunk. Storing one twice is harmless. The chunk is visible to
    /// readers when this returns, and not before all of it is readable.
    ///
    /// # Errors
    /// See [`CallError`]; [`CallError::Invalid`] without any call if the layers do
    /// not fit the layout.
    pub async fn put_with(&self, chunk: &Chunk, options: PutOptions) -> Result<Put, CallError> {
        chunk.check()?;
        let deadline = Deadline::after(self.config.transfer_timeout);
        self.call(deadline, Repeat::Always, |mut grpc| {
            let messages = chunk.messages(options);
            async move { grpc.put(messages).await }
        })
        .await?
        .try_into()
    }

    /// Streams the leading chunks that are present, layer-major. Returns once the
    /// daemon holds them and says which they are; see [`LayerStream::chunks`]. Of no
    /// keys, the stream is empty.
    ///
    /// # Errors
    /// See [`CallError`]; an absent chunk is none. [`CallError::Invalid`] for more
    /// than 16384 keys: they are held together, so ask for fewer at once.
    pub async fn get(
        &self,
        keys: &[ChunkKey],
        options: GetOptions,
    ) -> Result<LayerStream, CallError> {
        let deadline = options.deadline.map_or_else(
            || Deadline::after(self.config.transfer_timeout),
            Deadline::at,
        );
        if keys.is_empty() {
            return Ok(LayerStream::empty(self.origin(), deadline));
        }
        check_keys(keys)?;
        let request = v1::GetRequest {
            keys: wire_keys(keys),
            layers: options.layers.map(|range| v1::LayerRange {
                start: range.start().into(),
                end: range.end().into(),
            }),
            lease_id: options.lease.map(|id| id.0),
            levels: options.levels.iter().map(|it| it.code().into()).collect(),
            have: options.have.map(|level| level.code().into()),
            heads: options
                .slice
                .and_then(|slice| slice.heads)
                .map(|heads| v1::HeadRange {
                    start: heads.start().into(),
                    end: heads.end().into(),
                }),
            tokens: options
                .slice
                .and_then(|slice| slice.tokens)
                .map(|tokens| v1::TokenRange {
                    start: tokens.start(),
                    end: tokens.end(),
                }),
        };
        let wanted = Wanted {
            layers: options.layers,
            levels: options.levels,
            have: options.have,
            slice: options.slice,
        };
        let fetch = FetchOptions {
            priority: u32::from(!options.ahead),
            deadline: Some(deadline.instant()),
        };
        let over_data_plane = self.get_over_data_plane(&request, &wanted, fetch, deadline);
        if let Some(stream) = over_data_plane.await? {
            return Ok(stream);
        }
        let stream = self
            .call(deadline, Repeat::Always, |mut grpc| {
                let request = request.clone();
                async move { grpc.get(request).await }
            })
            .await?;
        LayerStream::over_grpc(self.origin(), deadline, stream, keys.len(), wanted).await
    }

    /// `None` where it has to go over gRPC.
    async fn get_over_data_plane(
        &self,
        request: &v1::GetRequest,
        wanted: &Wanted,
        options: FetchOptions,
        deadline: Deadline,
    ) -> Result<Option<LayerStream>, CallError> {
        let mut attempts = Attempts::new(self.config.retry, Repeat::Always);
        while let Some((path, gone)) = self.paths.choose() {
            let fetch = path.fetch(request.encode_to_vec().into(), options);
            let origin = self.origin();
            let doubts = Doubts {
                grpc: self.grpc.clone(),
                keys: request.keys.clone(),
            };
            let stream =
                LayerStream::over_data_plane(origin, deadline, fetch, gone, doubts, wanted.clone());
            let error = match stream.await {
                Ok(stream) => return Ok(Some(stream)),
                // Too much for one request there.
                Err(CallError::Refused(status)) if status.code() == Code::OutOfRange => break,
                Err(error) => error,
            };
            match attempts.after(&error) {
                Some(wait) if deadline.allows(wait) => tokio::time::sleep(wait).await,
                _ => return Err(error),
            }
        }
        Ok(None)
    }

    /// Begins a session that holds chunks by name, for gets that must find the same
    /// chunks again: layer by layer, or page by page.
    ///
    /// # Errors
    /// See [`CallError`].
    pub async fn hold(&self) -> Result<Hold, CallError> {
        let deadline = Deadline::after(self.config.call_timeout);
        let (requests, responses) = self
            .call(deadline, Repeat::Always, |mut grpc| async move {
                // One request waits for its response before the next is sent.
                let (sender, receiver) = mpsc::channel(1);
                let response = grpc.hold(ReceiverStream::new(receiver)).await?;
                Ok(response.map(|responses| (sender, responses)))
            })
            .await?;
        let timeout = self.config.transfer_timeout;
        Ok(Hold::new(self.origin(), timeout, requests, responses))
    }

    /// Keeps chunks from being evicted for `ttl`, at most 24 hours. Absent keys are
    /// left out.
    ///
    /// # Errors
    /// See [`CallError`]. After [`CallError::Unavailable`] or
    /// [`CallError::DeadlineExceeded`] the chunks may be pinned until `ttl` ends.
    pub async fn pin(&self, keys: &[ChunkKey], ttl: Duration) -> Result<Pin, CallError> {
        check_keys(keys)?;
        let deadline = Deadline::after(self.config.call_timeout);
        let request = v1::PinRequest {
            keys: wire_keys(keys),
            ttl_ms: u64::try_from(ttl.as_millis()).unwrap_or(u64::MAX),
        };
        let response = self
            .call(deadline, Repeat::IfRefused, |mut grpc| {
                let request = request.clone();
                async move { grpc.pin(request).await }
            })
            .await?;
        Ok(Pin {
            id: PinId(response.pin_id),
            pinned: response.pinned,
        })
    }

    /// Ends a pin; whether it was still there.
    ///
    /// # Errors
    /// See [`CallError`].
    pub async fn unpin(&self, id: PinId) -> Result<bool, CallError> {
        let deadline = Deadline::after(self.config.call_timeout);
        let response = self
            .call(deadline, Repeat::Always, |mut grpc| async move {
                grpc.unpin(v1::UnpinRequest { pin_id: id.0 }).await
            })
            .await?;
        Ok(response.found)
    }

    /// Deletes chunks from every tier; how many were there.
    ///
    /// # Errors
    /// See [`CallError`]. At most 16384 keys.
    pub async fn delete(&self, keys: &[ChunkKey]) -> Result<u32, CallError> {
        check_keys(keys)?;
        let deadline = Deadline::after(self.config.call_timeout);
        let wire = wire_keys(keys);
        let response = self
            .call(deadline, Repeat::Always, |mut grpc| {
                let request = v1::DeleteRequest { keys: wire.clone() };
                async move { grpc.delete(request).await }
            })
            .await?;
        Ok(response.deleted)
    }

    /// Lists the chunks of the daemon in the order of their keys.
    ///
    /// # Errors
    /// See [`CallError`].
    pub async fn list(&self, options: ListOptions) -> Result<Listing, CallError> {
        let deadline = Deadline::after(self.config.transfer_timeout);
        let request = v1::ListRequest {
            after: options
                .after
                .as_ref()
                .map(convert::key_to_wire)
                .unwrap_or_default(),
            limit: options.limit,
        };
        let stream = self
            .call(deadline, Repeat::Always, |mut grpc| {
                let request = request.clone();
                async move { grpc.list(request).await }
            })
            .await?;
        Ok(Listing {
            origin: self.origin(),
            deadline,
            stream,
        })
    }

    /// State and counters of the daemon.
    ///
    /// # Errors
    /// See [`CallError`].
    pub async fn stats(&self) -> Result<Stats, CallError> {
        let deadline = Deadline::after(self.config.call_timeout);
        let response = self
            .call(deadline, Repeat::Always, |mut grpc| async move {
                grpc.stats(v1::StatsRequest {}).await
            })
            .await?;
        Ok(Stats::from(response))
    }

    /// Follows the daemon's chunks, beginning with a snapshot.
    ///
    /// # Errors
    /// See [`CallError`].
    pub async fn watch(&self) -> Result<Watch, CallError> {
        let stream = self.open_watch().await?;
        Ok(Watch::follow(self.clone(), stream))
    }

    pub(crate) async fn open_watch(&self) -> Result<Streaming<v1::WatchResponse>, CallError> {
        let deadline = Deadline::after(self.config.call_timeout);
        self.call(deadline, Repeat::Always, |mut grpc| async move {
            grpc.watch(v1::WatchRequest {}).await
        })
        .await
    }

    pub(crate) fn origin(&self) -> Origin {
        Origin(self.config.endpoint.clone())
    }

    /// Runs `attempt` until it succeeds, is not worth repeating, or the deadline
    /// leaves no room for another.
    pub(crate) async fn call<T, Fut>(
        &self,
        deadline: Deadline,
        repeat: Repeat,
        mut attempt: impl FnMut(CacheClient<Channel>) -> Fut,
    ) -> Result<T, CallError>
    where
        Fut: Future<Output = Result<tonic::Response<T>, Status>>,
    {
        let origin = self.origin();
        let mut attempts = Attempts::new(self.config.retry, repeat);
        loop {
            let error = match deadline.bound(&origin, attempt(self.grpc.clone())).await {
                Ok(response) => return Ok(response.into_inner()),
                Err(error) => error,
            };
            match attempts.after(&error) {
                Some(wait) if deadline.allows(wait) => tokio::time::sleep(wait).await,
                _ => return Err(error),
            }
        }
    }
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client")
            .field("config", &self.config)
            .finish_non_exhaustive()
    }
}

pub(crate) fn wire_keys(keys: &[ChunkKey]) -> Vec<bytes::Bytes> {
    keys.iter().map(convert::key_to_wire).collect()
}

pub(crate) fn check_keys(keys: &[ChunkKey]) -> Result<(), CallError> {
    let problem = match keys.len() {
        0 => "at least one key is needed".to_owned(),
        count if count > MAX_KEYS => {
            format!("{count} keys exceed the limit of {MAX_KEYS}; ask in several calls")
        }
        _ => return Ok(()),
    };
    Err(invalid(InvalidField::new("keys", problem)))
}
