//! The part of the verbs ABI that this crate uses, as libibverbs lays it out in memory.
//!
//! Types and numbers only: nothing here calls anything. Posting and polling are inline functions of
//! the C header that go through a table of pointers in the context, so their structures are fixed
//! for the life of `libibverbs.so.1`. What the assertions below say was printed by a C program with
//! `offsetof` (rdma-core 44, x86-64); every 64-bit Linux has the same.

use std::ffi::{c_int, c_uint, c_void};
use std::mem::{offset_of, size_of};

/// A device, known by pointer only.
#[repr(C)]
pub(crate) struct Device {
    opaque: [u8; 0],
}

/// An allocated protection domain, known by pointer only.
#[repr(C)]
pub(crate) struct ProtectionDomain {
    opaque: [u8; 0],
}

/// An open device; the tail is the library's own.
#[repr(C)]
pub(crate) struct Context {
    pub(crate) device: *mut Device,
    pub(crate) ops: ContextOps,
}

/// The driver's functions. Those that have an exported entry point are not called through here.
#[repr(C)]
pub(crate) struct ContextOps {
    unused_0: [*const c_void; 11],
    pub(crate) poll_cq:
        Option<unsafe extern "C" fn(*mut CompletionQueue, c_int, *mut Completion) -> c_int>,
    pub(crate) req_notify_cq: Option<unsafe extern "C" fn(*mut CompletionQueue, c_int) -> c_int>,
    unused_1: [*const c_void; 12],
    pub(crate) post_send: Option<
        unsafe extern "C" fn(*mut QueuePair, *mut SendRequest, *mut *mut SendRequest) -> c_int,
    >,
    pub(crate) post_recv: Option<
        unsafe extern "C" fn(
            *mut QueuePair,
            *mut ReceiveRequest,
            *mut *mut ReceiveRequest,
        ) -> c_int,
    >,
    unused_2: [*const c_void; 5],
}

/// The head of a completion queue.
#[repr(C)]
pub(crate) struct CompletionQueue {
    pub(crate) context: *mut Context,
}

/// The head of a completion channel.
#[repr(C)]
pub(crate) struct CompletionChannel {
    pub(crate) context: *mut Context,
    pub(crate) fd: c_int,
}

/// The head of a queue pair.
#[repr(C)]
pub(crate) struct QueuePair {
    pub(crate) context: *mut Context,
    unused: [*mut c_void; 5],
    handle: u32,
    pub(crate) qp_num: u32,
}

/// A registered range of memory.
#[repr(C)]
pub(crate) struct MemoryRegion {
    pub(crate) context: *mut Context,
    pub(crate) pd: *mut ProtectionDomain,
    pub(crate) addr: *mut c_void,
    pub(crate) length: usize,
    handle: u32,
    pub(crate) lkey: u32,
    pub(crate) rkey: u32,
}

/// How deep the queues of a queue pair are.
#[repr(C)]
#[derive(Clone, Copy, Default)]
#[expect(
    clippy::struct_field_names,
    reason = "the names of the C structure, as everywhere here"
)]
pub(crate) struct QueueDepths {
    pub(crate) max_send_wr: u32,
    pub(crate) max_recv_wr: u32,
    pub(crate) max_send_sge: u32,
    pub(crate) max_recv_sge: u32,
    pub(crate) max_inline_data: u32,
}

/// What a queue pair is created with.
#[repr(C)]
pub(crate) struct QueuePairInit {
    pub(crate) qp_context: *mut c_void,
    pub(crate) send_cq: *mut CompletionQueue,
    pub(crate) recv_cq: *mut CompletionQueue,
    pub(crate) srq: *mut c_void,
    pub(crate) cap: QueueDepths,
    pub(crate) qp_type: c_uint,
    pub(crate) sq_sig_all: c_int,
}

/// The global part of an address.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(crate) struct GlobalRoute {
    pub(crate) dgid: GidBytes,
    pub(crate) flow_label: u32,
    pub(crate) sgid_index: u8,
    pub(crate) hop_limit: u8,
    pub(crate) traffic_class: u8,
}

