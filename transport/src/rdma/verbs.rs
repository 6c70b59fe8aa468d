//! The verbs that are used, each called in one place.
//!
//! What is here has the names of libibverbs, owns what it stands for, and keeps alive what
//! that depends on: a completion queue its context, a registration its memory, a queue pair
//! its protection domain and completion queue. So everything is destroyed after what was made
//! of it, as the verbs demand (`ibv_dealloc_pd(3)`, `ibv_destroy_cq(3)`), whatever the order in
//! which handles are dropped. libibverbs is thread-safe, so all of it is `Send` and `Sync`.

mod completion;
mod memory;
mod queue_pair;

use std::ffi::CStr;
use std::io;
use std::ptr::NonNull;
use std::sync::Arc;

use ibverbs_sys as ffi;

pub(super) use completion::CompletionQueue;
pub(super) use ffi::ibv_wc_status as status;
pub(super) use memory::{MemoryRegion, MemoryWindow};
pub(super) use queue_pair::{Connect, QueuePair, Request};

/// The only port that is used: adapters of today show each of their ports as a device.
const PORT: u8 = 1;

/// An open device; `ibv_open_device(3)`.
#[derive(Debug)]
pub(super) struct Context(NonNull<ffi::ibv_context>);

// SAFETY: a context is no thread's own, and the verbs take it from any thread.
unsafe impl Send for Context {}
// SAFETY: as above; libibverbs locks what it changes.
unsafe impl Sync for Context {}

impl Context {
    /// Opens the device of that name; `None` if there is none.
    pub(super) fn open(name: &CStr) -> io::Result<Option<Self>> {
        let mut count = 0;
        // SAFETY: `count` is written to. The list is freed below.
        let list = unsafe { ffi::ibv_get_device_list(&raw mut count) };
        let list = NonNull::new(list).ok_or_else(io::Error::last_os_error)?;
        let count = usize::try_from(count).unwrap_or(0);
        // SAFETY: the list has `count` devices, which live as long as it does.
        let devices = unsafe { std::slice::from_raw_parts(list.as_ptr(), count) };
        let device = devices.iter().copied().find(|&device| {
            // SAFETY: the device lives, and so does its name, a C string.
            let of = unsafe { ffi::ibv_get_device_name(device) };
            // SAFETY: as above; null is checked for first.
            !of.is_null() && unsafe { CStr::from_ptr(of) } == name
        });
        let opened = device.map(|device| {
            // SAFETY: the device lives until the list is freed.
            let context = unsafe { ffi::ibv_open_device(device) };
            NonNull::new(context).ok_or_else(io::Error::last_os_error)
        });
        // SAFETY: the list came from `ibv_get_device_list` and is not used from here on.
        unsafe { ffi::ibv_free_device_list(list.as_ptr()) };
        Ok(opened.transpose()?.map(Self))
    }

    /// What the device can do; `ibv_query_device(3)`.
    pub(super) fn query_device(&self) -> io::Result<ffi::ibv_device_attr> {
        let mut attributes = ffi::ibv_device_attr::default();
        // SAFETY: the context is open, and the attributes are written to.
        check(unsafe { ffi::ibv_query_device(self.0.as_ptr(), &raw mut attributes) })?;
        Ok(attributes)
    }

    /// How the port is; `ibv_query_port(3)`.
    pub(super) fn query_port(&self) -> io::Result<ffi::ibv_port_attr> {
        let mut attributes = ffi::ibv_port_attr::default();
        let place = (&raw mut attributes).cast();
        // SAFETY: the context is open. The exported function, as opposed to the macro of that
        // name, writes the first fields only; the others stay zero, which is valid for them.
        check(unsafe { ffi::ibv_query_port(self.0.as_ptr(), PORT, place) })?;
        Ok(attributes)
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: whatever was made of the context held it, so nothing of that is left.
        report("ibv_close_device", unsafe {
            ffi::ibv_close_device(self.0.as_ptr())
        });
    }
}

/// What may be used together; `ibv_alloc_pd(3)`.
#[derive(Debug)]
pub(super) struct ProtectionDomain {
    pd: NonNull<ffi::ibv_pd>,
    _context: Arc<Context>,
}

// SAFETY: as for `Context`.
unsafe impl Send for ProtectionDomain {}
// SAFETY: as for `Context`.
unsafe impl Sync for ProtectionDomain {}

impl ProtectionDomain {
    pub(super) fn new(context: &Arc<Context>) -> io::Result<Self> {
        // SAFETY: the context is open.
        let pd = unsafe { ffi::ibv_alloc_pd(context.0.as_ptr()) };
        Ok(Self {
            pd: NonNull::new(pd).ok_or_else(io::Error::last_os_error)?,
            _context: Arc::clone(context),
        })
    }
}

impl Drop for ProtectionDomain {
    fn drop(&mut self) {
        // SAFETY: whatever was made in the domain held it, so nothing of that is left.
        report("ibv_dealloc_pd", unsafe {
            ffi::ibv_dealloc_pd(self.pd.as_ptr())
        });
    }
}

/// What the verbs return: 0, or the number of an error.
fn check(returned: i32) -> io::Result<()> {
    match returned {
        0 => Ok(()),
        error => Err(io::Error::from_raw_os_error(error)),
    }
}

/// Says that something was not destroyed. What it depends on leaks with it, in the kernel.
fn report(verb: &'static str, returned: i32) {
    if let Err(error) = check(returned) {
        tracing::error!(verb, %error, "a resource of the RDMA device leaks");
    }
}
