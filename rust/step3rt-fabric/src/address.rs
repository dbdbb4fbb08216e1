//! Where an instance can be reached, and by which fabric two instances talk.
//!
//! Pure decisions; nothing here opens a socket.

use std::fmt;
use std::io;
use std::str::FromStr;

use thiserror::Error;

use crate::contract::LinkIdentity;

/// What can carry a link that is connected and accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FabricKind {
    /// Slots in memory shared by two processes of one host.
    Shm,
    /// Frames over TCP.
    Tcp,
    /// Slots that the peer's device writes.
    Rdma,
    /// Slots in the devices' memory, which no fabric of this crate moves; shm or TCP carries the
    /// handshake and the liveness of the link.
    CudaIpc,
}

impl FabricKind {
    /// The name that people and messages use.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Shm => "shm",
            Self::Tcp => "tcp",
            Self::Rdma => "rdma",
            Self::CudaIpc => "cuda_ipc",
        }
    }
}

impl fmt::Display for FabricKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// One way to reach an instance.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DataAddress {
    /// `"shm"`, `"rdma"`, `"tcp"` or `"cuda_ipc"`. A name that this build does not know is passed over,
    /// not an error: a newer peer may offer more.
    pub fabric: String,
    /// shm: the abstract Unix socket's name after an `@`; tcp: `host:port`; rdma: the same, of the
    /// control connection; `cuda_ipc`: nothing, as it is linked at one of the others' addresses.
    pub address: String,
}

/// All that is needed to link to an instance.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerAddress {
    /// Who must answer there; another instance or epoch is refused.
    pub identity: LinkIdentity,
    /// The peer host's boot id, see [`boot_id`].
    pub boot_id: String,
    /// The peer's [`crate::endpoint::Endpoint::addresses`].
    pub addresses: Vec<DataAddress>,
}

impl PeerAddress {
    /// The first address of `fabric`.
    pub(crate) fn address_of(&self, fabric: FabricKind) -> Option<&str> {
        let found = self
            .addresses
            .iter()
            .find(|a| a.fabric == fabric.as_str())?;
        Some(&found.address)
    }
}

/// The setting `fabric`: which fabrics a connection may use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum FabricChoice {
    /// Within a host device memory where both ends offer it, otherwise shared memory; between hosts RDMA
    /// where both ends have it, otherwise TCP.
    #[default]
    Auto,
    /// Only shared memory.
    Shm,
    /// Only TCP.
    Tcp,
    /// Only RDMA, also within a host.
    Rdma,
    /// Only device memory.
    CudaIpc,
}

/// A `fabric` setting that is none of its values.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("fabric {0:?} is not known. It is \"auto\", \"cuda_ipc\", \"shm\", \"rdma\" or \"tcp\"")]
pub struct UnknownFabric(pub String);

impl FromStr for FabricChoice {
    type Err = UnknownFabric;

    fn from_str(text: &str) -> Result<Self, UnknownFabric> {
        match text {
            "auto" => Ok(Self::Auto),
            "shm" => Ok(Self::Shm),
            "tcp" => Ok(Self::Tcp),
            "rdma" => Ok(Self::Rdma),
            "cuda_ipc" => Ok(Self::CudaIpc),
            other => Err(UnknownFabric(other.to_owned())),
        }
    }
}

/// Why a link has the fabric that it has. The connecting end decides and tells the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChoiceReason {
    /// Both ends run on one host.
    SameHost,
    /// They do not.
    DifferentHosts,
    /// One host, but the peer does not listen for shared memory.
    ShmNotOffered,
    /// One host, but the peer's socket is out of reach, as between two containers.
    ShmUnreachable,
    /// The setting says so.
    Setting,
    /// Different hosts, and both ends have an RDMA device.
    RdmaAtBothEnds,
    /// Shared memory cannot be had, and both ends have an RDMA device.
    RdmaWithinHost,
    /// Different hosts, and the accepting end does not offer RDMA.
    RdmaNotOffered,
    /// Both ends have an RDMA device, but no link came about over them.
    RdmaFailed,
    /// Both ends run on one host and offer device memory.
    DeviceMemory,
}