/// A GID, aligned as the union of the header is.
#[repr(C, align(8))]
#[derive(Clone, Copy, Default)]
pub(crate) struct GidBytes(pub(crate) [u8; 16]);

/// Where a queue pair's peer is.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(crate) struct AddressHandle {
    pub(crate) grh: GlobalRoute,
    pub(crate) dlid: u16,
    pub(crate) sl: u8,
    pub(crate) src_path_bits: u8,
    pub(crate) static_rate: u8,
    pub(crate) is_global: u8,
    pub(crate) port_num: u8,
}

/// What a queue pair is changed to; a mask says which fields count.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(crate) struct QueuePairAttributes {
    pub(crate) qp_state: c_uint,
    pub(crate) cur_qp_state: c_uint,
    pub(crate) path_mtu: c_uint,
    pub(crate) path_mig_state: c_uint,
    pub(crate) qkey: u32,
    pub(crate) rq_psn: u32,
    pub(crate) sq_psn: u32,
    pub(crate) dest_qp_num: u32,
    pub(crate) qp_access_flags: c_uint,
    pub(crate) cap: QueueDepths,
    pub(crate) ah_attr: AddressHandle,
    pub(crate) alt_ah_attr: AddressHandle,
    pub(crate) pkey_index: u16,
    pub(crate) alt_pkey_index: u16,
    pub(crate) en_sqd_async_notify: u8,
    pub(crate) sq_draining: u8,
    pub(crate) max_rd_atomic: u8,
    pub(crate) max_dest_rd_atomic: u8,
    pub(crate) min_rnr_timer: u8,
    pub(crate) port_num: u8,
    pub(crate) timeout: u8,
    pub(crate) retry_cnt: u8,
    pub(crate) rnr_retry: u8,
    pub(crate) alt_port_num: u8,
    pub(crate) alt_timeout: u8,
    pub(crate) rate_limit: u32,
}

/// One range of local memory.
#[repr(C)]
pub(crate) struct ScatterGather {
    pub(crate) addr: u64,
    pub(crate) length: u32,
    pub(crate) lkey: u32,
}

/// A send, seen as an RDMA write; the other members of the unions are smaller than `unused`.
#[repr(C)]
pub(crate) struct SendRequest {
    pub(crate) wr_id: u64,
    pub(crate) next: *mut SendRequest,
    pub(crate) sg_list: *mut ScatterGather,
    pub(crate) num_sge: c_int,
    pub(crate) opcode: c_uint,
    pub(crate) send_flags: c_uint,
    /// Big-endian.
    pub(crate) imm_data: u32,
    pub(crate) remote_addr: u64,
    pub(crate) rkey: u32,
    pub(crate) unused: [u64; 9],
}

/// A receive.
#[repr(C)]
pub(crate) struct ReceiveRequest {
    pub(crate) wr_id: u64,
    pub(crate) next: *mut ReceiveRequest,
    pub(crate) sg_list: *mut ScatterGather,
    pub(crate) num_sge: c_int,
}

/// What a finished request reports.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(crate) struct Completion {
    pub(crate) wr_id: u64,
    pub(crate) status: c_uint,
    pub(crate) opcode: c_uint,
    pub(crate) vendor_err: u32,
    pub(crate) byte_len: u32,
    /// Big-endian.
    pub(crate) imm_data: u32,
    pub(crate) qp_num: u32,
    pub(crate) src_qp: u32,
    pub(crate) wc_flags: c_uint,
    pub(crate) pkey_index: u16,
    pub(crate) slid: u16,
    pub(crate) sl: u8,
    pub(crate) dlid_path_bits: u8,
}

/// What a port is, of a library of any age: newer ones fill the tail too.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(crate) struct PortAttributes {
    pub(crate) state: c_uint,
    pub(crate) max_mtu: c_uint,
    pub(crate) active_mtu: c_uint,
    pub(crate) gid_tbl_len: c_int,
    pub(crate) port_cap_flags: u32,
    pub(crate) max_msg_sz: u32,
    pub(crate) bad_pkey_cntr: u32,
    pub(crate) qkey_viol_cntr: u32,
    pub(crate) pkey_tbl_len: u16,
    pub(crate) lid: u16,
    pub(crate) tail: [u64; 4],
}

