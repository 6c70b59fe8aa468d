//! Completion queues.

use std::io;
use std::os::fd::BorrowedFd;
use std::ptr::{self, NonNull};
use std::sync::Arc;

use ibverbs_sys as ffi;

use super::{Context, report};

/// Where work that is done is found, with the channel that says when; `ibv_create_cq(3)`.
#[derive(Debug)]
pub(in crate::rdma) struct CompletionQueue {
    pub(super) cq: NonNull<ffi::ibv_cq>,
    channel: CompletionChannel,
}

// SAFETY: as for `Context`.
unsafe impl Send for CompletionQueue {}
// SAFETY: as for `Context`.
unsafe impl Sync for CompletionQueue {}

/// `ibv_create_comp_channel(3)`.
#[derive(Debug)]
struct CompletionChannel {
    channel: NonNull<ffi::ibv_comp_channel>,
    _context: Arc<Context>,
}

impl CompletionQueue {
    /// A queue for `entries` completions at least, that nobody is notified of yet.
    pub(in crate::rdma) fn new(context: &Arc<Context>, entries: i32) -> io::Result<Self> {
        // SAFETY: the context is open.
        let channel = unsafe { ffi::ibv_create_comp_channel(context.0.as_ptr()) };
        let channel = CompletionChannel {
            channel: NonNull::new(channel).ok_or_else(io::Error::last_os_error)?,
            _context: Arc::clone(context),
        };
        let raw = channel.channel.as_ptr();
        // SAFETY: context and channel are open; the queue keeps the channel, and that the
        // context.
        let cq =
            unsafe { ffi::ibv_create_cq(context.0.as_ptr(), entries, ptr::null_mut(), raw, 0) };
        Ok(Self {
            cq: NonNull::new(cq).ok_or_else(io::Error::last_os_error)?,
            channel,
        })
    }

    /// Can be read when there is an event.
    pub(in crate::rdma) fn fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the channel is open for as long as the queue.
        let fd = unsafe { self.channel.channel.as_ref() }.fd;
        // SAFETY: the descriptor is the channel's, and open as long as that.
        unsafe { BorrowedFd::borrow_raw(fd) }
    }

    /// Waits for an event, takes it, and acknowledges it; `ibv_get_cq_event(3)`.
    pub(in crate::rdma) fn take_event(&self) -> io::Result<()> {
        let (mut cq, mut data) = (ptr::null_mut(), ptr::null_mut());
        let channel = self.channel.channel.as_ptr();
        // SAFETY: the channel is open, and both places are written to.
        if unsafe { ffi::ibv_get_cq_event(channel, &raw mut cq, &raw mut data) } != 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: one event of the queue was taken; no other queue has this channel.
        unsafe { ffi::ibv_ack_cq_events(self.cq.as_ptr(), 1) };
        Ok(())
    }

    /// Asks for an event with the next completion; `ibv_req_notify_cq(3)`.
    pub(in crate::rdma) fn request_notification(&self) -> io::Result<()> {
        // SAFETY: the queue is open, and so is its context.
        let request = unsafe { (*self.cq.as_ref().context).ops.req_notify_cq };
        let request = request.ok_or(io::ErrorKind::Unsupported)?;
        // SAFETY: the provider's own function, on its own queue.
        super::check(unsafe { request(self.cq.as_ptr(), 0) })
    }

    /// Takes completions, as many as there are and have room; `ibv_poll_cq(3)`.
    pub(in crate::rdma) fn poll<'a>(
        &self,
        completions: &'a mut [ffi::ibv_wc],
    ) -> io::Result<&'a [ffi::ibv_wc]> {
        // SAFETY: the queue is open, and so is its context.
        let poll = unsafe { (*self.cq.as_ref().context).ops.poll_cq };
        let poll = poll.ok_or(io::ErrorKind::Unsupported)?;
        let room = i32::try_from(completions.len()).unwrap_or(i32::MAX);
        // SAFETY: the provider's own function, on its own queue; it writes `room` completions
        // at most.
        let count = unsafe { poll(self.cq.as_ptr(), room, completions.as_mut_ptr()) };
        let count = usize::try_from(count).map_err(|_| io::Error::other("ibv_poll_cq failed"))?;
        Ok(completions.get(..count).unwrap_or(completions))
    }
}

impl Drop for CompletionQueue {
    fn drop(&mut self) {
        // SAFETY: queue pairs hold the queues that they complete in, so none is left; all
        // events were acknowledged when they were taken.
        report("ibv_destroy_cq", unsafe {
            ffi::ibv_destroy_cq(self.cq.as_ptr())
        });
    }
}

impl Drop for CompletionChannel {
    fn drop(&mut self) {
        // SAFETY: the queue that had it was destroyed before: fields are dropped after what
        // they are in.
        report("ibv_destroy_comp_channel", unsafe {
            ffi::ibv_destroy_comp_channel(self.channel.as_ptr())
        });
    }
}
