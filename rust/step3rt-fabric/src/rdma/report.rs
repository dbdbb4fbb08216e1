//! What this host can do over RDMA, found by trying, for people.
//!
//! It changes nothing, and leaves nothing open.

use std::path::Path;

use rustix::process::{Resource, getrlimit};

use crate::rdma::gid::{self, Port};
use crate::rdma::library::{OpenDevice, verbs};
use crate::rdma_status::RdmaFinding;

/// A lane of 2048 BF16 tokens has 28 MiB each way; a limit below one such link is worth a word.
const MIN_MEMLOCK_BYTES: u64 = 64 << 20;

/// Every finding, in the order in which they must be put right.
pub(crate) fn report() -> Vec<RdmaFinding> {
    let ports = gid::ports(Path::new(gid::SYSFS));
    if ports.is_empty() {
        return vec![RdmaFinding::lacking(
            "no RDMA device; peers on other hosts are reached over TCP".to_owned(),
            "if the host has an adapter: load its driver, and give a container \
             /sys/class/infiniband and /dev/infiniband",
        )];
    }
    let mut findings = vec![library()];
    findings.extend(ports.iter().map(port));
    let mut devices: Vec<&str> = ports.iter().map(|port| port.device.as_str()).collect();
    devices.dedup();
    if verbs().is_ok() {
        findings.extend(devices.into_iter().filter_map(device));
    }
    findings.extend(memlock());
    findings
}

fn library() -> RdmaFinding {
    match verbs() {
        Ok(_) => RdmaFinding::good("libibverbs is loaded".to_owned()),
        Err(error) => RdmaFinding::lacking(error.to_string(), "apt-get install rdma-core"),
    }
}

fn port(port: &Port) -> RdmaFinding {
    let Port {
        device,
        number,
        state,
        link_layer,
        gids,
    } = port;
    let gids: Vec<_> = gids.iter().map(ToString::to_string).collect();
    let text = format!(
        "{device} port {number}: {state}, {link_layer}, {}",
        gids.join(", ")
    );
    if !port.is_active() {
        let fix =
            "bring the link up: `ip link set … up` (RoCE), cable and subnet manager (InfiniBand)";
        return RdmaFinding::lacking(text, fix);
    }
    if !port.has_routed_gid() {
        return RdmaFinding::lacking(
            format!("{text}; none is an IP address"),
            "give the port's interface an IP address; RoCE v2 takes its GIDs from there",
        );
    }
    RdmaFinding::good(text)
}

fn device(name: &str) -> Option<RdmaFinding> {
    let error = OpenDevice::open(name).err()?;
    Some(RdmaFinding::lacking(
        error.to_string(),
        "see that /dev/infiniband/uverbs* is there and may be opened, and that ibverbs-providers is \
         installed",
    ))
}

fn memlock() -> Option<RdmaFinding> {
    let limit = getrlimit(Resource::Memlock).current?;
    (limit < MIN_MEMLOCK_BYTES).then(|| {
        RdmaFinding::lacking(
            format!("{limit} bytes may be locked in memory; registered slots need more"),
            "set LimitMEMLOCK=infinity in the unit, or `ulimit -l unlimited`",
        )
    })
}
