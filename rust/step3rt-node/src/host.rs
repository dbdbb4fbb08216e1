//! Finds out what this host's fabrics can do, by trying. Leaves nothing behind.

use std::net::{Ipv4Addr, SocketAddr};

use rustix::process::{Resource, getrlimit};
use step3rt_core::ids::{Epoch, InstanceId};
use step3rt_fabric::address::FabricChoice;
use step3rt_fabric::contract::{Geometry, LinkIdentity, Side};
use step3rt_fabric::endpoint::{BindError, Endpoint, EndpointConfig, LinkSettings};

/// Descriptors that an instance needs besides its links: standard streams, the session, listeners,
/// files of the checkpoint.
const BASE_DESCRIPTORS: u64 = 64;

/// Descriptors of one link over shared memory: socket, two memories, two doorbells.
const DESCRIPTORS_PER_LINK: u64 = 5;

/// Links of a large instance; fewer descriptors than these need are worth a warning.
const MANY_LINKS: u64 = 64;

/// One thing that this host can do or cannot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Capability {
    /// `"shm"`, `"tcp"` or `"limits"`.
    pub name: &'static str,
    /// Whether an instance can use it as it is.
    pub is_usable: bool,
    /// Why, or why not and what to do.
    pub reason: String,
}

/// What this host's fabrics can do.
pub fn capabilities() -> Vec<Capability> {
    let loopback = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    vec![
        capability(
            "shm",
            "tensors lie in memory shared within this host",
            bind(true, None),
        ),
        capability(
            "tcp",
            "frames over TCP to any host",
            bind(false, Some(loopback)),
        ),
        limits(),
    ]
}

fn capability(name: &'static str, good: &str, tried: Result<Endpoint, BindError>) -> Capability {
    match tried {
        Ok(_) => Capability {
            name,
            is_usable: true,
            reason: good.to_owned(),
        },
        Err(error) => Capability {
            name,
            is_usable: false,
            reason: error.to_string(),
        },
    }
}

/// An endpoint that nobody will ever link to.
fn bind(listen_shm: bool, listen_tcp: Option<SocketAddr>) -> Result<Endpoint, BindError> {
    Endpoint::bind(EndpointConfig {
        identity: LinkIdentity {
            instance: InstanceId(0),
            epoch: Epoch(0),
        },
        side: Side::Responder,
        geometry: Geometry {
            num_lanes: 1,
            a2f_slot_bytes: 1,
            f2a_slot_bytes: 1,
        },
        fabric: FabricChoice::Auto,
        listen_shm,
        listen_tcp,
        advertise_host: None,
        settings: LinkSettings::default(),
    })
}

fn limits() -> Capability {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let needed = BASE_DESCRIPTORS + MANY_LINKS * DESCRIPTORS_PER_LINK;
    let (is_usable, descriptors) = match getrlimit(Resource::Nofile).current {
        Some(limit) if limit < needed => (
            false,
            format!(
                "{limit} open files; {MANY_LINKS} links over shared memory need {needed}. Raise \
                 `ulimit -n`, or LimitNOFILE in the unit"
            ),
        ),
        Some(limit) => (true, format!("{limit} open files")),
        None => (true, "open files without limit".to_owned()),
    };
    Capability {
        name: "limits",
        is_usable,
        reason: format!("{cores} cores for this process, {descriptors}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_linux_host_can_do_shared_memory_and_tcp() {
        let found = capabilities();
        let names: Vec<_> = found.iter().map(|c| (c.name, c.is_usable)).collect();
        assert_eq!(
            names,
            [("shm", true), ("tcp", true), ("limits", true)],
            "{found:?}"
        );
    }

    #[test]
    fn what_cannot_be_bound_is_not_usable_and_says_why() {
        // TEST-NET-1 is no address of any host.
        let foreign = SocketAddr::from((Ipv4Addr::new(192, 0, 2, 1), 0));
        let found = capability("tcp", "fine", bind(false, Some(foreign)));
        assert!(!found.is_usable);
        assert!(found.reason.contains("192.0.2.1"), "{}", found.reason);
    }
}
