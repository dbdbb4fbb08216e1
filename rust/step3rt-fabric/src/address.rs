//! Where an instance can be reached, and by which fabric two instances talk.
//!
//! Pure decisions; nothing here opens a socket.

use std::fmt;
use std::io;
use std::str::FromStr;

use thiserror::Error;

use crate::contract::LinkIdentity;

/// What carries a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FabricKind {
    /// Slots in memory shared by two processes of one host.
    Shm,
    /// Frames over TCP.
    Tcp,
    /// The seeded simulation, in one process.
    Sim,
}

impl FabricKind {
    /// The name that people and messages use.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Shm => "shm",
            Self::Tcp => "tcp",
            Self::Sim => "sim",
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

/// Identifies the running kernel: two processes that read the same value run on one host (or in
/// containers of one host).
pub fn boot_id() -> io::Result<String> {
    let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    Ok(text.trim().to_owned())
}
