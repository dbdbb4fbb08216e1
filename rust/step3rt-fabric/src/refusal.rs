//! Why a handshake fails, in types and in words.
//!
//! Only codes travel; the words are made by the end that shows them.

use step3rt_core::ids::Epoch;
use thiserror::Error;

use crate::contract::{Geometry, LinkIdentity, Side};
use crate::handshake::{Introduction, MESSAGE_BYTES, RefusalCode, VERSION};
use crate::link_epoch::MAX_LINK_EPOCH;

/// Why the peer refused a link.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum Refusal {
    /// It speaks another version of the protocol.
    #[error("it speaks protocol version {0}, this end {VERSION}. Run one release everywhere")]
    Version(u16),
    /// Somebody else listens there.
    #[error(
        "instance {} of epoch {} answered where instance {} of epoch {} was expected. The address \
         is out of date; wait for the next topology",
        .found.instance, .found.epoch, .wanted.instance, .wanted.epoch
    )]
    NotMe {
        /// Whom the address was published for.
        wanted: LinkIdentity,
        /// Who listens there.
        found: LinkIdentity,
    },
    /// Two initiators, or two responders.
    #[error("both ends are {0:?}s. A link has one of each")]
    SameSide(Side),
    /// The two ends were given different sizes.
    #[error("its slots are {theirs}, ours {ours}. Both ends must have the same settings")]
    Geometry {
        /// The peer's.
        theirs: Geometry,
        /// This end's.
        ours: Geometry,
    },
    /// It has seen a later incarnation of this instance.
    #[error("it knows this instance with epoch {known}, later than {offered}. Register again")]
    Stale {
        /// This end's.
        offered: Epoch,
        /// What the peer has seen.
        known: Epoch,
    },
    /// It has as many links as it may have.
    #[error("it has no room for another peer. Raise its `max_peers`")]
    Full,
    /// It could not make the slots.
    #[error("it has no memory, threads or descriptors for another link. See its log")]
    Resources,
    /// It cannot link by RDMA.
    #[error("it cannot be linked by RDMA. See its log, and `step3rt doctor` on its host")]
    NoRdma,
    /// It was given certificates, and this end was not.
    #[error(
        "it accepts only TLS, and this end has no certificate. Give this instance `tls_cert`, \
         `tls_key` and `tls_ca` of the cluster, too, or give them to neither"
    )]
    NeedsTls,
    /// This end was given certificates, and it was not.
    #[error(
        "it does not speak TLS, and this end was given certificates. Give the peer `tls_cert`, \
         `tls_key` and `tls_ca` of the cluster, too, or give them to neither"
    )]
    NoTls,
    /// It offers no device memory, or the fabric it is set to keeps it from that.
    #[error(
        "it offers no device memory. Give it a device with `--device`, or set `fabric` to \"auto\""
    )]
    NoDeviceOffer,
    /// Its process has no number left for a link.
    #[error(
        "it has no number left for a link: links are told apart by {MAX_LINK_EPOCH} numbers, which are used \
         up. Start all instances anew"
    )]
    NoEpoch,
    /// This process proposed a number far above those that the peer has used.
    #[error(
        "it has made far fewer links than this end, which numbers them too high: taking that number \
         would leave it few others. Start this instance anew"
    )]
    FarEpoch,
}

/// Why bytes are not a handshake message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum HandshakeError {
    /// Somebody else's protocol.
    #[error("it starts with {0:#010x}, which is not this protocol")]
    Magic(u32),
    /// Another version.
    #[error("it has version {0}, not {VERSION}")]
    Version(u16),
    /// Damaged.
    #[error("its checksum does not fit its bytes")]
    Checksum,
    /// A value that nobody sends.
    #[error("its field `{field}` holds {value}")]
    Field {
        /// The field's name.
        field: &'static str,
        /// Its value.
        value: u64,
    },
    /// Not the size of a message.
    #[error("it has {0} bytes, not {MESSAGE_BYTES} and what it says that follows")]
    Size(usize),
    /// What follows a hello as text is none.
    #[error("its reason is not text")]
    Text,
    /// Not what comes at this point.
    #[error("a {0} came where it does not belong")]
    Unexpected(&'static str),
    /// Over a Unix socket, a hello and a welcome carry two descriptors: slots and doorbell.
    #[error("it came with {0} file descriptors")]
    Descriptors(usize),
}

impl Introduction {
    /// What a refusal by `from` means to this end.
    pub(crate) fn explain(&self, from: &Self, wanted: LinkIdentity, code: RefusalCode) -> Refusal {
        match code {
            RefusalCode::Version => Refusal::Version(VERSION),
            RefusalCode::NotMe => Refusal::NotMe {
                wanted,
                found: from.identity,
            },
            RefusalCode::SameSide => Refusal::SameSide(self.side),
            RefusalCode::Geometry => Refusal::Geometry {
                theirs: from.geometry,
                ours: self.geometry,
            },
            RefusalCode::Stale(known) => Refusal::Stale {
                offered: self.identity.epoch,
                known,
            },
            RefusalCode::Full => Refusal::Full,
            RefusalCode::Resources => Refusal::Resources,
            RefusalCode::NoRdma => Refusal::NoRdma,
            RefusalCode::NeedsTls => Refusal::NeedsTls,
            RefusalCode::NoTls => Refusal::NoTls,
            RefusalCode::NoDeviceOffer => Refusal::NoDeviceOffer,
            RefusalCode::NoEpoch => Refusal::NoEpoch,
            RefusalCode::FarEpoch => Refusal::FarEpoch,
        }
    }
}
