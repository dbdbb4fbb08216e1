//! Encrypted links: who is let in, who is told what, and what travels.

#![cfg(feature = "tls")]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on stops there")]

mod admission;
#[path = "../common/mod.rs"]
mod common;
mod wire;
mod wiretap;

use std::time::Duration;

use common::{Node, PATIENCE, geometry, identity};
use step3rt_core::ids::{InstanceId, LaneId};
use step3rt_fabric::Tls;
use step3rt_fabric::contract::Side;
use step3rt_fabric::endpoint::{Endpoint, EndpointConfig, LinkSettings};

const ATTENTION: InstanceId = InstanceId(1);
const FFN: InstanceId = InstanceId(2);
const LANE: LaneId = LaneId(0);

/// How long a handshake may take in most of these tests; what waits for it must be over soon after.
const HANDSHAKE: Duration = Duration::from_millis(500);

fn bind(side: Side, tls: Option<Tls>) -> Node {
    bind_within(HANDSHAKE, side, tls)
}

/// For links that must come about at the first attempt, also on a busy machine.
fn bind_patiently(side: Side, tls: Option<Tls>) -> Node {
    bind_within(PATIENCE, side, tls)
}

fn bind_within(handshake_timeout: Duration, side: Side, tls: Option<Tls>) -> Node {
    let instance = if side == Side::Initiator { 1 } else { 2 };
    let config = EndpointConfig {
        identity: identity(instance, 1),
        side,
        geometry: geometry(2, 1 << 16),
        fabric: "tcp".parse().unwrap(),
        listen_shm: false,
        listen_tcp: (side == Side::Responder).then(|| "127.0.0.1:0".parse().unwrap()),
        advertise_host: None,
        settings: LinkSettings {
            handshake_timeout,
            ..LinkSettings::default()
        },
    };
    Node::new(Endpoint::bind_with(config, None, tls).unwrap())
}
