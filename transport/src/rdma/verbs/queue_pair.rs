//! Queue pairs of the reliable connected service, and what they are asked to do.

use std::io;
use std::ops::Range;
use std::ptr::{self, NonNull};
use std::sync::Arc;

use ffi::ibv_qp_attr_mask as Mask;
use ibverbs_sys as ffi;

use super::{CompletionQueue, MemoryRegion, MemoryWindow, PORT, ProtectionDomain, check, report};
use crate::rdma::endpoint::Endpoint;

/// A queue pair; `ibv_create_qp(3)`.
#[derive(Debug)]
pub(in crate::rdma) struct QueuePair {
    qp: NonNull<ffi::ibv_qp>,
    _domain: Arc<ProtectionDomain>,
    _completions: Arc<CompletionQueue>,
}

// SAFETY: as for `Context`.
unsafe impl Send for QueuePair {}
// SAFETY: as for `Context`.
unsafe impl Sync for QueuePair {}

/// What a connection is made of besides the peer's [`Endpoint`].
#[derive(Clone, Copy, Debug)]
pub(in crate::rdma) struct Connect {
    /// Our entry in the table of GIDs.
    pub(in crate::rdma) gid_index: u8,
    /// As `enum ibv_mtu` counts.
    pub(in crate::rdma) mtu: u8,
    /// Our first packet sequence number.
    pub(in crate::rdma) psn: u32,
    /// Reads of ours that may be outstanding.
    pub(in crate::rdma) initiator_depth: u8,
    /// Reads of the peer that are answered at once.
    pub(in crate::rdma) responder_resources: u8,
    /// An acknowledgement may take 4.096 µs · 2^this.
    pub(in crate::rdma) timeout: u8,
    /// Times that a packet is sent again.
    pub(in crate::rdma) retries: u8,
}

/// What a queue pair may be asked to do.
#[derive(Debug)]
pub(in crate::rdma) enum Request<'a> {
    /// One-sided: `range` of the region is filled with as many of the peer's bytes.
    Read {
        into: &'a MemoryRegion,
        range: Range<u64>,
        key: u32,
        from: u64,
    },
    /// The peer may read `range` of the region, with the key that the window has from then on.
    Bind {
        window: &'a mut MemoryWindow,
        region: &'a MemoryRegion,
        range: Range<u64>,
    },
    /// The peer may no longer.
    Invalidate { window: &'a MemoryWindow },
}

impl QueuePair {
    /// A queue pair in state RESET, with room for `depth` requests.
    pub(in crate::rdma) fn new(
        domain: &Arc<ProtectionDomain>,
        completions: &Arc<CompletionQueue>,
        depth: u32,
    ) -> io::Result<Self> {
        let cq = completions.cq.as_ptr();
        let mut attributes = ffi::ibv_qp_init_attr {
            send_cq: cq,
            recv_cq: cq,
            qp_type: ffi::ibv_qp_type::IBV_QPT_RC,
            ..Default::default()
        };
        attributes.cap.max_send_wr = depth;
        attributes.cap.max_send_sge = 1;
        // Nothing is received, but providers differ on whether a queue may have no room.
        attributes.cap.max_recv_wr = 1;
        attributes.cap.max_recv_sge = 1;
        // SAFETY: domain and completion queue are there, of one context, and kept.
        let qp = unsafe { ffi::ibv_create_qp(domain.pd.as_ptr(), &raw mut attributes) };
        Ok(Self {
            qp: NonNull::new(qp).ok_or_else(io::Error::last_os_error)?,
            _domain: Arc::clone(domain),
            _completions: Arc::clone(completions),
        })
    }

    /// Its number.
    pub(in crate::rdma) fn number(&self) -> u32 {
        // SAFETY: the queue pair is there for as long as this value.
        unsafe { self.qp.as_ref() }.qp_num
    }

    /// RESET to INIT. Its peer may read what windows open, and nothing else.
    pub(in crate::rdma) fn initialise(&self) -> io::Result<()> {
        let attributes = ffi::ibv_qp_attr {
            qp_state: ffi::ibv_qp_state::IBV_QPS_INIT,
            port_num: PORT,
            qp_access_flags: ffi::ibv_access_flags::IBV_ACCESS_REMOTE_READ.0,
            ..Default::default()
        };
        self.modify(
            attributes,
            Mask::IBV_QP_STATE
                | Mask::IBV_QP_PKEY_INDEX
                | Mask::IBV_QP_PORT
                | Mask::IBV_QP_ACCESS_FLAGS,
        )
    }

    /// INIT over RTR to RTS.
    pub(in crate::rdma) fn connect(&self, with: Connect, peer: &Endpoint) -> io::Result<()> {
        let mut attributes = ffi::ibv_qp_attr {
            qp_state: ffi::ibv_qp_state::IBV_QPS_RTR,
            path_mtu: with.mtu.into(),
            dest_qp_num: peer.queue_pair,
            rq_psn: peer.psn,
            max_dest_rd_atomic: with.responder_resources,
            // 0.64 ms. Only sends need receivers that are ready, and there are none.
            min_rnr_timer: 12,
            ..Default::default()
        };
        let path = &mut attributes.ah_attr;
        path.port_num = PORT;
        path.dlid = peer.lid;
        path.is_global = 1;
        path.grh.dgid.raw = peer.gid;
        path.grh.sgid_index = with.gid_index;
        path.grh.hop_limit = u8::MAX;
        self.modify(
            attributes,
            Mask::IBV_QP_STATE
                | Mask::IBV_QP_AV
                | Mask::IBV_QP_PATH_MTU
                | Mask::IBV_QP_DEST_QPN
                | Mask::IBV_QP_RQ_PSN
                | Mask::IBV_QP_MAX_DEST_RD_ATOMIC
                | Mask::IBV_QP_MIN_RNR_TIMER,
        )?;
        let attributes = ffi::ibv_qp_attr {
            qp_state: ffi::ibv_qp_state::IBV_QPS_RTS,
            sq_psn: with.psn,
            timeout: with.timeout,
            retry_cnt: with.retries,
            rnr_retry: with.retries,
            max_rd_atomic: with.initiator_depth,
            ..Default::default()
        };
        self.modify(
            attributes,
            Mask::IBV_QP_STATE
                | Mask::IBV_QP_SQ_PSN
                | Mask::IBV_QP_TIMEOUT
                | Mask::IBV_QP_RETRY_CNT
                | Mask::IBV_QP_RNR_RETRY
                | Mask::IBV_QP_MAX_QP_RD_ATOMIC,
        )
    }

