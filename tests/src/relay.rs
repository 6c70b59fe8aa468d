//! Sits between a client and a daemon, and forwards whatever they speak: TCP as it is, datagrams
//! as a bad network would.
//!
//! A client looks for the daemon's data plane at the host that it calls. So a relay listens at
//! another address than the daemon and at the same port, of TCP and of UDP.

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use rustix::net::sockopt;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

/// Forwards a daemon's port. Dropping it cuts all connections.
#[derive(Debug)]
pub struct Relay {
    address: SocketAddr,
    switches: Switches,
    _tasks: JoinSet<()>,
}

/// What can be changed of a [`Relay`] while it forwards.
#[derive(Clone, Debug)]
pub struct Switches(Arc<Shared>);

/// What becomes of datagrams, each way.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Weather {
    /// Share that is lost. Default: 0.
    pub loss: f64,
    /// Share that those behind it overtake. Default: 0.
    pub overtaken: f64,
    /// How long each one takes. Default: no time.
    pub delay: Duration,
    /// Bytes of the longest one that passes. Default: any.
    pub longest: usize,
    /// Millions of bits a second that pass; more wait, for [`QUEUE`] at most, or are lost.
    /// Default: any.
    pub mbps: Option<u32>,
}

impl Default for Weather {
    fn default() -> Self {
        Self {
            loss: 0.0,
            overtaken: 0.0,
            delay: Duration::ZERO,
            longest: LONGEST,
            mbps: None,
        }
    }
}

/// What passes at all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Passing {
    /// Everything.
    All,
    /// TCP; a firewall that does not know QUIC.
    Tcp,
    /// Nothing, without a word to anybody.
    Nothing,
}

/// What a relay has seen of datagrams.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    /// Bytes that went back to clients.
    pub bytes_back: u64,
    /// Datagrams that were to be forwarded and were not.
    pub lost: u64,
    /// Datagrams from clients that belong to handshakes: their headers are long (RFC 9000,
    /// section 17.2).
    pub handshakes: u64,
}

struct Shared {
    daemon: SocketAddr,
    udp: Arc<UdpSocket>,
    passing: watch::Sender<Passing>,
    state: Mutex<State>,
}

struct State {
    weather: Weather,
    random: StdRng,
    seen: Seen,
    /// Where clients seem to be, for the daemon, and how often that has changed.
    home: IpAddr,
    moves: u64,
    /// What is done once so many more bytes went back.
    armed: Option<(u64, Action)>,
}

type Action = Box<dyn FnOnce(&Switches) + Send>;

impl Relay {
    /// Forwards the port of `daemon` at the address `at`. Losses are drawn from `seed`.
    ///
    /// # Errors
    /// There are no such sockets.
    pub async fn start(
        daemon: SocketAddr,
        at: IpAddr,
        weather: Weather,
        seed: u64,
    ) -> io::Result<Self> {
        let address = SocketAddr::new(at, daemon.port());
        let listener = TcpListener::bind(address).await?;
        let shared = Arc::new(Shared {
            daemon,
            udp: Arc::new(socket(address)?),
            passing: watch::Sender::new(Passing::All),
            state: Mutex::new(State {
                weather,
                random: StdRng::seed_from_u64(seed),
                seen: Seen::default(),
                home: at,
                moves: 0,
                armed: None,
            }),
        });
        let mut tasks = JoinSet::new();
        tasks.spawn(forward_connections(Arc::clone(&shared), listener));
        tasks.spawn(forward_datagrams(Arc::clone(&shared)));
        Ok(Self {
            address,
            switches: Switches(shared),
            _tasks: tasks,
        })
    }

    /// Where it listens.
    pub fn address(&self) -> String {
        self.address.to_string()
    }

    /// What can be changed while it forwards.
    pub fn switches(&self) -> &Switches {
        &self.switches
    }

    /// Acts after `bytes` more bytes of datagrams went back to clients.
    pub fn arm(&self, bytes: u64, action: impl FnOnce(&Switches) + Send + 'static) {
        self.shared().state().armed = Some((bytes, Box::new(action)));
    }

    /// Whether it has acted since it was armed.
    pub fn has_acted(&self) -> bool {
        self.shared().state().armed.is_none()
    }

