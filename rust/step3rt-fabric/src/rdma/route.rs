//! The way to a peer's queue pairs, and the states that a queue pair goes through to get there.
//!
//! Values only; `wire` hands them to the device.

use std::ffi::{c_int, c_uint};

use crate::rdma::layout::{self, AddressHandle, GidBytes, GlobalRoute, QueuePairAttributes};
use crate::rdma::timing::{ACK_TIMEOUT_CODE, RETRY_COUNT, RNR_RETRY_COUNT};

/// 0.01 ms, the shortest: no receiver is ever late, see [`RNR_RETRY_COUNT`].
const MIN_RNR_TIMER_CODE: u8 = 1;

/// Longer than any path; RoCE v2 packets are routed by IP.
const HOP_LIMIT: u8 = 64;

/// Where the peer's port is, and how packets get there.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Route {
    pub(crate) port: u8,
    pub(crate) gid_index: u8,
    pub(crate) mtu_code: u8,
    pub(crate) remote_gid: [u8; 16],
    /// Within one InfiniBand subnet packets go by it, and not by the GID.
    pub(crate) remote_lid: Option<u16>,
    pub(crate) local_psn: u32,
    pub(crate) remote_psn: u32,
}

pub(crate) const INIT_MASK: c_int =
    layout::QP_STATE | layout::QP_PKEY_INDEX | layout::QP_PORT | layout::QP_ACCESS_FLAGS;
pub(crate) const RECEIVE_MASK: c_int = layout::QP_STATE
    | layout::QP_AV
    | layout::QP_PATH_MTU
    | layout::QP_DEST_QPN
    | layout::QP_RQ_PSN
    | layout::QP_MAX_DEST_RD_ATOMIC
    | layout::QP_MIN_RNR_TIMER;
pub(crate) const SEND_MASK: c_int = layout::QP_STATE
    | layout::QP_TIMEOUT
    | layout::QP_RETRY_CNT
    | layout::QP_RNR_RETRY
    | layout::QP_SQ_PSN
    | layout::QP_MAX_QP_RD_ATOMIC;

impl Route {
    /// Attributes of a queue pair that may be written to once it is connected.
    pub(crate) fn to_init(self) -> QueuePairAttributes {
        QueuePairAttributes {
            qp_state: layout::QPS_INIT,
            port_num: self.port,
            qp_access_flags: layout::ACCESS_REMOTE_WRITE as c_uint,
            ..QueuePairAttributes::default()
        }
    }

    /// Attributes of one that takes packets of the peer's queue pair `remote_number`.
    pub(crate) fn to_receive(self, remote_number: u32) -> QueuePairAttributes {
        QueuePairAttributes {
            qp_state: layout::QPS_RTR,
            path_mtu: self.mtu_code.into(),
            dest_qp_num: remote_number,
            rq_psn: self.remote_psn,
            max_dest_rd_atomic: 0,
            min_rnr_timer: MIN_RNR_TIMER_CODE,
            ah_attr: AddressHandle {
                grh: GlobalRoute {
                    dgid: GidBytes(self.remote_gid),
                    sgid_index: self.gid_index,
                    hop_limit: HOP_LIMIT,
                    ..GlobalRoute::default()
                },
                dlid: self.remote_lid.unwrap_or(0),
                is_global: u8::from(self.remote_lid.is_none()),
                port_num: self.port,
                ..AddressHandle::default()
            },
            ..QueuePairAttributes::default()
        }
    }

    /// Attributes of one that sends.
    pub(crate) fn to_send(self) -> QueuePairAttributes {
        QueuePairAttributes {
            qp_state: layout::QPS_RTS,
            sq_psn: self.local_psn,
            timeout: ACK_TIMEOUT_CODE,
            retry_cnt: RETRY_COUNT,
            rnr_retry: RNR_RETRY_COUNT,
            max_rd_atomic: 0,
            ..QueuePairAttributes::default()
        }
    }
}
