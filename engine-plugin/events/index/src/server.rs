//! Starting and stopping.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use kvasir_events::Limits;
use kvasir_events::hash::none_hash;
use kvasir_proto::v1::FILE_DESCRIPTOR_SET;
use kvasir_proto::v1::prefix_index_server::PrefixIndexServer;
use tokio::net::TcpListener;
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tonic::transport::server::TcpIncoming;
use tonic_health::server::HealthReporter;

use crate::config::{ConfigError, DaemonConfig, EngineConfig};
use crate::metrics;
use crate::service::Service;
use crate::state::State;
use crate::{subscribe, watch};

/// Everything [`Server::start`] needs.
#[derive(Clone, Debug)]
pub struct ServerConfig {
    /// Where to listen; port 0 takes a free one.
    pub listen: SocketAddr,
    /// Where Prometheus finds metrics, over HTTP. `None`: nowhere.
    pub metrics: Option<SocketAddr>,
    /// Engines.
    pub engines: Vec<EngineConfig>,
    /// Daemons.
    pub daemons: Vec<DaemonConfig>,
    /// What engines derive their first parent hash from: the value of `PYTHONHASHSEED` in their
    /// environment, or [`kvasir_events::hash::DEFAULT_SEED`].
    pub hash_seed: String,
    /// What bounds the index, for each publisher.
    pub limits: Limits,
}

/// Starts servers.
#[derive(Debug)]
pub struct Server;

/// A server that listens. Dropping it stops it at once.
#[derive(Debug)]
pub struct Running {
    addr: SocketAddr,
    metrics: Option<SocketAddr>,
    health: HealthReporter,
    serving: JoinHandle<()>,
    stop: CancellationToken,
    /// Those who follow. They hold nothing that outlives them.
    _followers: JoinSet<()>,
}

/// Why a server does not run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// An address cannot be listened on.
    #[error("cannot listen on {addr}; if another process does, stop it or choose another address")]
    Listen {
        /// The address.
        addr: SocketAddr,
        /// What happened.
        #[source]
        source: io::Error,
    },
    /// The ranks of an engine reach beyond the last port.
    #[error(transparent)]
    Engine(#[from] ConfigError),
    /// The protocol's descriptors cannot be served.
    #[error("cannot serve the protocol's descriptors")]
    Reflection(#[from] tonic_reflection::server::Error),
}

impl Server {
    /// Listens, follows, and answers until [`Running::shutdown`].
    ///
    /// # Errors
    /// See [`StartError`]. Publishers that cannot be reached are no error: they are tried again.
    pub async fn start(config: ServerConfig) -> Result<Running, StartError> {
        let mut engines = Vec::new();
        for engine in &config.engines {
            engines.extend(engine.each_rank()?);
        }
        let (listener, addr) = listen(config.listen).await?;
        let state = State::new(
            &engines,
            &config.daemons,
            none_hash(&config.hash_seed),
            config.limits,
        );
        let state = Arc::new(state);
        let stop = CancellationToken::new();
        let metrics = match config.metrics {
            None => None,
            Some(addr) => {
                let (listener, addr) = listen(addr).await?;
                let ended = stop.clone().cancelled_owned();
                tokio::spawn(metrics::serve(listener, Arc::clone(&state), ended));
                Some(addr)
            }
        };
        let (health, health_service) = tonic_health::server::health_reporter();
        health.set_serving::<PrefixIndexServer<Service>>().await;
        let reflection = tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(FILE_DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
            .build_v1()?;
        let index = PrefixIndexServer::new(Service::new(Arc::clone(&state)))
            .max_decoding_message_size(MAX_MESSAGE_BYTES);
        let router = tonic::transport::Server::builder()
            .max_concurrent_streams(CALLS)
            .http2_keepalive_interval(Some(KEEP_ALIVE))
            .http2_keepalive_timeout(Some(KEEP_ALIVE))
            .add_service(index)
            .add_service(health_service)
            .add_service(reflection);
        let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
        let serve = router.serve_with_incoming_shutdown(incoming, stop.clone().cancelled_owned());
        let serving = tokio::spawn(async move {
            if let Err(error) = serve.await {
                tracing::error!(%error, "the server stopped serving");
            }
        });
        let mut followers = JoinSet::new();
        let first_daemon = engines.len();
        for (at, engine) in engines.into_iter().enumerate() {
            followers.spawn(subscribe::follow(Arc::clone(&state), at, engine));
        }
        for (at, daemon) in config.daemons.into_iter().enumerate() {
            followers.spawn(watch::follow(Arc::clone(&state), first_daemon + at, daemon));
        }
        Ok(Running {
            addr,
            metrics,
            health,
            serving,
            stop,
            _followers: followers,
        })
    }
}

async fn listen(addr: SocketAddr) -> Result<(TcpListener, SocketAddr), StartError> {
    let failed = |source| StartError::Listen { addr, source };
    let listener = TcpListener::bind(addr).await.map_err(failed)?;
    let addr = listener.local_addr().map_err(failed)?;
    Ok((listener, addr))
}

impl Running {
    /// Where it listens.
    pub const fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// Where Prometheus finds metrics.
    pub const fn metrics(&self) -> Option<SocketAddr> {
        self.metrics
    }

    /// Waits until the server no longer listens, whatever the reason.
    pub async fn ended(&mut self) {
        // It ends by itself, and is not awaited again once it has.
        if !self.serving.is_finished() {
            let _ = (&mut self.serving).await;
        }
    }

    /// Stops: reports `NOT_SERVING`, takes no more calls, and answers those under way.
    pub async fn shutdown(mut self) {
        self.health
            .set_not_serving::<PrefixIndexServer<Service>>()
            .await;
        self.stop.cancel();
        // A peer may never close its connection.
        let _ = timeout(LINGER, self.ended()).await;
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.stop.cancel();
        self.serving.abort();
    }
}

/// A million token ids.
const MAX_MESSAGE_BYTES: usize = 8 << 20;
/// Calls in progress on one connection; more wait at the peer.
const CALLS: u32 = 256;
/// How often a silent peer is asked whether it is there, and how long it may take to answer.
const KEEP_ALIVE: Duration = Duration::from_secs(20);
/// How long peers may take to receive what was sent and to close their connections.
const LINGER: Duration = Duration::from_secs(2);
