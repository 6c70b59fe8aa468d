//! The end that connects.

use std::convert::Infallible;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use futures::stream::{FuturesUnordered, StreamExt as _};

use super::{ConnectError, Ended, Identity, QuicConfig, Trust};
use super::{agreed_on_one_sided, receive, receive_endpoint, send, send_endpoint};
use crate::fetching::Shared;
use crate::path::{Carrier, DataPath};
use crate::rdma::{Prepared, Reader, Reading};
use crate::session::{Frame, Violation};

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
    connect_with(None, address, name, trust, identity, config)
}

/// As [`connect`]; where it can, it reads with `reader` what the holder lends.
pub(crate) fn connect_with(
    reader: Option<Reader>,
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
    let client = |one_sided| -> Result<quinn::ClientConfig, ConnectError> {
        let crypto = trust.fetching_over(identity, one_sided)?;
        let mut client = quinn::ClientConfig::new(Arc::new(crypto));
        client.transport_config(config.transport(address.ip()));
        Ok(client)
    };
    let carrier = if reader.is_some() {
        Carrier::Rdma
    } else {
        Carrier::Quic
    };
    let way = Arc::new(Way {
        endpoint: config.endpoint(any, None)?,
        address,
        name: name.to_owned(),
        plain: client(false)?,
        one_sided: client(true)?,
        reader,
        pause: Mutex::default(),
        patience: config.idle,
    });
    let shared = Shared::new(config.session, carrier);
    let one = move |shared| {
        let way = Arc::clone(&way);
        async move { way.one(shared).await }
    };
    Ok(DataPath::carried_by(shared, config.most_backoff, one))
}

/// How a holder is reached.
struct Way {
    endpoint: quinn::Endpoint,
    address: SocketAddr,
    name: String,
    plain: quinn::ClientConfig,
    one_sided: quinn::ClientConfig,
    reader: Option<Reader>,
    /// Of one-sided reads.
    pause: Mutex<Pause>,
    /// How long the holder may take to say where its queue pair is.
    patience: Duration,
}

/// One-sided reads that failed are not tried at every connection.
#[derive(Debug, Default)]
struct Pause {
    until: Option<Instant>,
    next: Option<Duration>,
}

impl Pause {
    fn is_over(&self, now: Instant) -> bool {
        self.until.is_none_or(|until| until <= now)
    }

    /// They failed, after they went well for so long.
    fn begin(&mut self, now: Instant, went_well: Duration) {
        let pause = match self.next {
            Some(next) if went_well < MOST_PAUSE => next,
            _ => FIRST_PAUSE,
        };
        self.until = Some(now + pause);
        self.next = Some((pause * 2).min(MOST_PAUSE));
    }
}

impl Way {
    /// One connection, until it ends.
    async fn one(&self, shared: Arc<Shared>) -> Result<Infallible, Ended> {
        let prepared = self.prepare().await;
        let config = match &prepared {
            Some(_) => &self.one_sided,
            None => &self.plain,
        };
        let endpoint = &self.endpoint;
        let connecting = endpoint.connect_with(config.clone(), self.address, &self.name)?;
        let connection = connecting.await?;
        let prepared = prepared.filter(|_| agreed_on_one_sided(&connection));
        let (one_sided, begun) = (prepared.is_some(), Instant::now());
        let Err(error) = self.converse(&connection, prepared, &shared).await;
        connection.close(error.code(), b"");
        if one_sided && error.is_of_one_sided() {
            let now = Instant::now();
            self.pause().begin(now, now - begun);
        }
        Err(error)
    }

    fn pause(&self) -> std::sync::MutexGuard<'_, Pause> {
        self.pause.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A queue pair, if there is a device, and it has not failed a moment ago.
    async fn prepare(&self) -> Option<Prepared> {
        let reader = self.reader.as_ref()?;
        if !self.pause().is_over(Instant::now()) {
            return None;
        }
        let prepared = reader.prepare().await;
        if prepared.is_none() {
            self.pause().begin(Instant::now(), Duration::ZERO);
        }
        prepared
    }

