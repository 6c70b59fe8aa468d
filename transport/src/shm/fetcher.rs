//! The end that connects.

use std::convert::Infallible;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use kvasir_mem::{Lent, View};
use tokio::sync::Notify;

use super::wire::{End, SEND_BYTES, Socket, put};
use super::{Ended, Loan, ShmConfig, Token};
use crate::fetching::Shared;
use crate::path::{Carrier, DataPath};
use crate::session::{Frame, Violation};

/// A path to the holder that listens at `path` and calls itself `token`. It may be there
/// later; requests wait for it until their deadlines.
///
/// # Panics
/// Outside of a Tokio runtime.
pub fn connect(path: impl Into<PathBuf>, token: Token, config: ShmConfig) -> DataPath {
    let path: Arc<Path> = path.into().into();
    let shared = Shared::new(config.session, Carrier::SharedMemory);
    let spin = config.spin;
    let one = move |shared| one(Arc::clone(&path), token, spin, shared);
    DataPath::carried_by(shared, config.most_backoff, one)
}

/// One connection, until it ends.
async fn one(
    path: Arc<Path>,
    token: Token,
    spin: Duration,
    shared: Arc<Shared>,
) -> Result<Infallible, Ended> {
    let socket = Socket::connect(&path).await?;
    let (theirs, descriptor) = socket.greeted().await?;
    if theirs != token {
        return Err(Ended::Stranger);
    }
    let view = View::new(descriptor)?;
    let home = Arc::new(Home {
        socket,
        shared: Arc::clone(&shared),
        over: Mutex::default(),
    });
    shared.connect(Carrier::SharedMemory);
    let end = Borrower { view, home };
    end.home.socket.carry(&end, spin).await?;
    Err(Ended::Closed)
}

struct Borrower {
    view: Arc<View>,
    home: Arc<Home>,
}

impl End for Borrower {
    fn gather(&self, out: &mut BytesMut) {
        for loan in std::mem::take(&mut *self.home.over()) {
            put(out, &Frame::Return { loan });
        }
        while out.len() < SEND_BYTES
            && let Some(frame) = self.home.shared.next_frame()
        {
            put(out, &frame);
        }
    }

    fn take(&self, frames: &mut Vec<Frame>) -> Result<(), Violation> {
        for frame in frames.iter_mut() {
            if let Frame::Lend(loan) = frame {
                *frame = lent(&self.view, &self.home, *loan)?;
            }
        }
        self.home.shared.take(frames.drain(..))
    }

    fn work(&self) -> &Notify {
        &self.home.shared.work
    }
}

/// Data, where it lies.
fn lent(view: &Arc<View>, home: &Arc<Home>, loan: Loan) -> Result<Frame, Violation> {
    // SAFETY: a holder does not write to what it has lent until it is given back, which
    // happens when the last handle on it is dropped, or until the socket is closed, which
    // `home` keeps open for as long as there is one.
    let bytes = unsafe { view.lent(loan.at, loan.length) }.ok_or(Violation::Loan)?;
    let borrowed = Borrowed {
        bytes,
        loan: loan.loan,
        home: Arc::clone(home),
    };
    Ok(Frame::Data {
        request: loan.request,
        offset: loan.offset,
        bytes: Bytes::from_owner(borrowed),
    })
}

/// Where loans go back to: a connection, which lasts as long as anything lent.
struct Home {
    socket: Socket,
    shared: Arc<Shared>,
    /// Loans that are over, and were not given back.
    over: Mutex<Vec<u64>>,
}

/// Something lent. Dropping it gives it back.
struct Borrowed {
    bytes: Lent,
    loan: u64,
    home: Arc<Home>,
}

impl Home {
    fn over(&self) -> MutexGuard<'_, Vec<u64>> {
        self.over.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl AsRef<[u8]> for Borrowed {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Drop for Borrowed {
    fn drop(&mut self) {
        self.home.over().push(self.loan);
        self.home.shared.work.notify_one();
    }
}
