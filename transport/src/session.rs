//! A transfer's two ends, without I/O and without a clock.
//!
//! A [`Fetcher`] asks for things, a [`Holder`] has them. Both are state machines: frames go in
//! with the time, frames, events and timers come out; whoever drives them owns sockets,
//! buffers and storage. What a request asks for, and what its bytes are, is a `body` that a
//! session does not look into: it moves bytes.
//!
//! # A request
//! ```text
//! fetcher                          holder
//!   Ask(body) ───────────────────▶   Asked
//!   Described ◀─────────────────── Describe(total, body)   |  Refuse(reason)
//!   Data …    ◀─────────────────── Data(offset, bytes) …   |  Lost(range)
//!   Complete  ───────────────────▶ Finish
//! ```
//!
//! A request's bytes have places from 0 to its total. The holder sends them in the order of
//! their places, those of the most urgent request first: by priority, then by deadline, then
//! by age; it reads ahead a bounded number. So what is needed first lies first, and a request
//! that comes later and matters more overtakes at the next frame. Requests of priority 0, which
//! nobody waits for yet, leave a quarter of the credit to others: their bytes may lie there
//! untaken for long.
//!
//! # What holds
//! * No byte is handed out twice, none beyond the total, and none that was not asked for.
//! * A fetcher has granted every byte that may come: [`Config::credit`] bounds what is under
//!   way to it, whatever it asked for.
//! * A request ends: by [`FetchEvent::Complete`], [`FetchEvent::Refused`] or
//!   [`FetchEvent::Failed`]; by its deadline at the latest, if it has one.
//! * After a lost connection a fetcher goes on with a new one ([`Fetcher::connect`]): it asks
//!   for what is missing and for nothing that came. If the holder then describes something
//!   else, the request fails, since its bytes would be of two things.
//! * A carrier may lose, repeat, and reorder frames if [`Config::resend_after`] says so: what
//!   makes no progress is asked for again, with what is missing. Carriers that do neither
//!   leave it out. Those with several streams carry the frames of one request in order.
//! * A holder that drains refuses what is new and ends what it has.
//!
//! # Versions
//! Each end says in its [`Hello`] which versions it speaks; both take the newest that they
//! share, and the features that both have. Headers are such that a reader passes over fields
//! that it does not know, so a version is only needed for what changes the meaning of old ones.

mod fetcher;
pub mod frame;
mod holder;

use std::time::Duration;

pub use fetcher::{FailReason, FetchEvent, Fetcher, Progress};
pub use frame::{Ask, Frame, FrameError, FrameReader, Hello, Loan, MAX_BODY};
pub use holder::{Holder, HolderEvent, Read};

/// The number of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestId(pub u64);

/// What an end of a session can do besides what its version says, a bit each.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Features(pub u64);

/// What bounds a session.
#[derive(Clone, Copy, Debug)]
pub struct Config {
    /// Versions that this end speaks: from, to. Default: [`VERSIONS`].
    pub versions: (u32, u32),
    /// What else it can do. Default: nothing.
    pub features: Features,
    /// Bytes of data on their way to a fetcher at most. Default: 16 MiB.
    pub credit: u64,
    /// Time without progress after which a fetcher asks again, on carriers that lose frames.
    /// Default: `None`, they do not.
    pub resend_after: Option<Duration>,
    /// How often a fetcher that waits measures the round trip. Default: 1 s.
    pub ping_every: Duration,
    /// Bytes that a holder reads, or has read and not sent, at most. Default: 16 MiB.
    pub read_ahead: u64,
    /// Bytes of one frame of data at most. Default: 256 KiB.
    pub piece: u64,
    /// Whether pieces end where the thing has an end, if there is room for as much, and may be
    /// longer for that. Default: false.
    pub whole: bool,
    /// Requests that a holder takes at once. Default: 256.
    pub requests: usize,
    /// How long a holder keeps a request of which nothing is taken, or all was sent and which
    /// was not finished. Default: 30 s.
    pub linger: Duration,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            versions: VERSIONS,
            features: Features::default(),
            credit: 16 << 20,
            resend_after: None,
            ping_every: Duration::from_secs(1),
            read_ahead: 16 << 20,
            piece: 256 << 10,
            whole: false,
            requests: 256,
            linger: Duration::from_secs(30),
        }
    }
}

impl Config {
    fn hello(&self) -> Hello {
        Hello {
            versions: self.versions,
            features: self.features,
            credit: self.credit,
        }
    }

    /// What this end and another one speak.
    fn agree(&self, theirs: &Hello) -> Result<Agreement, Violation> {
        let version = self.versions.1.min(theirs.versions.1);
        if version < self.versions.0.max(theirs.versions.0) {
            return Err(Violation::Version {
                ours: self.versions,
                theirs: theirs.versions,
            });
        }
        Ok(Agreement {
            version,
            features: Features(self.features.0 & theirs.features.0),
        })
    }
}

/// What both ends speak.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Agreement {
    /// The version.
    pub version: u32,
    /// What both can do besides.
    pub features: Features,
}

/// Why a holder does not take a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RefuseReason {
    /// Its body says why.
    Answer,
    /// It has as many as it takes; come back.
    Busy,
    /// It is shutting down.
    Draining,
    /// It has ended it: its deadline has passed there, or nothing of it was taken for too long.
    Idle,
}

/// What the other end may not do. The connection is to be closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Violation {
    /// The ends share no version.
    #[error("the peer speaks versions {theirs:?}, we speak {ours:?}; upgrade the older one")]
    Version {
        /// From, to.
        ours: (u32, u32),
        /// From, to.
        theirs: (u32, u32),
    },
    /// It did not introduce itself.
    #[error("the peer began without a hello")]
    NoHello,
    /// A frame that only the other role sends.
    #[error("the peer sent what only its counterpart may send")]
    Role,
    /// More data than it had credit for.
    #[error("the peer sent more than it had credit for")]
    Credit,
    /// Data, or a loss, beyond what was described.
    #[error("the peer sent bytes {0} and on, beyond what it described")]
    Beyond(u64),
    /// It lends what it does not have, or gives back what was not lent.
    #[error("the peer speaks of a loan that cannot be")]
    Loan,
    /// These are no frames.
    #[error(transparent)]
    Frame(#[from] FrameError),
}

/// Versions of the session that this package speaks: from, to.
pub const VERSIONS: (u32, u32) = (1, 1);
