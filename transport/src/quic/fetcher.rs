//! The end that connects.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::{CLOSED, ConnectError, Ended, Identity, QuicConfig, Trust, VIOLATED};
use super::{receive, send, until};
use crate::fetching::{Carrier, Fetch, FetchOptions, Shared};

/// A connection to a holder, which comes back by itself. Clones are handles to the same one;
/// it ends with the last of them, and of its [`Fetch`]es.
#[derive(Clone, Debug)]
pub struct Connection {
    shared: Arc<Shared>,
    connected: watch::Receiver<bool>,
    carrier: Carrier,
}

/// How a connection is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Status {
    /// Whether it is there now.
    pub connected: bool,
    /// Whether the holder is shutting down.
    pub draining: bool,
    /// The round trip, smoothed, once it was measured.
    pub round_trip: Option<Duration>,
}

impl Connection {
    /// To the holder at `address`, which `trust` vouches for under `name`. It may be there
    /// later; requests wait for it until their deadlines.
    ///
    /// # Errors
    /// [`ConnectError`]: there can be no such connection.
    pub fn new(
        address: SocketAddr,
        name: &str,
        trust: &Trust,
        identity: Option<&Identity>,
        config: QuicConfig,
    ) -> Result<Self, ConnectError> {
        let any = match address {
            SocketAddr::V4(_) => SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0)),
            SocketAddr::V6(_) => SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0)),
        };
        let socket = |error| ConnectError::Socket(any, error);
        let bound = std::net::UdpSocket::bind(any).map_err(socket)?;
        let runtime = Arc::new(quinn::TokioRuntime);
        let endpoint = quinn::Endpoint::new(config.endpoint()?, None, bound, runtime);
        let mut endpoint = endpoint.map_err(socket)?;
        let mut client = quinn::ClientConfig::new(Arc::new(trust.fetching(identity)?));
        client.transport_config(config.transport());
        endpoint.set_default_client_config(client);

        let shared = Shared::new(config.session);
        let (state, connected) = watch::channel(false);
        let mut carrier = JoinSet::new();
        carrier.spawn(carry(
            endpoint,
            (address, name.to_owned()),
            Arc::clone(&shared),
            state,
            config,
        ));
        Ok(Self {
            shared,
            connected,
            carrier: Arc::new(carrier),
        })
    }

    /// Asks for something.
    pub fn fetch(&self, body: Bytes, options: FetchOptions) -> Fetch {
        self.shared.fetch(body, options, &self.carrier)
    }

    /// How it is.
    pub fn status(&self) -> Status {
        Status {
            connected: *self.connected.borrow(),
            draining: self.shared.is_draining(),
            round_trip: self.shared.round_trip(),
        }
    }

    /// Waits until it is there.
    pub async fn connected(&self) {
        // Its task lasts as long as this handle.
        let _ = self
            .connected
            .clone()
            .wait_for(|&connected| connected)
            .await;
    }
}

/// Connects, again and again, and carries frames.
async fn carry(
    endpoint: quinn::Endpoint,
    (address, name): (SocketAddr, String),
    shared: Arc<Shared>,
    state: watch::Sender<bool>,
    config: QuicConfig,
) {
    let mut backoff = FIRST_BACKOFF;
    loop {
        let begun = Instant::now();
        let ended = tokio::select! {
            ended = one(&endpoint, (address, &name), &shared, &state) => ended,
            // Deadlines pass also without a connection.
            never = expire(&shared) => match never {},
        };
        state.send_replace(false);
        shared.with(|fetcher| fetcher.disconnect());
        if let Err(error) = ended {
            tracing::debug!(%address, error = &error as &dyn std::error::Error, "disconnected");
        }
        if begun.elapsed() > config.most_backoff {
            backoff = FIRST_BACKOFF;
        }
        tokio::select! {
            () = tokio::time::sleep(backoff) => {}
            never = expire(&shared) => match never {},
        }
        backoff = (backoff * 2).min(config.most_backoff);
    }
}

/// One connection, until it ends.
async fn one(
    endpoint: &quinn::Endpoint,
    (address, name): (SocketAddr, &str),
    shared: &Arc<Shared>,
    state: &watch::Sender<bool>,
) -> Result<(), Ended> {
    let connection = endpoint.connect(address, name)?.await?;
    let (mut control, answers) = connection.open_bi().await?;
    shared.with(|fetcher| fetcher.connect(Instant::now()));
    state.send_replace(true);
    let sending = async {
        loop {
            while let Some(frame) = shared.next_frame() {
                send(&mut control, &frame).await?;
            }
            shared.work.notified().await;
        }
    };
    let answers = async {
        receive(answers, |frames| shared.take(frames.drain(..))).await?;
        Err(Ended::Control)
    };
    let streams = async {
        let mut streams = JoinSet::new();
        loop {
            tokio::select! {
                stream = connection.accept_uni() => {
                    let (stream, shared) = (stream?, Arc::clone(shared));
                    streams.spawn(async move {
                        receive(stream, |frames| shared.take(frames.drain(..))).await
                    });
                }
                Some(done) = streams.join_next() => match done {
                    // A request that ended has its stream reset.
                    Ok(Err(Ended::Read(quinn::ReadError::Reset(_)))) => {}
                    Ok(done) => done?,
                    Err(_) => return Err(Ended::Control),
                }
            }
        }
    };
    let ended = tokio::select! {
        ended = sending => ended,
        ended = answers => ended,
        ended = streams => ended,
    };
    let code = match &ended {
        Err(Ended::Violation(_)) => VIOLATED,
        _ => CLOSED,
    };
    connection.close(code, b"");
    ended
}

/// Keeps a fetcher's timers.
async fn expire(shared: &Shared) -> std::convert::Infallible {
    loop {
        let at = shared.timeout();
        tokio::select! {
            () = until(at) => shared.on_timeout(),
            () = shared.timers.notified() => {}
        }
    }
}

/// Before the second try.
const FIRST_BACKOFF: Duration = Duration::from_millis(20);
