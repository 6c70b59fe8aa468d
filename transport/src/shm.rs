//! Shared memory, between processes of one host.
//!
//! The holder's bytes lie in an [`Arena`](kvasir_mem::Arena), of which a fetcher gets a
//! descriptor that only reads. Frames go over a Unix socket; instead of data, the holder lends
//! ranges of the arena ([`Loan`]), and what a fetcher hands out are these ranges, without a
//! copy. What does not lie in the arena goes over the socket.
//!
//! # Time
//! A get costs what two messages over a socket cost, however many bytes are lent. Most of that is
//! waking threads: on two virtual processors, where a bare echo between two processes that wait
//! takes 50 to 70 µs, an echo between two that look takes 4. So an end at which something has
//! just moved looks for more for a while, [`ShmConfig::spin`], before it sleeps: gets that follow
//! each other wake nobody, and the first one after a pause wakes the holder. After some
//! microseconds of looking it lets others have the processor before it looks again, since the
//! scheduler may have put the peer on the same one. `kvasir-bench transport` measures gets that
//! follow each other.
//!
//! # What is lent
//! stays as it is until it is given back, or until the fetcher has closed its end of the
//! socket, whatever happens to requests, sessions and chunks. A fetcher keeps its end open for
//! as long as it has anything lent; a process that dies closes it. A holder that has to end a
//! connection before shuts down its own end, and waits; if it cannot wait, it leaks what it
//! lent rather than use that memory again. If a holder dies, its arena lasts as long as a
//! fetcher maps it, and nobody writes to it any more.
//!
//! # Trust
//! A holder trusts nobody: what fetchers say is checked, and they cannot write. A fetcher
//! trusts that the holder keeps to the above; offsets and lengths are checked, and the arena
//! must be sealed against shrinking. Who may connect is a matter of the socket's directory:
//! [`Listener::new`] wants one that only its own user can enter.

mod fetcher;
mod holder;
mod wire;

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use crate::session::{Config, Loan, Violation};

pub use fetcher::connect;
pub use holder::Listener;

/// What a holder calls itself, so that nobody takes another one for it that listens at the
/// same path of another host.
pub type Token = [u8; 16];

/// What bounds a connection.
#[derive(Clone, Copy, Debug)]
pub struct ShmConfig {
    /// The session's. Its credit bounds what is lent and was not taken.
    pub session: Config,
    /// Bytes that a holder lends at most, to all fetchers together. What is beyond goes over
    /// the socket. Default: no limit.
    pub most_lent: u64,
    /// How long an end that something has just moved at looks for more before it sleeps. To
    /// wake a thread takes longer than a get; what looks for more takes CPU time. Default:
    /// 50 µs.
    pub spin: Duration,
    /// How long after a lost connection another one is tried at most. Default: 1 s.
    pub most_backoff: Duration,
}

impl Default for ShmConfig {
    fn default() -> Self {
        let session = Config {
            // Nothing is under way: credit is for what waits to be taken, and a piece that is
            // whole is never put together again.
            credit: 1 << 30,
            whole: true,
            ..Config::default()
        };
        Self {
            session,
            most_lent: u64::MAX,
            spin: Duration::from_micros(50),
            most_backoff: Duration::from_secs(1),
        }
    }
}

/// Why there can be no listener.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ListenError {
    /// The directory of the socket cannot be made, or the socket in it.
    #[error("{path}: no socket can be made")]
    Socket {
        /// The socket's path.
        path: PathBuf,
        /// What happened.
        #[source]
        source: io::Error,
    },
    /// Others can enter the directory of the socket.
    #[error("{0} belongs to another user, or can be entered by others; choose another directory")]
    Directory(PathBuf),
    /// The system gives no random bytes.
    #[error("no token can be made")]
    Token(#[source] io::Error),
    /// Another process listens there.
    #[error("{0}: another process listens there; stop it, or choose another path")]
    InUse(PathBuf),
}

/// Why a connection ended.
#[derive(Debug, thiserror::Error)]
enum Ended {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error("the peer closed the connection")]
    Closed,
    #[error("another process listens there, or one of another version")]
    Stranger,
    #[error(transparent)]
    Violation(#[from] Violation),
}

/// The first bytes that a holder sends; its token follows, and the arena's descriptor comes
/// with them.
const GREETING: [u8; 8] = *b"kvasir\x01\n";
const PREAMBLE_BYTES: usize = GREETING.len() + size_of::<Token>();
