//! Registrations of memory, and windows on them.

use std::io;
use std::mem::ManuallyDrop;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::Arc;

use ibverbs_sys as ffi;

use super::{ProtectionDomain, check, report};
use crate::rdma::region::Memory;

/// A part of memory that the device may use; `ibv_reg_mr(3)`.
///
/// Its addresses, for this end as for others, are places in the whole memory: byte 0 of that
/// has address 0. It gives others no access: that is what windows are for.
#[derive(Debug)]
pub(in crate::rdma) struct MemoryRegion {
    mr: NonNull<ffi::ibv_mr>,
    range: Range<u64>,
    domain: Arc<ProtectionDomain>,
    /// Alive for as long as it is registered.
    memory: ManuallyDrop<Arc<dyn Memory>>,
}

// SAFETY: as for `Context`; `Memory` is both.
unsafe impl Send for MemoryRegion {}
// SAFETY: as for `Context`; `Memory` is both.
unsafe impl Sync for MemoryRegion {}

impl MemoryRegion {
    /// Registers the bytes of `range`.
    pub(in crate::rdma) fn register(
        domain: &Arc<ProtectionDomain>,
        memory: Arc<dyn Memory>,
        range: Range<u64>,
    ) -> io::Result<Self> {
        let place = usize::try_from(range.start).map_err(|_| io::ErrorKind::InvalidInput)?;
        let end = usize::try_from(range.end).map_err(|_| io::ErrorKind::InvalidInput)?;
        let length = end.checked_sub(place).filter(|_| end <= memory.len());
        let length = length.ok_or(io::ErrorKind::InvalidInput)?;
        // SAFETY: `place` is within the memory.
        let start = unsafe { memory.start().add(place) };
        let access = ffi::ibv_access_flags::IBV_ACCESS_LOCAL_WRITE
            | ffi::ibv_access_flags::IBV_ACCESS_MW_BIND;
        let access = i32::try_from(access.0).map_err(|_| io::ErrorKind::InvalidInput)?;
        let pd = domain.pd.as_ptr();
        // SAFETY: by the contract of `Memory`, the range stays mapped while `memory` lives,
        // which this value sees to until it is no longer registered.
        let mr =
            unsafe { ffi::ibv_reg_mr_iova(pd, start.as_ptr().cast(), length, range.start, access) };
        Ok(Self {
            mr: NonNull::new(mr).ok_or_else(io::Error::last_os_error)?,
            range,
            domain: Arc::clone(domain),
            memory: ManuallyDrop::new(memory),
        })
    }

    /// Which bytes of the memory it is.
    pub(in crate::rdma) fn range(&self) -> Range<u64> {
        self.range.clone()
    }

    /// Where it is registered.
    pub(in crate::rdma) fn domain(&self) -> &Arc<ProtectionDomain> {
        &self.domain
    }

    pub(super) fn as_ptr(&self) -> *mut ffi::ibv_mr {
        self.mr.as_ptr()
    }

    /// With which this end's requests name it.
    pub(super) fn local_key(&self) -> u32 {
        // SAFETY: the registration is there for as long as this value.
        unsafe { self.mr.as_ref() }.lkey
    }
}

impl Drop for MemoryRegion {
    fn drop(&mut self) {
        // SAFETY: windows on it and requests that name it hold it, so none is left.
        let freed = check(unsafe { ffi::ibv_dereg_mr(self.mr.as_ptr()) });
        match freed {
            // SAFETY: dropped here and nowhere else.
            Ok(()) => unsafe { ManuallyDrop::drop(&mut self.memory) },
            // The device may still use the memory, so that is never given back.
            Err(error) => tracing::error!(%error, "registered memory leaks"),
        }
    }
}

/// A window on a region, of type 2: once a queue pair has bound it, its key opens some bytes
/// of the region, for that queue pair's peer and nobody else; `ibv_alloc_mw(3)`.
#[derive(Debug)]
pub(in crate::rdma) struct MemoryWindow {
    pub(super) mw: NonNull<ffi::ibv_mw>,
    _domain: Arc<ProtectionDomain>,
}

// SAFETY: as for `Context`.
unsafe impl Send for MemoryWindow {}
// SAFETY: as for `Context`; only the owner of a window binds it.
unsafe impl Sync for MemoryWindow {}

impl MemoryWindow {
    pub(in crate::rdma) fn new(domain: &Arc<ProtectionDomain>) -> io::Result<Self> {
        // SAFETY: the domain is there, and so is its context.
        let allocate = unsafe { (*domain.pd.as_ref().context).ops.alloc_mw };
        let allocate = allocate.ok_or(io::ErrorKind::Unsupported)?;
        // SAFETY: the provider's own function, on its own domain.
        let mw = unsafe { allocate(domain.pd.as_ptr(), ffi::IBV_MW_TYPE_2) };
        Ok(Self {
            mw: NonNull::new(mw).ok_or_else(io::Error::last_os_error)?,
            _domain: Arc::clone(domain),
        })
    }

    /// With which others name it while it is bound.
    pub(in crate::rdma) fn remote_key(&self) -> u32 {
        // SAFETY: the window is there for as long as this value.
        unsafe { self.mw.as_ref() }.rkey
    }
}

impl Drop for MemoryWindow {
    fn drop(&mut self) {
        // SAFETY: the window is there, and so is its context.
        let free = unsafe { (*self.mw.as_ref().context).ops.dealloc_mw };
        let Some(free) = free else { return };
        // SAFETY: the provider's own function, on its own window, once. A window may be freed
        // while it is bound: then its key opens nothing any more.
        report("ibv_dealloc_mw", unsafe { free(self.mw.as_ptr()) });
    }
}