impl ChoiceReason {
    pub(crate) const ALL: [Self; 10] = [
        Self::SameHost,
        Self::DifferentHosts,
        Self::ShmNotOffered,
        Self::ShmUnreachable,
        Self::Setting,
        Self::RdmaAtBothEnds,
        Self::RdmaWithinHost,
        Self::RdmaNotOffered,
        Self::RdmaFailed,
        Self::DeviceMemory,
    ];

    pub(crate) fn code(self) -> u32 {
        self as u32
    }

    pub(crate) fn from_code(code: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|reason| reason.code() == code)
    }
}

impl fmt::Display for ChoiceReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::SameHost => "both ends run on one host",
            Self::DifferentHosts => "the ends run on different hosts",
            Self::ShmNotOffered => "one host, but the peer does not offer shm",
            Self::ShmUnreachable => "one host, but the peer's shm socket is out of reach",
            Self::Setting => "chosen by the `fabric` setting",
            Self::RdmaAtBothEnds => "the ends run on different hosts, both with RDMA",
            Self::RdmaWithinHost => "one host, but no shared memory, and both ends have RDMA",
            Self::RdmaNotOffered => "the ends run on different hosts, and only one has RDMA",
            Self::RdmaFailed => "both ends have RDMA, but cannot be linked by it",
            Self::DeviceMemory => "both ends run on one host and offer device memory",
        })
    }
}

/// The fabrics other than `cuda_ipc` to try, in order, each with the reason that holds if it succeeds.
/// A later one is tried only when the one before is out of reach.
///
/// Within a host shared memory comes before RDMA: a slot that both ends map moves no byte, while a
/// device would read and write each payload once.
pub(crate) fn candidates(
    choice: FabricChoice,
    local_boot_id: &str,
    has_rdma: bool,
    peer: &PeerAddress,
) -> Vec<(FabricKind, ChoiceReason)> {
    let is_same_host = is_same_host(local_boot_id, peer);
    let offers_rdma = peer.address_of(FabricKind::Rdma).is_some();
    let offers_shm = peer.address_of(FabricKind::Shm).is_some();
    let without_shm = if offers_shm {
        ChoiceReason::ShmUnreachable
    } else {
        ChoiceReason::ShmNotOffered
    };
    let (rdma, tcp) = match (is_same_host, has_rdma && offers_rdma) {
        (true, true) => (Some(ChoiceReason::RdmaWithinHost), ChoiceReason::RdmaFailed),
        (false, true) => (Some(ChoiceReason::RdmaAtBothEnds), ChoiceReason::RdmaFailed),
        (true, false) => (None, without_shm),
        (false, false) if has_rdma || offers_rdma => (None, ChoiceReason::RdmaNotOffered),
        (false, false) => (None, ChoiceReason::DifferentHosts),
    };
    match choice {
        FabricChoice::Shm => vec![(FabricKind::Shm, ChoiceReason::Setting)],
        FabricChoice::Tcp => vec![(FabricKind::Tcp, ChoiceReason::Setting)],
        FabricChoice::Rdma => vec![(FabricKind::Rdma, ChoiceReason::Setting)],
        FabricChoice::CudaIpc => Vec::new(),
        FabricChoice::Auto => {
            let shm = (is_same_host && offers_shm).then_some(ChoiceReason::SameHost);
            let all = [(FabricKind::Shm, shm), (FabricKind::Rdma, rdma)];
            let possible = all
                .into_iter()
                .filter_map(|(kind, reason)| Some((kind, reason?)));
            possible.chain([(FabricKind::Tcp, tcp)]).collect()
        }
    }
}

/// Whether a peer runs on this end's host. Unknown hosts are different ones.
pub(crate) fn is_same_host(local_boot_id: &str, peer: &PeerAddress) -> bool {
    !local_boot_id.is_empty() && local_boot_id == peer.boot_id
}

