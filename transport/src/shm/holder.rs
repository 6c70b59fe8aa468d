//! The end that is connected to.

use std::collections::HashMap;
use std::fs::{self, DirBuilder};
use std::io::ErrorKind;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use kvasir_mem::Arena;
use rustix::process::geteuid;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Notify, watch};
use tokio::task::JoinSet;

use super::wire::{End, SEND_BYTES, Socket, put};
use super::{Ended, ListenError, Loan, ShmConfig, Token};
use crate::holding::{self, Shared};
use crate::session::{Frame, Violation};
use crate::source::Source;

/// Listens, and serves whoever connects.
#[derive(Debug)]
pub struct Listener {
    path: PathBuf,
    draining: watch::Sender<bool>,
    tasks: JoinSet<()>,
}

/// What every connection has at hand.
#[derive(Debug)]
struct Common<S> {
    arena: Arc<Arena>,
    token: Token,
    source: Arc<S>,
    config: ShmConfig,
    /// Bytes that are lent, to all fetchers together.
    lent: AtomicU64,
}

impl Listener {
    /// Serves what `source` has at a socket, calling itself `token`. What of it lies in
    /// `arena` is lent. The socket's directory is made where it is missing; nobody but this
    /// user may be able to enter it. A socket that nobody listens at is replaced.
    ///
    /// # Errors
    /// [`ListenError`]
    ///
    /// # Panics
    /// Outside of a Tokio runtime.
    pub fn new<S: Source>(
        path: impl Into<PathBuf>,
        token: Token,
        arena: Arc<Arena>,
        source: Arc<S>,
        config: ShmConfig,
    ) -> Result<Self, ListenError> {
        let path = path.into();
        let listener = listen(&path)?;
        let (draining, drains) = watch::channel(false);
        let common = Arc::new(Common {
            arena,
            token,
            source,
            config,
            lent: AtomicU64::new(0),
        });
        let mut tasks = JoinSet::new();
        tasks.spawn(accept(listener, common, drains));
        Ok(Self {
            path,
            draining,
            tasks,
        })
    }

    /// Where it listens.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Takes no further requests, and waits for those under way, until `within` has passed.
    pub async fn drain(mut self, within: Duration) {
        self.draining.send_replace(true);
        let _ = tokio::time::timeout(within, async {
            // It ends when all of its connections have.
            while self.tasks.join_next().await.is_some() {}
        })
        .await;
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        // Somebody may have removed it.
        let _ = fs::remove_file(&self.path);
    }
}

fn listen(path: &Path) -> Result<UnixListener, ListenError> {
    let failed = |source| ListenError::Socket {
        path: path.to_owned(),
        source,
    };
    let directory = path.parent().unwrap_or_else(|| Path::new("."));
    let mut builder = DirBuilder::new();
    builder.recursive(true).mode(0o700);
    builder.create(directory).map_err(failed)?;
    let found = fs::symlink_metadata(directory).map_err(failed)?;
    let ours = found.is_dir() && found.uid() == geteuid().as_raw() && found.mode() & 0o077 == 0;
    if !ours {
        return Err(ListenError::Directory(directory.to_owned()));
    }
    match UnixListener::bind(path) {
        Err(error) if error.kind() == ErrorKind::AddrInUse => {
            if std::os::unix::net::UnixStream::connect(path).is_ok() {
                return Err(ListenError::InUse(path.to_owned()));
            }
            // Its process is gone.
            fs::remove_file(path).map_err(failed)?;
            UnixListener::bind(path).map_err(failed)
        }
        listener => listener.map_err(failed),
    }
}

async fn accept<S: Source>(
    listener: UnixListener,
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
            incoming = listener.accept() => match incoming {
                Ok((stream, _)) => {
                    let (common, drains) = (Arc::clone(&common), drains.clone());
                    connections.spawn(async move {
                        if let Err(error) = serve(stream, common, drains).await {
                            let error = &error as &dyn std::error::Error;
                            tracing::debug!(error, "a fetcher's connection ended");
                        }
                    });
                }
                Err(error) => {
                    // Such as too many open files; trying again at once would spin.
                    tracing::warn!(%error, "cannot accept a connection");
                    tokio::time::sleep(AFTER_FAILURE).await;
                }
            },
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
    stream: UnixStream,
    common: Arc<Common<S>>,
    mut drains: watch::Receiver<bool>,
) -> Result<(), Ended> {
    let socket = Socket::new(stream)?;
    socket.greet(&common.token, common.arena.descriptor()?)?;
    let shared = Shared::new(common.config.session, Arc::clone(&common.source));
    let end = Lender {
        shared: &shared,
        loans: Loans::new(&common),
    };
    let draining = async {
        // Without a listener the connection is closed anyway.
        let _ = drains.wait_for(|&draining| draining).await;
        shared.drain();
        std::future::pending::<()>().await;
    };
    let ended = tokio::select! {
        ended = socket.carry(&end, common.config.spin) => ended,
        never = shared.read() => match never {},
        never = holding::expire(&shared) => match never {},
        () = draining => Ok(()),
    };
    // The fetcher closes its end when it has nothing any more.
    socket.shut_down();
    socket.closed().await;
    end.loans.all_back();
    ended
}

