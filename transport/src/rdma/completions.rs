//! Taking completions.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::thread;

use ibverbs_sys as ffi;
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::io::Errno;

use super::device::Shared;
use super::queue_pair::QueuePairError;

/// The thread of a device's completion queue. It ends after this was dropped, when the last
/// queue pair is destroyed; nobody waits for that.
#[derive(Debug)]
pub(super) struct Poller {
    stop: Arc<OwnedFd>,
}

impl Poller {
    pub(super) fn start(shared: &Arc<Shared>) -> io::Result<Self> {
        let stop = Arc::new(eventfd(0, EventfdFlags::CLOEXEC)?);
        let poller = Self {
            stop: Arc::clone(&stop),
        };
        shared.completions.request_notification()?;
        let shared = Arc::clone(shared);
        thread::Builder::new()
            .name("rdma".to_owned())
            .spawn(move || {
                if let Err(error) = run(&shared, &stop) {
                    // What is outstanding may still be done: what it needs is kept for good.
                    tracing::error!(%error, "completions of the RDMA device cannot be taken");
                    for connection in shared.break_down() {
                        connection.fail(QueuePairError::Completions);
                    }
                }
            })?;
        Ok(poller)
    }
}

impl Drop for Poller {
    fn drop(&mut self) {
        // It fails only if it would count beyond 2⁶⁴.
        let _ = rustix::io::write(&self.stop, &1u64.to_ne_bytes());
    }
}

/// Sleeps and passes on completions, until it is to stop and no queue pair is left.
fn run(shared: &Shared, stop: &OwnedFd) -> io::Result<()> {
    let mut stopping = false;
    while !(stopping && shared.is_idle()) {
        let fd = shared.completions.fd();
        let mut ready = [
            PollFd::from_borrowed_fd(fd, PollFlags::IN),
            PollFd::new(stop, PollFlags::IN),
        ];
        // To stop is asked once, and then only completions are waited for.
        let [event, ..] = match poll(&mut ready[..if stopping { 1 } else { 2 }], None) {
            Ok(_) | Err(Errno::INTR) => ready.each_ref().map(PollFd::revents),
            Err(error) => return Err(error.into()),
        };
        stopping |= !ready[1].revents().is_empty();
        if !event.is_empty() {
            match shared.completions.take_event() {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                taken => taken?,
            }
            // Before the queue is emptied: what comes after that raises an event.
            shared.completions.request_notification()?;
            pass_on(shared)?;
        }
    }
    Ok(())
}

/// Empties the completion queue.
fn pass_on(shared: &Shared) -> io::Result<()> {
    let mut completions = [ffi::ibv_wc::default(); BATCH];
    loop {
        let taken = shared.completions.poll(&mut completions)?;
        for completion in taken {
            // A queue pair is known until its last completion was taken.
            if let Some(connection) = shared.queue_pair(completion.qp_num) {
                let status = completion.error().map(|(status, _)| status);
                connection.complete(completion.wr_id(), status);
            }
        }
        if taken.len() < BATCH {
            return Ok(());
        }
    }
}

/// Completions that are taken at once.
const BATCH: usize = 32;
