//! Starting and stopping.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use futures::future::OptionFuture;
use kvasir_proto::v1::cache_server::CacheServer;
use kvasir_proto::v1::{self, FILE_DESCRIPTOR_SET};
use kvasir_proto::{MAX_FRAME_BYTES, MAX_MESSAGE_BYTES};
use kvasir_store::{Environment, OpenError, Store};
use kvasir_transport::quic::Listener;
use kvasir_transport::shm::{self, ListenError};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_util::sync::{CancellationToken, DropGuard};
use tonic::transport::server::Router;
use tonic_health::server::HealthReporter;

use crate::config::{Limits, ServerConfig};
use crate::connections;
use crate::quic::{self, QuicError};
use crate::rdma::{self, RdmaError};
use crate::service::Service;
use crate::shared_memory;

/// Starts daemons.
#[derive(Debug)]
pub struct Server;

/// A server that listens. Dropping it stops it without waiting for transfers;
/// [`shutdown`](Self::shutdown) waits.
#[derive(Debug)]
pub struct Running {
    addr: SocketAddr,
    service: Service,
    health: HealthReporter,
    serving: JoinHandle<()>,
    ended: CancellationToken,
    quic: Option<Listener>,
    memory: Option<shm::Listener>,
    _abort: DropGuard,
}

