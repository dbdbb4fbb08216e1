//! Whether RDMA can be used here and with a peer, in words, with what to do about it.
//!
//! The same in a build without the backend; nothing here finds anything out.

use std::io;

use thiserror::Error;

use crate::refusal::HandshakeError;

/// Why RDMA cannot be used.
#[derive(Debug, Error)]
pub enum RdmaError {
    /// A build without the backend.
    #[error("this build has no RDMA. Build it with the cargo feature `rdma`")]
    NotBuilt,
    /// Asked for, but never offered.
    #[error("this end does not offer RDMA: by its setting, or for want of a device. See its log")]
    NotOffered,
    /// Nothing in `/sys/class/infiniband`.
    #[error(
        "this host has no RDMA device. Load the driver of its adapter, and give a container \
         /sys/class/infiniband and /dev/infiniband"
    )]
    NoDevice,
    /// Devices, but no packet would pass.
    #[error(
        "no port is active with an address: {0}. Bring its link up, and give its interface an IP \
         address (RoCE) or its subnet a manager (InfiniBand)"
    )]
    NoActivePort(String),
    /// A device, but not the library.
    #[error(
        "libibverbs cannot be loaded: {0}. Install libibverbs1 and ibverbs-providers (rdma-core)"
    )]
    NoLibrary(String),
    /// The library does not know the device.
    #[error(
        "libibverbs finds no driver for {0}. Install ibverbs-providers (rdma-core), and give a \
         container /dev/infiniband"
    )]
    NoDriver(String),
    /// The ends have no network in common.
    #[error(
        "the other end is on {0}, and no active port of this one is. Give both ends' interfaces \
         addresses of one kind"
    )]
    NoCommonNetwork(String),
    /// The slots cannot be locked in memory.
    #[error(
        "slots of {len_bytes} bytes cannot be registered: {error}. Set LimitMEMLOCK=infinity in the \
         unit, or `ulimit -l unlimited`"
    )]
    Memlock {
        /// Of one direction.
        len_bytes: usize,
        /// Of the operating system.
        error: io::Error,
    },
    /// A call failed.
    #[error("{device}: {during}: {error}. See the kernel's log, and `step3rt doctor`")]
    Call {
        /// Which device.
        device: String,
        /// What was being done.
        during: &'static str,
        /// Of the operating system.
        error: io::Error,
    },
    /// The handshake came through and the first packet did not.
    #[error(
        "no packet came through by {path}: {why}. See that both ends' RDMA ports are on one network; \
         `data_host` chooses the port"
    )]
    NoPath {
        /// This end's port and address.
        path: String,
        /// What the device reported.
        why: &'static str,
    },
    /// What the other end told of its queue pairs makes no sense.
    #[error("the other end's offer of queue pairs is wrong: {0}. Run one release everywhere")]
    Offer(#[from] HandshakeError),
    /// No descriptors, memory or threads.
    #[error("the link cannot be made: {0}. Raise the limit of memory, descriptors or threads")]
    System(#[from] io::Error),
}

/// One thing about this host that decides whether RDMA can be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RdmaFinding {
    /// Whether it is as it must be.
    pub is_good: bool,
    /// What it is.
    pub found: String,
    /// What to do; empty when nothing is.
    pub fix: String,
}

#[cfg(feature = "rdma")]
impl RdmaFinding {
    pub(crate) fn good(found: String) -> Self {
        let (is_good, fix) = (true, String::new());
        Self {
            is_good,
            found,
            fix,
        }
    }

    pub(crate) fn lacking(found: String, fix: &str) -> Self {
        Self {
            is_good: false,
            found,
            fix: fix.to_owned(),
        }
    }
}

/// What this host can do over RDMA, found by trying; in the order in which to put it right.
pub fn rdma_findings() -> Vec<RdmaFinding> {
    crate::rdma::report()
}