/// Identifies the running kernel: two processes that read the same value run on one host (or in
/// containers of one host).
pub fn boot_id() -> io::Result<String> {
    let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    Ok(text.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use step3rt_core::ids::{Epoch, InstanceId};

    use super::*;

    fn peer(boot_id: &str, fabrics: &[&str]) -> PeerAddress {
        let address = |fabric: &&str| DataAddress {
            fabric: (*fabric).to_owned(),
            address: format!("there by {fabric}"),
        };
        PeerAddress {
            identity: LinkIdentity {
                instance: InstanceId(1),
                epoch: Epoch(1),
            },
            boot_id: boot_id.to_owned(),
            addresses: fabrics.iter().map(address).collect(),
        }
    }

    #[test]
    fn one_host_takes_shm_and_keeps_tcp_in_reserve() {
        let peer = peer("b", &["pigeon", "rdma", "shm", "tcp"]);
        let shm = (FabricKind::Shm, ChoiceReason::SameHost);
        assert_eq!(
            candidates(FabricChoice::Auto, "b", false, &peer),
            [shm, (FabricKind::Tcp, ChoiceReason::ShmUnreachable)]
        );
        let rdma = (FabricKind::Rdma, ChoiceReason::RdmaWithinHost);
        assert_eq!(
            candidates(FabricChoice::Auto, "b", true, &peer),
            [shm, rdma, (FabricKind::Tcp, ChoiceReason::RdmaFailed)]
        );
    }

    #[test]
    fn different_or_unknown_hosts_take_tcp() {
        for (local, theirs) in [("b", "c"), ("", "")] {
            let peer = peer(theirs, &["shm", "tcp"]);
            let found = candidates(FabricChoice::Auto, local, false, &peer);
            assert_eq!(found, [(FabricKind::Tcp, ChoiceReason::DifferentHosts)]);
        }
    }

    #[test]
    fn different_hosts_take_rdma_where_both_have_it() {
        let found = |has_rdma, fabrics: &[&str]| {
            candidates(FabricChoice::Auto, "b", has_rdma, &peer("c", fabrics))
        };
        assert_eq!(
            found(true, &["shm", "rdma", "tcp"]),
            [
                (FabricKind::Rdma, ChoiceReason::RdmaAtBothEnds),
                (FabricKind::Tcp, ChoiceReason::RdmaFailed)
            ]
        );
        let tcp = [(FabricKind::Tcp, ChoiceReason::RdmaNotOffered)];
        assert_eq!(found(true, &["shm", "tcp"]), tcp);
        assert_eq!(found(false, &["shm", "rdma", "tcp"]), tcp);
    }

    #[test]
    fn a_peer_without_shm_is_reached_by_tcp() {
        let found = candidates(FabricChoice::Auto, "b", false, &peer("b", &["tcp"]));
        assert_eq!(found, [(FabricKind::Tcp, ChoiceReason::ShmNotOffered)]);
    }

    #[test]
    fn the_setting_overrides_and_has_five_values() {
        let peer = peer("c", &["shm", "tcp"]);
        for fabric in [FabricKind::Shm, FabricKind::Tcp, FabricKind::Rdma] {
            let choice = fabric.as_str().parse().unwrap();
            assert_eq!(
                candidates(choice, "b", false, &peer),
                [(fabric, ChoiceReason::Setting)]
            );
        }
        assert_eq!("auto".parse(), Ok(FabricChoice::Auto));
        let by_device = "cuda_ipc".parse().unwrap();
        assert_eq!(by_device, FabricChoice::CudaIpc);
        assert_eq!(candidates(by_device, "b", true, &peer), []);
        let error = "pigeon".parse::<FabricChoice>().unwrap_err();
        assert_eq!(
            error.to_string(),
            r#"fabric "pigeon" is not known. It is "auto", "cuda_ipc", "shm", "rdma" or "tcp""#
        );
    }
}
