//! What an endpoint is set to, and binding its listeners.
//!
//! Validated once, when the endpoint is bound; nothing here talks to a peer.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::time::Duration;

use thiserror::Error;

use crate::address::{DataAddress, FabricChoice, FabricKind};
use crate::choice::DeviceError;
use crate::contract::{Geometry, GeometryError, LinkIdentity, Side};
use crate::rdma_status::RdmaError;
use crate::shm;
use crate::watcher::Listeners;

/// What an endpoint is and where it listens.
#[derive(Clone, Debug)]
pub struct EndpointConfig {
    /// Who this process is.
    pub identity: LinkIdentity,
    /// Attention instances initiate and connect; FFN instances respond and listen.
    pub side: Side,
    /// Must be equal at both ends of every link.
    pub geometry: Geometry,
    /// Which fabrics [`crate::endpoint::Endpoint::connect`] may use.
    pub fabric: FabricChoice,
    /// Whether to accept links over shared memory.
    pub listen_shm: bool,
    /// Where to accept links over TCP, and the control connections of those over RDMA where `fabric`
    /// allows them; port 0 lets the system choose. None: nowhere.
    pub listen_tcp: Option<SocketAddr>,
    /// The host name or address that peers use for `listen_tcp`. Needed when that is a wildcard.
    pub advertise_host: Option<String>,
    /// What every link and the doorbell are set to.
    pub settings: LinkSettings,
}

/// Settings of links, with sound defaults.
#[derive(Clone, Copy, Debug)]
pub struct LinkSettings {
    /// Longest busy wait before the doorbell sleeps, at most 50; 0 when the ranks of this host
    /// outnumber its cores, where spinning costs milliseconds instead of saving microseconds.
    pub spin_us: u32,
    /// How long connecting, and accepting, may take.
    pub handshake_timeout: Duration,
    /// How long a TCP peer's host may be silent, or leave untaken what was sent, before the link is
    /// down. Its resolution is a second; what must be noticed sooner needs a deadline at the waiter.
    /// RDMA has shorter times of its own and takes this one for its own device's.
    pub peer_timeout: Duration,
    /// Whether pushes carry a CRC-32 of their payload, for debugging.
    pub payload_checksum: bool,
    /// Most peers linked at once.
    pub max_peers: usize,
}

impl Default for LinkSettings {
    fn default() -> Self {
        Self {
            spin_us: 50,
            handshake_timeout: Duration::from_secs(3),
            peer_timeout: Duration::from_secs(3),
            payload_checksum: false,
            max_peers: 256,
        }
    }
}

/// Why an endpoint could not be made.
#[derive(Debug, Error)]
pub enum BindError {
    /// Sizes that no link can have.
    #[error(transparent)]
    Geometry(#[from] GeometryError),
    /// The TCP address is taken, or not of this host.
    #[error("cannot listen on {address}: {error}. Choose another `listen_tcp`, or port 0")]
    Tcp {
        /// As configured.
        address: SocketAddr,
        /// Of the operating system.
        error: io::Error,
    },
    /// The TCP address is a wildcard, which no peer can connect to.
    #[error(
        "peers cannot connect to {0}. Set `advertise_host` to a name that they know this host by"
    )]
    NoHost(SocketAddr),
    /// The Unix socket cannot be made.
    #[error("cannot listen for shared memory: {0}")]
    Shm(io::Error),
    /// The setting asks for RDMA, which cannot be used here.
    #[error("fabric \"rdma\" cannot be used: {0}. Or set `fabric` to \"auto\"")]
    Rdma(#[from] RdmaError),
    /// The setting asks for device memory, and there is none.
    #[error("fabric \"cuda_ipc\" cannot be used: {0}")]
    Device(DeviceError),
    /// No descriptors, memory or threads.
    #[error("cannot make the endpoint: {0}")]
    System(#[from] io::Error),
}

impl EndpointConfig {
    /// Binds the listeners; returns them with the addresses that peers are told.
    pub(crate) fn listen(
        &self,
        has_rdma: bool,
    ) -> Result<(Listeners, Vec<DataAddress>), BindError> {
        let mut listeners = Listeners {
            shm: None,
            tcp: None,
        };
        let mut addresses = Vec::new();
        let mut publish = |fabric: FabricKind, address| {
            addresses.push(DataAddress {
                fabric: fabric.as_str().to_owned(),
                address,
            });
        };
        if self.listen_shm {
            let (socket, address) = shm::listen().map_err(BindError::Shm)?;
            listeners.shm = Some(socket);
            publish(FabricKind::Shm, address);
        }
        if let Some(address) = self.listen_tcp {
            let bound = TcpListener::bind(address)
                .and_then(|listener| listener.set_nonblocking(true).map(|()| listener))
                .and_then(|listener| Ok((listener.local_addr()?, listener)));
            let (bound, listener) = bound.map_err(|error| BindError::Tcp { address, error })?;
            listeners.tcp = Some(listener);
            let address = advertised(self.advertise_host.as_deref(), bound)?;
            if has_rdma {
                publish(FabricKind::Rdma, address.clone());
            }
            if self.fabric != FabricChoice::Rdma {
                publish(FabricKind::Tcp, address);
            }
        }
        Ok((listeners, addresses))
    }
}

/// The address that peers are told, as `host:port`.
fn advertised(host: Option<&str>, bound: SocketAddr) -> Result<String, BindError> {
    match host {
        None if bound.ip().is_unspecified() => Err(BindError::NoHost(bound)),
        None => Ok(bound.to_string()),
        // A bare IPv6 address.
        Some(host) if host.contains(':') && !host.starts_with('[') => {
            Ok(format!("[{host}]:{}", bound.port()))
        }
        Some(host) => Ok(format!("{host}:{}", bound.port())),
    }
}
