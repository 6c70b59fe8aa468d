//! The end that connects.

use std::convert::Infallible;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;

use futures::stream::{FuturesUnordered, StreamExt as _};

use super::{CLOSED, ConnectError, Ended, Identity, QuicConfig, Trust, VIOLATED};
use super::{receive, send};
use crate::fetching::Shared;
use crate::path::{Carrier, DataPath};

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
        let mut streams = FuturesUnordered::new();
        // Streams overtake each other, and the first word is on the one for control.
        shared.opened().await;
        loop {
            tokio::select! {
                stream = connection.accept_uni() => {
                    streams.push(receive(stream?, |frames| shared.take(frames.drain(..))));
                }
                Some(done) = streams.next(), if !streams.is_empty() => match done {
                    // A request that ended has its stream reset.
                    Err(Ended::Read(quinn::ReadError::Reset(_))) => {}
                    done => done?,
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
