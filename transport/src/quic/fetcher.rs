//! The end that connects.

use std::convert::Infallible;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;

use tokio::task::JoinSet;

use super::{CLOSED, ConnectError, Ended, Identity, QuicConfig, Trust, VIOLATED};
use super::{receive, send};
use crate::fetching::Shared;
use crate::path::{Carrier, DataPath};
use crate::session::Frame;

/// A path to the holder at `address`, which `trust` vouches for under `name`. It may be there
/// later; requests wait for it until their deadlines.
///
/// # Errors
/// [`ConnectError`]: there can be no such connection.
///
/// # Panics
/// Outside of a Tokio runtime.
pub fn connect(
    address: SocketAddr,
    name: &str,
    trust: &Trust,
    identity: Option<&Identity>,
    config: QuicConfig,
) -> Result<DataPath, ConnectError> {
    let any = match address {
        SocketAddr::V4(_) => SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0)),
        SocketAddr::V6(_) => SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0)),
    };
    let mut endpoint = config.endpoint(any, None)?;
    let mut client = quinn::ClientConfig::new(Arc::new(trust.fetching(identity)?));
    client.transport_config(config.transport(address.ip()));
    endpoint.set_default_client_config(client);
    let name: Arc<str> = name.into();
    let shared = Shared::new(config.session);
    let one = move |shared| one(endpoint.clone(), address, Arc::clone(&name), shared);
    Ok(DataPath::carried_by(
        Carrier::Quic,
        shared,
        config.most_backoff,
        one,
    ))
}

/// One connection, until it ends.
async fn one(
    endpoint: quinn::Endpoint,
    address: SocketAddr,
    name: Arc<str>,
    shared: Arc<Shared>,
) -> Result<Infallible, Ended> {
    let connection = endpoint.connect(address, &name)?.await?;
    let (mut control, answers) = connection.open_bi().await?;
    shared.connect();
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
        // Streams overtake each other, and the first word is on the one for control.
        shared.opened().await;
        loop {
            tokio::select! {
                stream = connection.accept_uni() => {
                    streams.spawn(one_request(stream?, Arc::clone(&shared)));
                }
                Some(done) = streams.join_next() => match done {
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

/// What comes of one request.
async fn one_request(stream: quinn::RecvStream, shared: Arc<Shared>) -> Result<(), Ended> {
    let mut came = 0;
    let ended = receive(stream, |frames| {
        came += frames.iter().map(Frame::data_bytes).sum::<u64>();
        shared.take(frames.drain(..))
    });
    match ended.await {
        // It has ended. What was sent and did not come had credit, which others need.
        Err(Ended::Read(quinn::ReadError::Reset(sent))) => {
            let missing = sent.into_inner().saturating_sub(came);
            Ok(shared.with(|fetcher| fetcher.on_gone(missing))?)
        }
        ended => ended,
    }
}