    /// What it has seen.
    pub fn seen(&self) -> Seen {
        self.shared().state().seen
    }

    fn shared(&self) -> &Shared {
        &self.switches.0
    }
}

impl Switches {
    /// From now on datagrams fare so.
    pub fn set_weather(&self, weather: Weather) {
        self.0.state().weather = weather;
    }

    /// From now on so much passes.
    pub fn set_passing(&self, passing: Passing) {
        self.0.passing.send_replace(passing);
    }

    /// From now on the daemon gets datagrams from other ports of `home`, an address of this
    /// host, as if clients had moved there; what it sends to where they were is lost.
    pub fn move_clients(&self, home: IpAddr) {
        let mut state = self.0.state();
        state.home = home;
        state.moves += 1;
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        // Counters and settings; a panic elsewhere leaves each of them whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// When a datagram is due, and whether others overtake it; `None` when it is lost. The link
    /// is `free_at` some time.
    fn fate(&self, length: usize, free_at: &mut Instant) -> Option<(Option<Instant>, bool)> {
        let silent = *self.passing.borrow() != Passing::All;
        let mut state = self.state();
        let weather = state.weather;
        let lost = state.random.random_bool(weather.loss);
        let overtaken = state.random.random_bool(weather.overtaken);
        let now = Instant::now();
        let mut sent = now;
        if let Some(mbps) = weather.mbps {
            sent = now.max(*free_at);
            let bits = 8.0 * f64::from(u32::try_from(length).unwrap_or(u32::MAX));
            sent += Duration::from_secs_f64(bits / (f64::from(mbps) * 1e6));
        }
        if silent || lost || length > weather.longest || sent > now + QUEUE {
            state.seen.lost += 1;
            return None;
        }
        *free_at = sent;
        let due = sent + weather.delay;
        Some(((due > now).then_some(due), overtaken))
    }

    fn went_back(self: &Arc<Self>, length: usize) {
        let mut state = self.state();
        let bytes = length as u64;
        state.seen.bytes_back += bytes;
        let Some((left, action)) = state.armed.take() else {
            return;
        };
        if let Some(left @ 1..) = left.checked_sub(bytes) {
            state.armed = Some((left, action));
            return;
        }
        drop(state);
        action(&Switches(Arc::clone(self)));
    }
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared")
            .field("daemon", &self.daemon)
            .field("seen", &self.state().seen)
            .finish_non_exhaustive()
    }
}

async fn forward_connections(shared: Arc<Shared>, listener: TcpListener) {
    let mut connections = JoinSet::new();
    while let Ok((client, _)) = listener.accept().await {
        let Ok(daemon) = TcpStream::connect(shared.daemon).await else {
            continue;
        };
        let [client, daemon] = [client, daemon].map(|socket| {
            // Small messages must not wait for more.
            let _ = socket.set_nodelay(true);
            socket.into_split()
        });
        connections.spawn(copy(client.0, daemon.1, shared.passing.subscribe()));
        connections.spawn(copy(daemon.0, client.1, shared.passing.subscribe()));
        while connections.try_join_next().is_some() {}
    }
}

async fn copy(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    mut passing: watch::Receiver<Passing>,
) {
    let mut buffer = vec![0; 64 << 10];
    // Either end may go away at any time; that is what is tested.
    while let Ok(count) = from.read(&mut buffer).await {
        let open = passing.wait_for(|passing| *passing != Passing::Nothing);
        if open.await.is_err() || count == 0 || to.write_all(&buffer[..count]).await.is_err() {
            break;
        }
    }
    let _ = to.shutdown().await;
}

/// A client, as the daemon sees it.
struct Home {
    moves: u64,
    lane: Lane,
    _tasks: JoinSet<()>,
}

async fn forward_datagrams(shared: Arc<Shared>) {
    let mut homes: HashMap<SocketAddr, Home> = HashMap::new();
    let mut buffer = vec![0; LONGEST];
    loop {
        let Ok((length, client)) = shared.udp.recv_from(&mut buffer).await else {
            return;
        };
        let datagram = &buffer[..length];
        let (moves, address) = {
            let mut state = shared.state();
            if datagram
                .first()
                .is_some_and(|first| first & LONG_HEADER != 0)
            {
                state.seen.handshakes += 1;
            }
            (state.moves, state.home)
        };
        if homes.get(&client).is_none_or(|home| home.moves != moves) {
            let Ok(socket) = socket(SocketAddr::new(address, 0)) else {
                return;
            };
            let home = home(&shared, client, Arc::new(socket), moves);
            homes.insert(client, home);
        }
        if let Some(home) = homes.get_mut(&client) {
            home.lane.take(&shared, datagram);
        }
    }
}

