//! Why nothing came of a connection to this end: in words for its log, in a code for the other end.
//!
//! It never says more to a stranger than the code.

use std::io;

use thiserror::Error;

use crate::handshake::RefusalCode;
use crate::memory::MapError;
use crate::opening::Unopened;
use crate::rdma_status::RdmaError;
use crate::refusal::HandshakeError;
use crate::tls::{self, Fault};

/// Why nothing came of a connection.
#[derive(Debug, Error)]
pub(crate) enum AcceptError {
    #[error("its hello is wrong: {0}")]
    Hello(#[from] HandshakeError),
    #[error("it hung up before it was answered")]
    GaveUp,
    #[error("its memory is wrong: {0}")]
    Memory(#[from] MapError),
    #[error("it was refused: {0:?}")]
    Refused(RefusalCode),
    #[error("it cannot be linked by RDMA: {0}")]
    Rdma(#[from] RdmaError),
    #[error("its TLS handshake failed: {0}")]
    Tls(Fault),
    #[error(
        "it speaks plain tcp, and this end has certificates. Give it `tls_cert`, `tls_key` and \
         `tls_ca`, too, or give them to neither"
    )]
    NotTls,
    #[error(
        "it speaks TLS, and this end has no certificate. Give this instance `tls_cert`, `tls_key` \
         and `tls_ca`, too, or give them to neither"
    )]
    UnexpectedTls,
    #[error("{0}")]
    System(io::Error),
}

impl From<io::Error> for AcceptError {
    fn from(error: io::Error) -> Self {
        match tls::fault_of(&error) {
            Some(fault) => Self::Tls(fault),
            None => Self::System(error),
        }
    }
}

impl From<Unopened> for AcceptError {
    fn from(unopened: Unopened) -> Self {
        match unopened {
            Unopened::Closed => HandshakeError::Size(0).into(),
            Unopened::UnexpectedTls => Self::UnexpectedTls,
            Unopened::System(error) => error.into(),
        }
    }
}

impl AcceptError {
    /// What the connecting end is told, if there is something to tell.
    pub(crate) fn refusal(&self) -> Option<RefusalCode> {
        match self {
            Self::Hello(HandshakeError::Version(_)) => Some(RefusalCode::Version),
            Self::Refused(code) => Some(*code),
            Self::Rdma(_) => Some(RefusalCode::NoRdma),
            Self::System(_) => Some(RefusalCode::Resources),
            Self::NotTls => Some(RefusalCode::NeedsTls),
            Self::UnexpectedTls => Some(RefusalCode::NoTls),
            Self::Hello(_) | Self::GaveUp | Self::Memory(_) | Self::Tls(_) => None,
        }
    }
}
