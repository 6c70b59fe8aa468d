//! The end that is connected to.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use quinn::VarInt;
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::{CLOSED, receive, send};
use super::{ConnectError, Ended, Identity, QuicConfig, Trust, VIOLATED};
use crate::holding::{Shared, expire};
use crate::session::{Frame, RequestId};
use crate::source::Source;

/// Listens, and serves whoever connects. Dropping it closes all connections.
#[derive(Debug)]
pub struct Listener {
    endpoint: quinn::Endpoint,
    address: SocketAddr,
    draining: watch::Sender<bool>,
    tasks: JoinSet<()>,
}

impl Listener {
    /// Serves what `source` has at `address`, port 0 for a free one. With `clients`, fetchers
    /// must have a certificate that these vouch for.
    ///
    /// # Errors
    /// [`ConnectError`]
    pub fn new<S: Source>(
        address: SocketAddr,
        identity: &Identity,
        clients: Option<&Trust>,
        source: Arc<S>,
        config: QuicConfig,
    ) -> Result<Self, ConnectError> {
        let server = quinn::ServerConfig::with_crypto(Arc::new(identity.serving(clients)?));
        let endpoint = config.endpoint(address, Some(server.clone()))?;
        let bound = endpoint.local_addr();
        let address = bound.map_err(|error| ConnectError::Socket(address, error))?;
        let (draining, drains) = watch::channel(false);
        let mut tasks = JoinSet::new();
        tasks.spawn(accept(endpoint.clone(), server, source, config, drains));
        Ok(Self {
            endpoint,
            address,
            draining,
            tasks,
        })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Takes no further requests, and waits for those under way, until `within` has passed.
    /// Then all connections are closed.
    pub async fn drain(mut self, within: Duration) {
        self.draining.send_replace(true);
        let _ = tokio::time::timeout(within, async {
            // It ends when all of its connections have.
            while self.tasks.join_next().await.is_some() {}
        })
        .await;
        self.endpoint.close(CLOSED, b"");
        let _ = tokio::time::timeout(CLOSING, self.endpoint.wait_idle()).await;
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.endpoint.close(CLOSED, b"");
    }
}

async fn accept<S: Source>(
    endpoint: quinn::Endpoint,
    server: quinn::ServerConfig,
    source: Arc<S>,
    config: QuicConfig,
    mut drains: watch::Receiver<bool>,
) {
    let mut connections = JoinSet::new();
    loop {
        let draining = *drains.borrow();
        if draining && connections.is_empty() {
            return;
        }
        tokio::select! {
            incoming = endpoint.accept() => {
                let Some(incoming) = incoming else { return };
                let (source, drains) = (Arc::clone(&source), drains.clone());
                let peer = incoming.remote_address();
                let mut server = server.clone();
                server.transport_config(config.transport(peer.ip()));
                connections.spawn(async move {
                    let connecting = incoming.accept_with(Arc::new(server));
                    if let Err(error) = serve(connecting, source, config, drains).await {
                        let error = &error as &dyn std::error::Error;
                        tracing::debug!(%peer, error, "a fetcher's connection ended");
                    }
                });
            }
            Some(_) = connections.join_next(), if !connections.is_empty() => {}
            changed = drains.changed(), if !draining => {
                if changed.is_err() {
                    return;
                }
            }
        }
    }
}

async fn serve<S: Source>(
    connecting: Result<quinn::Connecting, quinn::ConnectionError>,
    source: Arc<S>,
    config: QuicConfig,
    mut drains: watch::Receiver<bool>,
) -> Result<(), Ended> {
    let connection = connecting?.await?;
    let (control, asks) = connection.accept_bi().await?;
    let shared = Shared::new(config.session, source);
    let draining = async {
        // Without a listener the connection is closed anyway.
        let _ = drains.wait_for(|&draining| draining).await;
        shared.drain();
        std::future::pending::<()>().await;
    };
    let ended = tokio::select! {
        ended = sending(&connection, control, &shared) => ended,
        ended = receive(asks, |frames| shared.take(frames.drain(..))) => ended.and(Err(Ended::Control)),
        never = shared.read() => match never {},
        never = expire(&shared) => match never {},
        () = draining => Ok(()),
    };
    let code = match &ended {
        Err(Ended::Violation(_)) => VIOLATED,
        _ => CLOSED,
    };
    connection.close(code, b"");
    ended
}

/// Sends what there is, until nothing is left of a holder that drains.
async fn sending<S: Source>(
    connection: &quinn::Connection,
    mut control: quinn::SendStream,
    shared: &Shared<S>,
) -> Result<(), Ended> {
    let mut streams = Streams::new();
    loop {
        while let Some(frame) = shared.next_frame() {
            // Or they would take a share of the link.
            reset_ended(&mut streams, shared);
            let request = match &frame {
                Frame::Describe { request, .. }
                | Frame::Data { request, .. }
                | Frame::Lost { request, .. } => *request,
                _ => {
                    send(&mut control, &frame).await?;
                    continue;
                }
            };
            let (stream, sent) = match streams.entry(request) {
                std::collections::hash_map::Entry::Occupied(entry) => entry.into_mut(),
                std::collections::hash_map::Entry::Vacant(entry) => {
                    entry.insert((connection.open_uni().await?, 0))
                }
            };
            *sent += frame.data_bytes();
            let priority = shared.priority(request).unwrap_or(0);
            // A stream that is gone has no priority.
            let _ = stream.set_priority(i32::try_from(priority).unwrap_or(i32::MAX));
            send(stream, &frame).await?;
        }
        reset_ended(&mut streams, shared);
        if shared.is_drained() {
            // The last frames are on their way; the fetcher closes.
            let _ = tokio::time::timeout(CLOSING, connection.closed()).await;
            return Ok(());
        }
        shared.work.notified().await;
    }
}

/// Of requests, each with the bytes of data that went into it.
type Streams = HashMap<RequestId, (quinn::SendStream, u64)>;

/// Of what was sent for requests that have ended, forgets what is not acknowledged. The fetcher
/// learns how much credit it took.
fn reset_ended<S: Source>(streams: &mut Streams, shared: &Shared<S>) {
    streams.retain(|request, (stream, sent)| {
        let serves = shared.serves(*request);
        if !serves {
            let _ = stream.reset(VarInt::from_u64(*sent).unwrap_or(VarInt::MAX));
        }
        serves
    });
}

/// What a peer gets to hear the last words.
const CLOSING: Duration = Duration::from_millis(200);