/// Sends a client what comes to `socket`.
fn home(shared: &Arc<Shared>, client: SocketAddr, socket: Arc<UdpSocket>, moves: u64) -> Home {
    let mut tasks = JoinSet::new();
    let lane = Lane::new(Arc::clone(&socket), shared.daemon, &mut tasks);
    let mut back = Lane::new(Arc::clone(&shared.udp), client, &mut tasks);
    let shared = Arc::clone(shared);
    tasks.spawn(async move {
        let mut buffer = vec![0; LONGEST];
        while let Ok((length, _)) = socket.recv_from(&mut buffer).await {
            if back.take(&shared, &buffer[..length]) {
                shared.went_back(length);
            }
        }
    });
    Home {
        moves,
        lane,
        _tasks: tasks,
    }
}

/// One way of datagrams.
struct Lane {
    socket: Arc<UdpSocket>,
    to: SocketAddr,
    /// When each is due, and what it is.
    late: mpsc::UnboundedSender<(Instant, Vec<u8>)>,
    free_at: Instant,
}

impl Lane {
    fn new(socket: Arc<UdpSocket>, to: SocketAddr, tasks: &mut JoinSet<()>) -> Self {
        let (late, mut waiting) = mpsc::unbounded_channel::<(Instant, Vec<u8>)>();
        let sender = Arc::clone(&socket);
        tasks.spawn(async move {
            while let Some((due, datagram)) = waiting.recv().await {
                tokio::time::sleep_until(due.into()).await;
                send(&sender, &datagram, to);
            }
        });
        Self {
            socket,
            to,
            late,
            free_at: Instant::now(),
        }
    }

    /// Whether it is forwarded.
    fn take(&mut self, shared: &Shared, datagram: &[u8]) -> bool {
        let Some((due, overtaken)) = shared.fate(datagram.len(), &mut self.free_at) else {
            return false;
        };
        match due {
            None if !overtaken => send(&self.socket, datagram, self.to),
            Some(due) if !overtaken => {
                // Its receiver lives as long as this, and what waits is bounded by QUIC's windows.
                let _ = self.late.send((due, datagram.to_vec()));
            }
            due => {
                let (socket, to, datagram) = (Arc::clone(&self.socket), self.to, datagram.to_vec());
                let due = due.unwrap_or_else(Instant::now) + OVERTAKEN_BY;
                tokio::spawn(async move {
                    tokio::time::sleep_until(due.into()).await;
                    send(&socket, &datagram, to);
                });
            }
        }
        true
    }
}

/// What a full socket does not take is lost, as in a full router.
fn send(socket: &UdpSocket, datagram: &[u8], to: SocketAddr) {
    let _ = socket.try_send_to(datagram, to);
}

fn socket(address: SocketAddr) -> io::Result<UdpSocket> {
    let socket = std::net::UdpSocket::bind(address)?;
    socket.set_nonblocking(true)?;
    // What needs a privilege, and else what the kernel's limits allow of it.
    if sockopt::set_socket_recv_buffer_size_force(&socket, SOCKET_BUFFER).is_err() {
        let _ = sockopt::set_socket_recv_buffer_size(&socket, SOCKET_BUFFER);
    }
    let _ = sockopt::set_socket_send_buffer_size(&socket, SOCKET_BUFFER);
    UdpSocket::from_std(socket)
}

/// Bytes of the longest datagram.
const LONGEST: usize = 65_535;
/// The form bit of QUIC's first byte.
const LONG_HEADER: u8 = 0x80;
/// How long a datagram waits for a link.
pub const QUEUE: Duration = Duration::from_millis(30);
/// How much later a datagram comes that others overtake.
const OVERTAKEN_BY: Duration = Duration::from_millis(3);
const SOCKET_BUFFER: usize = 16 << 20;