/// Why a server does not run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// The address cannot be listened on.
    #[error(
        "cannot listen on {addr}; if another process does, stop it or choose another address with --listen"
    )]
    Listen {
        /// The address.
        addr: SocketAddr,
        /// What happened.
        #[source]
        source: io::Error,
    },
    /// The store cannot be opened.
    #[error(transparent)]
    Store(#[from] OpenError),
    /// The data plane cannot be offered.
    #[error(transparent)]
    Quic(#[from] QuicError),
    /// The device that is asked for cannot be used.
    #[error(transparent)]
    Rdma(#[from] RdmaError),
    /// Memory cannot be shared as it was asked for.
    #[error(transparent)]
    SharedMemory(#[from] ListenError),
    /// The protocol's descriptors cannot be served.
    #[error("cannot serve the protocol's descriptors")]
    Reflection(#[from] tonic_reflection::server::Error),
}

impl Server {
    /// Opens the store, listens, and serves until [`Running::shutdown`].
    ///
    /// # Errors
    /// See [`StartError`].
    pub async fn start(config: ServerConfig) -> Result<Running, StartError> {
        Self::start_in(Environment::default(), config).await
    }

    /// As [`start`](Self::start), with a store that takes time and files from
    /// `environment`.
    ///
    /// # Errors
    /// See [`StartError`].
    pub async fn start_in(
        environment: Environment,
        config: ServerConfig,
    ) -> Result<Running, StartError> {
        let listen_error = |source| StartError::Listen {
            addr: config.listen,
            source,
        };
        // A port in use is found out before a store is recovered.
        let listener = TcpListener::bind(config.listen)
            .await
            .map_err(listen_error)?;
        let addr = listener.local_addr().map_err(listen_error)?;
        let data_dir = config
            .store
            .disk
            .as_ref()
            .map(|disk| disk.path.display().to_string())
            .unwrap_or_default();
        let device = if config.quic.enabled {
            rdma::find(&config.rdma).await?
        } else {
            None
        };
        let mut store = config.store;
        store.memory.shared = config.shared_memory.enabled || device.is_some();
        let store = Store::open_in(environment, store).await?;
        let service = Service::new(store, config.limits.clone(), data_dir);
        let shared = service.shared();
        let mut paths = v1::PathsResponse::default();
        let quic = if config.quic.enabled {
            let any_port = config.listen.port() == 0;
            let (listener, path) =
                quic::start(&config.quic, addr, any_port, device.as_ref(), shared)?;
            paths.quic = Some(path);
            Some(listener)
        } else {
            None
        };
        let memory = match shared_memory::start(&config.shared_memory, addr, shared) {
            Ok(None) => None,
            Ok(Some((listener, path))) => {
                paths.shared_memory = Some(path);
                Some(listener)
            }
            // What was not asked for need not work.
            Err(error) if config.shared_memory.socket.is_none() => {
                let error = &error as &dyn std::error::Error;
                tracing::warn!(error, "memory is not shared with other processes");
                None
            }
            Err(error) => return Err(error.into()),
        };
        // Nobody can ask before.
        let _ = shared.paths.set(paths);

        let (health, router) = router(&config.limits, service.clone()).await?;
        let incoming =
            connections::accept(listener, config.limits.connections, connections::GREETING);
        let draining = service.shared().admission.draining.clone();
        let ended = CancellationToken::new();
        let serving = tokio::spawn({
            let ended = ended.clone().drop_guard();
            let serve = router.serve_with_incoming_shutdown(incoming, draining.cancelled_owned());
            async move {
                let _ended = ended;
                if let Err(error) = serve.await {
                    tracing::error!(%error, "the server stopped serving");
                }
            }
        });
        let admission = &service.shared().admission;
        let stop = CancellationToken::new();
        tokio::spawn({
            let (stop, draining, aborting) = (
                stop.clone(),
                admission.draining.clone(),
                admission.aborting.clone(),
            );
            async move {
                stop.cancelled().await;
                draining.cancel();
                aborting.cancel();
            }
        });
        Ok(Running {
            addr,
            service,
            health,
            serving,
            ended,
            quic,
            memory,
            _abort: stop.drop_guard(),
        })
    }
}

impl Running {
    /// Where it listens.
    pub const fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// The address as a client takes it.
    pub fn endpoint(&self) -> String {
        self.addr.to_string()
    }

    /// The store behind it.
    pub fn store(&self) -> &Store {
        &self.service.shared().store
    }

    /// Waits until the server no longer listens, whatever the reason.
    pub async fn ended(&self) {
        self.ended.cancelled().await;
    }

    /// Stops: see the [crate documentation](crate#shutdown). Returns when nothing is
    /// left to do, [`Limits::drain_ms`] and some seconds later at the latest.
    pub async fn shutdown(self) {
        let shared = self.service.shared().clone();
        self.health.set_not_serving::<CacheServer<Service>>().await;
        shared.admission.draining.cancel();
        let within = shared.limits.drain();
        // Its requests are transfers, too.
        let quic = self.quic.map(|listener| listener.drain(within));
        let memory = self.memory.map(|listener| listener.drain(within));
        let data = tokio::spawn(async {
            let quic = OptionFuture::from(quic);
            futures::join!(quic, OptionFuture::from(memory))
        });
        tokio::select! {
            // Every peer has closed its connection.
            () = self.ended.cancelled() => (),
            finished = timeout(shared.limits.drain(), shared.admission.idle()) => {
                if finished.is_err() {
                    tracing::warn!("transfers did not finish in time and are ended");
                    shared.admission.aborting.cancel();
                }
                // What was sent last is on its way; a peer that is stuck may never
                // close its connection.
                if timeout(LINGER, self.ended.cancelled()).await.is_err() {
                    self.serving.abort();
                }
            }
        }
        // It ends by itself, and cannot fail.
        let _ = data.await;
        match timeout(CLOSE, shared.store.close()).await {
            Ok(Ok(())) => (),
            Ok(Err(error)) => tracing::error!(
                %error,
                "the store did not close cleanly; acknowledged chunks are safe"
            ),
            Err(_) => tracing::error!(
                "the device does not answer; the store is left open, and acknowledged chunks are safe"
            ),
        }
    }
}

async fn router(
    limits: &Limits,
    service: Service,
) -> Result<(HealthReporter, Router), tonic_reflection::server::Error> {
    let (health, health_service) = tonic_health::server::health_reporter();
    health.set_serving::<CacheServer<Service>>().await;
    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(FILE_DESCRIPTOR_SET)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .build_v1()?;
    let cache = CacheServer::new(service)
        .max_decoding_message_size(MAX_MESSAGE_BYTES)
        .max_encoding_message_size(MAX_MESSAGE_BYTES);
    let router = tonic::transport::Server::builder()
        .initial_stream_window_size(limits.window_bytes())
        .initial_connection_window_size(limits.window_bytes())
        .max_frame_size(MAX_FRAME_BYTES)
        .max_concurrent_streams(CALLS)
        .http2_keepalive_interval(Some(KEEP_ALIVE))
        .http2_keepalive_timeout(Some(KEEP_ALIVE))
        .add_service(cache)
        .add_service(health_service)
        .add_service(reflection);
    Ok((health, router))
}

/// Calls in progress on one connection; more wait at the peer.
const CALLS: u32 = 256;
/// How often a silent peer is asked whether it is there, and how long it may take
/// to answer.
const KEEP_ALIVE: Duration = Duration::from_secs(20);
/// How long peers may take to receive what was sent and to close their connections.
const LINGER: Duration = Duration::from_secs(2);
/// How long the device may take to finish what it has begun.
const CLOSE: Duration = Duration::from_secs(10);
