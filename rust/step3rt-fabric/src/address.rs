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
}

impl FabricKind {
    /// The name that people and messages use.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Shm => "shm",
            Self::Tcp => "tcp",
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
    /// `"shm"` or `"tcp"`. A name that this build does not know is passed over, not an error: a
    /// newer peer may offer more.
    pub fabric: String,
    /// shm: the abstract Unix socket's name after an `@`; tcp: `host:port`.
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
    /// Shared memory within a host, TCP otherwise.
    #[default]
    Auto,
    /// Only shared memory.
    Shm,
    /// Only TCP.
    Tcp,
}

/// A `fabric` setting that is none of its values.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("fabric {0:?} is not known. It is \"auto\", \"shm\" or \"tcp\"")]
pub struct UnknownFabric(pub String);

impl FromStr for FabricChoice {
    type Err = UnknownFabric;

    fn from_str(text: &str) -> Result<Self, UnknownFabric> {
        match text {
            "auto" => Ok(Self::Auto),
            "shm" => Ok(Self::Shm),
            "tcp" => Ok(Self::Tcp),
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
}

impl ChoiceReason {
    pub(crate) const ALL: [Self; 5] = [
        Self::SameHost,
        Self::DifferentHosts,
        Self::ShmNotOffered,
        Self::ShmUnreachable,
        Self::Setting,
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
        })
    }
}

/// The fabrics to try, in order, each with the reason that holds if it succeeds. A later one is
/// tried only when the one before is out of reach.
pub(crate) fn candidates(
    choice: FabricChoice,
    local_boot_id: &str,
    peer: &PeerAddress,
) -> Vec<(FabricKind, ChoiceReason)> {
    let is_same_host = !local_boot_id.is_empty() && local_boot_id == peer.boot_id;
    match choice {
        FabricChoice::Shm => vec![(FabricKind::Shm, ChoiceReason::Setting)],
        FabricChoice::Tcp => vec![(FabricKind::Tcp, ChoiceReason::Setting)],
        FabricChoice::Auto if !is_same_host => {
            vec![(FabricKind::Tcp, ChoiceReason::DifferentHosts)]
        }
        FabricChoice::Auto if peer.address_of(FabricKind::Shm).is_none() => {
            vec![(FabricKind::Tcp, ChoiceReason::ShmNotOffered)]
        }
        FabricChoice::Auto => vec![
            (FabricKind::Shm, ChoiceReason::SameHost),
            (FabricKind::Tcp, ChoiceReason::ShmUnreachable),
        ],
    }
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
        let found = candidates(FabricChoice::Auto, "b", &peer("b", &["rdma", "shm", "tcp"]));
        let shm = (FabricKind::Shm, ChoiceReason::SameHost);
        assert_eq!(
            found,
            [shm, (FabricKind::Tcp, ChoiceReason::ShmUnreachable)]
        );
    }

    #[test]
    fn different_or_unknown_hosts_take_tcp() {
        for (local, theirs) in [("b", "c"), ("", "")] {
            let found = candidates(FabricChoice::Auto, local, &peer(theirs, &["shm", "tcp"]));
            assert_eq!(found, [(FabricKind::Tcp, ChoiceReason::DifferentHosts)]);
        }
    }

    #[test]
    fn a_peer_without_shm_is_reached_by_tcp() {
        let found = candidates(FabricChoice::Auto, "b", &peer("b", &["tcp"]));
        assert_eq!(found, [(FabricKind::Tcp, ChoiceReason::ShmNotOffered)]);
    }

    #[test]
    fn the_setting_overrides_and_has_three_values() {
        let peer = peer("c", &["shm", "tcp"]);
        for (text, fabric) in [("shm", FabricKind::Shm), ("tcp", FabricKind::Tcp)] {
            let choice = text.parse().unwrap();
            assert_eq!(
                candidates(choice, "b", &peer),
                [(fabric, ChoiceReason::Setting)]
            );
        }
        assert_eq!("auto".parse(), Ok(FabricChoice::Auto));
        let error = "rdma".parse::<FabricChoice>().unwrap_err();
        assert_eq!(
            error.to_string(),
            r#"fabric "rdma" is not known. It is "auto", "shm" or "tcp""#
        );
    }
}