    /// To ERR: the peer is not answered any more, and what was asked for is flushed.
    pub(in crate::rdma) fn stop(&self) -> io::Result<()> {
        let attributes = ffi::ibv_qp_attr {
            qp_state: ffi::ibv_qp_state::IBV_QPS_ERR,
            ..Default::default()
        };
        self.modify(attributes, Mask::IBV_QP_STATE)
    }

    /// `ibv_modify_qp(3)`.
    fn modify(&self, mut attributes: ffi::ibv_qp_attr, mask: Mask) -> io::Result<()> {
        let mask = i32::try_from(mask.0).map_err(|_| io::ErrorKind::InvalidInput)?;
        // SAFETY: the queue pair is there, and the attributes live through the call.
        check(unsafe { ffi::ibv_modify_qp(self.qp.as_ptr(), &raw mut attributes, mask) })
    }

    /// Asks for something; `ibv_post_send(3)`. A completion with `id` says that it is done.
    ///
    /// # Safety
    /// Until that completion was taken or the queue pair is destroyed, regions and windows that
    /// the request names live, and of a read nobody uses the bytes of `range`.
    pub(in crate::rdma) unsafe fn post(&self, id: u64, request: Request<'_>) -> io::Result<()> {
        let mut entry = ffi::ibv_sge::default();
        let mut work = ffi::ibv_send_wr {
            wr_id: id,
            send_flags: ffi::ibv_send_flags::IBV_SEND_SIGNALED.0,
            ..Default::default()
        };
        let mut bound = None;
        match request {
            Request::Read {
                into,
                range,
                key,
                from,
            } => {
                let whole = into.range();
                let length = range.end.checked_sub(range.start);
                let length =
                    length.filter(|_| whole.start <= range.start && range.end <= whole.end);
                entry.addr = range.start;
                entry.length = length
                    .and_then(|length| u32::try_from(length).ok())
                    .ok_or(io::ErrorKind::InvalidInput)?;
                entry.lkey = into.local_key();
                work.opcode = ffi::ibv_wr_opcode::IBV_WR_RDMA_READ;
                work.sg_list = &raw mut entry;
                work.num_sge = 1;
                work.wr.rdma.remote_addr = from;
                work.wr.rdma.rkey = key;
            }
            Request::Bind {
                window,
                region,
                range,
            } => {
                let key = next_key(window.remote_key());
                work.opcode = ffi::ibv_wr_opcode::IBV_WR_BIND_MW;
                work.__bindgen_anon_2.bind_mw = ffi::ibv_send_wr__bindgen_ty_4__bindgen_ty_1 {
                    mw: window.mw.as_ptr(),
                    rkey: key,
                    bind_info: ffi::ibv_mw_bind_info {
                        mr: region.as_ptr(),
                        addr: range.start,
                        length: range.end.saturating_sub(range.start),
                        mw_access_flags: ffi::ibv_access_flags::IBV_ACCESS_REMOTE_READ.0,
                    },
                };
                bound = Some((window, key));
            }
            Request::Invalidate { window } => {
                work.opcode = ffi::ibv_wr_opcode::IBV_WR_LOCAL_INV;
                work.__bindgen_anon_1.invalidate_rkey = window.remote_key();
            }
        }
        let mut failed = ptr::null_mut();
        // SAFETY: the queue pair is there, and so is its context.
        let post = unsafe { (*self.qp.as_ref().context).ops.post_send };
        let post = post.ok_or(io::ErrorKind::Unsupported)?;
        // SAFETY: the provider's own function, on its own queue pair; it copies the request
        // before it returns. That the memory behind it stays is the caller's promise.
        check(unsafe { post(self.qp.as_ptr(), &raw mut work, &raw mut failed) })?;
        if let Some((window, key)) = bound {
            // SAFETY: the window is there, and `&mut` keeps others out. Providers look here
            // for the key that it was bound with last.
            unsafe { window.mw.as_mut() }.rkey = key;
        }
        Ok(())
    }
}

impl Drop for QueuePair {
    fn drop(&mut self) {
        // SAFETY: the queue pair is there, and destroyed once.
        report("ibv_destroy_qp", unsafe {
            ffi::ibv_destroy_qp(self.qp.as_ptr())
        });
    }
}

/// A window's key at its next binding: its last byte is the owner's to choose, and has to be
/// another one every time (InfiniBand specification, volume 1, 10.6.7.2.2).
fn next_key(key: u32) -> u32 {
    (key & !0xff) | (key.wrapping_add(1) & 0xff)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_keeps_its_index_and_changes() {
        assert_eq!(next_key(0x1234_5600), 0x1234_5601);
        assert_eq!(next_key(0x1234_56ff), 0x1234_5600);
    }
}
