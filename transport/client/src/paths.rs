//! Which way gets go: over the data plane, where the daemon offers one that can be reached,
//! and over gRPC else.
//!
//! A task follows what the daemon says of its data plane, in a call that lasts as long as the
//! daemon serves: its end says at once that the daemon is gone, where a datagram's peer would
//! have to be waited for.

use std::sync::Arc;
use std::time::Duration;

use kvasir_proto::v1;
use kvasir_proto::v1::cache_client::CacheClient;
use kvasir_transport::quic::{QuicConfig, Trust};
use kvasir_transport::session::Config;
use kvasir_transport::shm::{self, ShmConfig};
use kvasir_transport::{DataPath, Status};
use tokio::net::lookup_host;
use tokio::sync::{Notify, watch};
use tokio::task::JoinSet;
use tonic::Code;
use tonic::transport::Channel;

use crate::one_sided::{self, Readers};
use crate::{ClientConfig, DataPlane};

/// What is known of the daemon's data plane.
#[derive(Debug)]
pub(crate) struct Paths {
    chosen: watch::Receiver<Chosen>,
    /// Somebody would like to know more.
    asked: Arc<Notify>,
    _task: JoinSet<()>,
}

#[derive(Clone, Debug)]
enum Chosen {
    /// The daemon has not said.
    Unknown,
    /// There is none.
    Grpc,
    Path(DataPath, Gone),
}

/// Whether the daemon behind a path is gone.
#[derive(Clone, Debug)]
pub(crate) struct Gone(watch::Receiver<()>);

impl Gone {
    pub(crate) async fn wait(&mut self) {
        // Nothing is ever sent; it ends with its sender.
        while self.0.changed().await.is_ok() {}
    }
}

impl Paths {
    /// Follows what the daemon says.
    pub(crate) fn follow(config: Arc<ClientConfig>, grpc: CacheClient<Channel>) -> Self {
        let (state, chosen) = watch::channel(Chosen::Unknown);
        let asked = Arc::new(Notify::new());
        let mut task = JoinSet::new();
        task.spawn(follow(config, grpc, state, Arc::clone(&asked)));
        Self {
            chosen,
            asked,
            _task: task,
        }
    }

    /// The way that a get goes now; `None` is gRPC.
    pub(crate) fn choose(&self) -> Option<(DataPath, Gone)> {
        let chosen = self.chosen.borrow();
        match &*chosen {
            Chosen::Path(path, gone) => {
                let status = path.status();
                let there = status.connected && !status.draining;
                there.then(|| (path.clone(), gone.clone()))
            }
            Chosen::Unknown => {
                self.asked.notify_one();
                None
            }
            Chosen::Grpc => None,
        }
    }

    /// How the chosen path is; `None` is gRPC.
    pub(crate) fn status(&self) -> Option<Status> {
        match &*self.chosen.borrow() {
            Chosen::Path(path, _) => Some(path.status()),
            Chosen::Unknown | Chosen::Grpc => None,
        }
    }

    /// Waits until there is a choice, and what was chosen is connected, for `longest`.
    pub(crate) async fn settle(&self, longest: Duration) {
        let settled = async {
            let mut chosen = self.chosen.clone();
            let known = chosen.wait_for(|it| !matches!(it, Chosen::Unknown)).await;
            let path = match known.as_deref() {
                Ok(Chosen::Path(path, _)) => path.clone(),
                _ => return,
            };
            drop(known);
            path.connected().await;
        };
        // Late is as good as never: gets go over gRPC until then.
        let _ = tokio::time::timeout(longest, settled).await;
    }
}

async fn follow(
    config: Arc<ClientConfig>,
    mut grpc: CacheClient<Channel>,
    state: watch::Sender<Chosen>,
    asked: Arc<Notify>,
) {
    let readers = Readers::new(config.rdma_device.clone());
    loop {
        match grpc.paths(v1::PathsRequest {}).await {
            Ok(response) => {
                let mut responses = response.into_inner();
                // In-flight gets see the daemon go when this is dropped.
                let (_here, gone) = watch::channel(());
                while let Ok(Some(paths)) = responses.message().await {
                    state.send_replace(match reach(&config, &readers, &paths).await {
                        Some(path) => Chosen::Path(path, Gone(gone.clone())),
                        None => Chosen::Grpc,
                    });
                }
                state.send_replace(Chosen::Unknown);
            }
            // A daemon without a data plane.
            Err(status) if status.code() == Code::Unimplemented => {
                state.send_replace(Chosen::Grpc);
            }
            Err(_) => {}
        }
        tokio::time::sleep(PAUSE).await;
        // Nobody is kept busy by a daemon that nobody uses.
        let _ = tokio::time::timeout(LONG_PAUSE, asked.notified()).await;
    }
}

/// The best path that the daemon offers, the configuration allows, and that can be reached.
async fn reach(
    config: &ClientConfig,
    readers: &Readers,
    paths: &v1::PathsResponse,
) -> Option<DataPath> {
    if config.data_plane == DataPlane::Best
        && let Some(offered) = &paths.shared_memory
        && let Some(path) = reach_memory(offered).await
    {
        return Some(path);
    }
    match (config.data_plane, &paths.quic) {
        (DataPlane::Best | DataPlane::Rdma | DataPlane::Quic, Some(offered)) => {
            reach_over_quic(config, readers, offered).await
        }
        _ => None,
    }
}

/// On another host, or as another user, there is no such socket.
async fn reach_memory(offered: &v1::SharedMemoryPath) -> Option<DataPath> {
    let token = shm::Token::try_from(&offered.token[..]).ok()?;
    let path = shm::connect(&offered.socket, token, ShmConfig::default());
    let connected = tokio::time::timeout(SAME_HOST, path.connected()).await;
    connected.is_ok().then_some(path)
}

/// By one-sided reads, if that can be.
async fn reach_over_quic(
    config: &ClientConfig,
    readers: &Readers,
    offered: &v1::QuicPath,
) -> Option<DataPath> {
    let uri = config.endpoint.uri();
    let host = uri.host()?.trim_start_matches('[').trim_end_matches(']');
    let port = u16::try_from(offered.port).ok()?;
    let address = lookup_host((host, port)).await.ok()?.next()?;
    let tls = &config.tls;
    let trust = match &tls.trust {
        Some(trust) => Ok(trust.clone()),
        None => Trust::from_der(&offered.certificate),
    };
    let name = match (&tls.server_name, offered.name.as_str()) {
        (Some(name), _) => name,
        (None, "") => host,
        (None, name) => name,
    };
    let quic = QuicConfig {
        session: Config {
            credit: config.window_bytes.into(),
            ..Config::default()
        },
        ..QuicConfig::default()
    };
    let identity = tls.identity.as_deref();
    let one_sided = offered.rdma && config.data_plane != DataPlane::Quic;
    let reader = if one_sided {
        readers.reader().await
    } else {
        None
    };
    let path = trust
        .map_err(Into::into)
        .and_then(|trust| one_sided::connect(reader, address, name, &trust, identity, quic));
    path.inspect_err(|error| {
        let error = error as &dyn std::error::Error;
        tracing::warn!(
            error,
            "the daemon's data plane cannot be used; gets go over gRPC"
        );
    })
    .ok()
}

/// How long it may take to connect on one host.
const SAME_HOST: Duration = Duration::from_millis(200);
/// After a daemon was lost.
const PAUSE: Duration = Duration::from_millis(100);
/// Until it is looked for again, where nobody asks.
const LONG_PAUSE: Duration = Duration::from_secs(10);