    async fn converse(
        &self,
        connection: &quinn::Connection,
        prepared: Option<Prepared>,
        shared: &Arc<Shared>,
    ) -> Result<Infallible, Ended> {
        let (mut control, mut answers) = connection.open_bi().await?;
        let reading = match prepared {
            None => None,
            Some(prepared) => {
                let exchanged = exchange(prepared, &mut control, &mut answers);
                let exchanged = tokio::time::timeout(self.patience, exchanged).await;
                exchanged.map_err(|_| Ended::Preamble)??
            }
        };
        let reading = reading.as_ref();
        shared.connect(match reading {
            Some(_) => Carrier::Rdma,
            None => Carrier::Quic,
        });
        let sending = async {
            loop {
                for loan in reading.map_or_else(Vec::new, Reading::over) {
                    send(&mut control, &Frame::Return { loan }).await?;
                }
                while let Some(frame) = shared.next_frame() {
                    send(&mut control, &frame).await?;
                }
                shared.work.notified().await;
            }
        };
        let answers = async {
            receive(answers, |frames| take(shared, reading, frames)).await?;
            Err(Ended::Control)
        };
        let streams = async {
            // Streams overtake each other, and the first word is on the one for control.
            shared.opened().await;
            streams(connection, reading, shared).await
        };
        let reads = async {
            match reading {
                Some(reading) => reading.read(shared).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            ended = sending => ended,
            ended = answers => ended,
            ended = streams => ended,
            ended = reads => ended,
        }
    }
}

/// Says where this end's queue pair is, hears where the other one is, and connects the two.
/// `None` where the holder has none.
async fn exchange(
    prepared: Prepared,
    control: &mut quinn::SendStream,
    answers: &mut quinn::RecvStream,
) -> Result<Option<Reading>, Ended> {
    send_endpoint(control, &prepared.endpoint()).await?;
    let theirs = receive_endpoint(answers).await?;
    if theirs.is_empty() {
        return Ok(None);
    }
    let connected = prepared.connect(theirs).await;
    connected.map(Some).map_err(Ended::OneSided)
}

/// Takes what the streams of requests say.
async fn streams(
    connection: &quinn::Connection,
    reading: Option<&Reading>,
    shared: &Arc<Shared>,
) -> Result<Infallible, Ended> {
    let mut streams = FuturesUnordered::new();
    loop {
        tokio::select! {
            stream = connection.accept_uni() => streams.push(take_all(stream?, shared, reading)),
            Some(done) = streams.next(), if !streams.is_empty() => done?,
        }
    }
}

/// Takes what a request's stream says, until it ends.
async fn take_all(
    stream: quinn::RecvStream,
    shared: &Shared,
    reading: Option<&Reading>,
) -> Result<(), Ended> {
    let mut came = 0;
    let ended = receive(stream, |frames| {
        came += frames.iter().map(Frame::data_bytes).sum::<u64>();
        take(shared, reading, frames)
    });
    match ended.await {
        // The request has ended, and what is still on its way goes nowhere.
        Err(Ended::Read(quinn::ReadError::Reset(sent))) => {
            let missed = sent.into_inner().saturating_sub(came);
            Ok(shared.with(|fetcher| fetcher.missed(missed))?)
        }
        ended => ended,
    }
}

/// Takes frames, and what is lent after what describes it.
fn take(
    shared: &Shared,
    reading: Option<&Reading>,
    frames: &mut Vec<Frame>,
) -> Result<(), Violation> {
    let Some(reading) = reading else {
        return shared.take(frames.drain(..));
    };
    let loans: Vec<Frame> = frames
        .extract_if(.., |frame| matches!(frame, Frame::Lend(_)))
        .collect();
    shared.take(frames.drain(..))?;
    reading.begin(loans)
}

/// Until one-sided reads are tried again after they failed once.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
/// And after they failed again and again.
const MOST_PAUSE: Duration = Duration::from_secs(60);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_fails_again_and_again_is_tried_less_often() {
        let mut pause = Pause::default();
        let mut now = Instant::now();
        assert!(pause.is_over(now));
        for seconds in [1, 2, 4, 8, 16, 32, 60, 60] {
            pause.begin(now, Duration::from_secs(1));
            let over = now + Duration::from_secs(seconds);
            assert!(!pause.is_over(over - Duration::from_millis(1)));
            assert!(pause.is_over(over));
            now = over;
        }
        // What went well for long begins anew.
        pause.begin(now, MOST_PAUSE);
        assert!(pause.is_over(now + FIRST_PAUSE));
    }
}