pub(crate) const QPT_RC: c_uint = 2;
pub(crate) const QPS_INIT: c_uint = 1;
pub(crate) const QPS_RTR: c_uint = 2;
pub(crate) const QPS_RTS: c_uint = 3;
pub(crate) const QPS_ERR: c_uint = 6;

pub(crate) const QP_STATE: c_int = 1;
pub(crate) const QP_ACCESS_FLAGS: c_int = 1 << 3;
pub(crate) const QP_PKEY_INDEX: c_int = 1 << 4;
pub(crate) const QP_PORT: c_int = 1 << 5;
pub(crate) const QP_AV: c_int = 1 << 7;
pub(crate) const QP_PATH_MTU: c_int = 1 << 8;
pub(crate) const QP_TIMEOUT: c_int = 1 << 9;
pub(crate) const QP_RETRY_CNT: c_int = 1 << 10;
pub(crate) const QP_RNR_RETRY: c_int = 1 << 11;
pub(crate) const QP_RQ_PSN: c_int = 1 << 12;
pub(crate) const QP_MAX_QP_RD_ATOMIC: c_int = 1 << 13;
pub(crate) const QP_MIN_RNR_TIMER: c_int = 1 << 15;
pub(crate) const QP_SQ_PSN: c_int = 1 << 16;
pub(crate) const QP_MAX_DEST_RD_ATOMIC: c_int = 1 << 17;
pub(crate) const QP_DEST_QPN: c_int = 1 << 20;

pub(crate) const ACCESS_LOCAL_WRITE: c_int = 1;
pub(crate) const ACCESS_REMOTE_WRITE: c_int = 2;

pub(crate) const WR_RDMA_WRITE: c_uint = 0;
pub(crate) const WR_RDMA_WRITE_WITH_IMM: c_uint = 1;
pub(crate) const SEND_SIGNALED: c_uint = 2;

pub(crate) const WC_SUCCESS: c_uint = 0;
pub(crate) const WC_WR_FLUSH_ERR: c_uint = 5;
pub(crate) const WC_REM_ACCESS_ERR: c_uint = 10;
pub(crate) const WC_RETRY_EXC_ERR: c_uint = 12;
pub(crate) const WC_RNR_RETRY_EXC_ERR: c_uint = 13;
pub(crate) const WC_RECV_RDMA_WITH_IMM: c_uint = 129;

#[cfg(target_pointer_width = "64")]
const _: () = {
    assert!(offset_of!(Context, ops) == 8 && size_of::<ContextOps>() == 256);
    assert!(offset_of!(ContextOps, poll_cq) == 88 && offset_of!(ContextOps, req_notify_cq) == 96);
    assert!(offset_of!(ContextOps, post_send) == 200 && offset_of!(ContextOps, post_recv) == 208);
    assert!(offset_of!(CompletionChannel, fd) == 8 && offset_of!(QueuePair, qp_num) == 52);
    assert!(offset_of!(MemoryRegion, lkey) == 36 && size_of::<MemoryRegion>() == 48);
    assert!(offset_of!(QueuePairInit, cap) == 32 && size_of::<QueuePairInit>() == 64);
    assert!(offset_of!(QueuePairAttributes, cap) == 36);
    assert!(offset_of!(QueuePairAttributes, ah_attr) == 56);
    assert!(offset_of!(QueuePairAttributes, pkey_index) == 120);
    assert!(offset_of!(QueuePairAttributes, rate_limit) == 136);
    assert!(size_of::<QueuePairAttributes>() == 144 && size_of::<AddressHandle>() == 32);
    assert!(offset_of!(SendRequest, remote_addr) == 40 && size_of::<SendRequest>() == 128);
    assert!(size_of::<ReceiveRequest>() == 32 && size_of::<ScatterGather>() == 16);
    assert!(offset_of!(Completion, qp_num) == 28 && size_of::<Completion>() == 48);
    assert!(offset_of!(PortAttributes, lid) == 34 && size_of::<PortAttributes>() >= 52);
};
