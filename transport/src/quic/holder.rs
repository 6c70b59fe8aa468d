//! The end that is connected to.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt as _;
use futures::stream::{FuturesUnordered, StreamExt as _};
use quinn::VarInt;
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::{CLOSED, ConnectError, Ended, Identity, QuicConfig, Trust};
use super::{agreed_on_one_sided, receive, receive_endpoint, send, send_endpoint};
use crate::holding::{Shared, expire};
use crate::rdma::{Lender, Lending};
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
        Self::with(None, address, identity, clients, source, config)
    }

    /// As [`new`](Self::new); what `lender` can is lent to fetchers that read it.
    pub(crate) fn with<S: Source>(
        lender: Option<Lender>,
        address: SocketAddr,
        identity: &Identity,
        clients: Option<&Trust>,
        source: Arc<S>,
        config: QuicConfig,
    ) -> Result<Self, ConnectError> {
        let crypto = identity.serving_over(clients, lender.is_some())?;
        let server = quinn::ServerConfig::with_crypto(Arc::new(crypto));
        let endpoint = config.endpoint(address, Some(server.clone()))?;
        let bound = endpoint.local_addr();
        let address = bound.map_err(|error| ConnectError::Socket(address, error))?;
        let (draining, drains) = watch::channel(false);
        let mut tasks = JoinSet::new();
        let common = Common {
            server,
            source,
            config,
            lender,
        };
        tasks.spawn(accept(endpoint.clone(), Arc::new(common), drains));
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

/// What every connection has at hand.
#[derive(Debug)]
struct Common<S> {
    server: quinn::ServerConfig,
    source: Arc<S>,
    config: QuicConfig,
    lender: Option<Lender>,
}

async fn accept<S: Source>(
    endpoint: quinn::Endpoint,
    common: Arc<Common<S>>,
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
                let (common, drains) = (Arc::clone(&common), drains.clone());
                let peer = incoming.remote_address();
                let mut server = common.server.clone();
                server.transport_config(common.config.transport(peer.ip()));
                connections.spawn(async move {
                    let connecting = incoming.accept_with(Arc::new(server));
                    if let Err(error) = serve(connecting, &common, drains).await {
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
    common: &Common<S>,
    drains: watch::Receiver<bool>,
) -> Result<(), Ended> {
    let connection = connecting?.await?;
    let ended = converse(&connection, common, drains).await;
    let code = ended.as_ref().err().map_or(CLOSED, Ended::code);
    connection.close(code, b"");
    ended
}

async fn converse<S: Source>(
    connection: &quinn::Connection,
    common: &Common<S>,
    mut drains: watch::Receiver<bool>,
) -> Result<(), Ended> {
    let (mut control, mut asks) = connection.accept_bi().await?;
    let lending = match &common.lender {
        Some(lender) if agreed_on_one_sided(connection) => {
            exchange(lender, &mut control, &mut asks).await?
        }
        _ => None,
    };
    let lending = lending.as_ref();
    let shared = Shared::new(common.config.session, Arc::clone(&common.source));
    let draining = async {
        // Without a listener the connection is closed anyway.
        let _ = drains.wait_for(|&draining| draining).await;
        shared.drain();
        std::future::pending::<()>().await;
    };
    let take = |frames: &mut Vec<Frame>| {
        if let Some(lending) = lending {
            let returned = frames.extract_if(.., |frame| matches!(frame, Frame::Return { .. }));
            lending.take_back(returned)?;
        }
        shared.take(frames.drain(..))
    };
    let broken = async {
        match lending {
            Some(lending) => lending.broken().await,
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        ended = sending(connection, control, &shared, lending) => ended,
        ended = receive(asks, take) => ended.and(Err(Ended::Control)),
        broken = broken => Err(Ended::OneSided(broken)),
        never = shared.read() => match never {},
        never = expire(&shared) => match never {},
        () = draining => Ok(()),
    }
}

/// Hears where the fetcher's queue pair is, and says where this end's is, if there can be one.
async fn exchange(
    lender: &Lender,
    control: &mut quinn::SendStream,
    asks: &mut quinn::RecvStream,
) -> Result<Option<Lending>, Ended> {
    let theirs = receive_endpoint(asks).await?;
    let (endpoint, lending) = match lender.connect(theirs).await {
        Ok((endpoint, lending)) => (endpoint, Some(lending)),
        Err(error) => {
            let error = &*error as &dyn std::error::Error;
            tracing::warn!(error, "no queue pair for a fetcher; it is served over QUIC");
            (Vec::new(), None)
        }
    };
    send_endpoint(control, &endpoint).await?;
    Ok(lending)
}

/// Sends what there is, until nothing is left of a holder that drains.
async fn sending<S: Source>(
    connection: &quinn::Connection,
    control: quinn::SendStream,
    shared: &Shared<S>,
    lending: Option<&Lending>,
) -> Result<(), Ended> {
    let mut streams = Streams {
        connection,
        control,
        of: HashMap::new(),
    };
    // Data that is about to be lent; bounded, as all data, by the fetcher's credit.
    let mut lends = FuturesUnordered::new();
    loop {
        // Or they would take a share of the link.
        streams.close(shared, lending);
        while let Some(Some(frame)) = lends.next().now_or_never() {
            streams.send(shared, frame).await?;
        }
        if let Some(frame) = shared.next_frame() {
            let frame = match lending {
                Some(lending) => lending.lend(frame),
                None => Err(frame),
            };
            match frame {
                Ok(lend) => lends.push(lend),
                Err(frame) => streams.send(shared, frame).await?,
            }
            continue;
        }
        if shared.is_drained() {
            // The last frames are on their way; the fetcher closes.
            let _ = tokio::time::timeout(CLOSING, connection.closed()).await;
            return Ok(());
        }
        tokio::select! {
            Some(frame) = lends.next(), if !lends.is_empty() => streams.send(shared, frame).await?,
            () = shared.work.notified() => {}
        }
    }
}

/// One for control, and one for each request that was described.
struct Streams<'a> {
    connection: &'a quinn::Connection,
    control: quinn::SendStream,
    /// With the bytes of data that were sent.
    of: HashMap<RequestId, (quinn::SendStream, u64)>,
}

impl Streams<'_> {
    async fn send<S: Source>(&mut self, shared: &Shared<S>, frame: Frame) -> Result<(), Ended> {
        let request = match &frame {
            Frame::Describe { request, .. }
            | Frame::Data { request, .. }
            | Frame::Lost { request, .. } => *request,
            Frame::Lend(loan) => loan.request,
            _ => return Ok(send(&mut self.control, &frame).await?),
        };
        let (stream, sent) = match self.of.entry(request) {
            Entry::Occupied(entry) => entry.into_mut(),
            Entry::Vacant(entry) => entry.insert((self.connection.open_uni().await?, 0)),
        };
        *sent += frame.data_bytes();
        let priority = shared.priority(request).unwrap_or(0);
        // A stream that is gone has no priority.
        let _ = stream.set_priority(i32::try_from(priority).unwrap_or(i32::MAX));
        Ok(send(stream, &frame).await?)
    }

    /// Ends the streams of requests that have ended.
    fn close<S: Source>(&mut self, shared: &Shared<S>, lending: Option<&Lending>) {
        self.of.retain(|request, (stream, sent)| {
            let serves = shared.serves(*request);
            if !serves {
                let lent = lending.is_some_and(|lending| lending.has_lent(*request));
                // What of it is not acknowledged, nobody waits for, but the fetcher has to know
                // how much credit it took; except for loans, which are to be given back. The
                // stream is not gone, so it can be ended.
                let _ = if lent {
                    stream.finish()
                } else {
                    stream.reset(VarInt::from_u64(*sent).unwrap_or(VarInt::MAX))
                };
            }
            serves
        });
    }
}

/// What a peer gets to hear the last words.
const CLOSING: Duration = Duration::from_millis(200);