struct Lender<'a, S: Source> {
    shared: &'a Shared<S>,
    loans: Loans<'a, S>,
}

impl<S: Source> End for Lender<'_, S> {
    fn gather(&self, out: &mut BytesMut) {
        while out.len() < SEND_BYTES
            && let Some(frame) = self.shared.next_frame()
        {
            put(out, &self.loans.lend(frame));
        }
    }

    fn is_done(&self) -> bool {
        self.shared.is_drained()
    }

    fn take(&self, frames: &mut Vec<Frame>) -> Result<(), Violation> {
        let returned = frames.extract_if(.., |frame| matches!(frame, Frame::Return { .. }));
        for frame in returned {
            if let Frame::Return { loan } = frame {
                self.loans.take_back(loan)?;
            }
        }
        self.shared.take(frames.drain(..))
    }

    fn work(&self) -> &Notify {
        &self.shared.work
    }
}

/// What is lent to one fetcher.
///
/// What was not given back when this is dropped is leaked: somebody may read it.
#[derive(Debug)]
struct Loans<'a, S> {
    common: &'a Common<S>,
    lent: Mutex<Lent>,
}

#[derive(Debug, Default)]
struct Lent {
    next: u64,
    by_number: HashMap<u64, Bytes>,
}

impl<'a, S> Loans<'a, S> {
    fn new(common: &'a Common<S>) -> Self {
        Self {
            common,
            lent: Mutex::default(),
        }
    }

    fn lent(&self) -> MutexGuard<'_, Lent> {
        self.lent.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Data as a loan, where it lies in the arena and not too much is lent; else as it is.
    fn lend(&self, frame: Frame) -> Frame {
        let Frame::Data {
            request,
            offset,
            bytes,
        } = frame
        else {
            return frame;
        };
        let length = bytes.len() as u64;
        let most = self.common.config.most_lent;
        let taken = |lent: u64| lent.checked_add(length).filter(|&lent| lent <= most);
        let count = &self.common.lent;
        let place = self.common.arena.locate(&bytes);
        let counted = |_: &std::ops::Range<u64>| {
            let order = (Ordering::Relaxed, Ordering::Relaxed);
            count.fetch_update(order.0, order.1, taken).is_ok()
        };
        let Some(place) = place.filter(counted) else {
            return Frame::Data {
                request,
                offset,
                bytes,
            };
        };
        let mut lent = self.lent();
        let loan = lent.next;
        lent.next += 1;
        lent.by_number.insert(loan, bytes);
        Frame::Lend(Loan {
            request,
            offset,
            loan,
            at: place.start,
            length,
            key: None,
        })
    }

    fn take_back(&self, loan: u64) -> Result<(), Violation> {
        let bytes = self.lent().by_number.remove(&loan);
        let bytes = bytes.ok_or(Violation::Loan)?;
        let length = bytes.len() as u64;
        self.common.lent.fetch_sub(length, Ordering::Relaxed);
        Ok(())
    }

    /// The fetcher has nothing any more.
    fn all_back(&self) {
        let all = std::mem::take(&mut self.lent().by_number);
        let length = all.values().map(|bytes| bytes.len() as u64).sum();
        self.common.lent.fetch_sub(length, Ordering::Relaxed);
    }
}

impl<S> Drop for Loans<'_, S> {
    fn drop(&mut self) {
        let all = std::mem::take(&mut self.lent().by_number);
        if !all.is_empty() {
            tracing::warn!(loans = all.len(), "what was lent is given up");
            std::mem::forget(all);
        }
    }
}

const AFTER_FAILURE: Duration = Duration::from_millis(100);
