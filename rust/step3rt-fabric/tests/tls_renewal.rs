//! Certificates that are renewed while links are up: those stay, and new ones go by the new files.

#![cfg(feature = "tls")]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on stops there")]

mod common;

use std::fs;
use std::thread::sleep;
use std::time::{Duration, Instant};

use common::certs::{Authority, GOOD};
use common::{Node, PATIENCE, geometry, identity};
use step3rt_core::ids::{InstanceId, LaneId};
use step3rt_fabric::Tls;
use step3rt_fabric::contract::Side;
use step3rt_fabric::endpoint::{Endpoint, EndpointConfig, LinkSettings};
use step3rt_tls::{Identity, TlsFiles};

const FFN: InstanceId = InstanceId(2);
const LANE: LaneId = LaneId(0);

fn bind(side: Side, instance: u32, tls: Tls) -> Node {
    let config = EndpointConfig {
        identity: identity(instance, 1),
        side,
        geometry: geometry(1, 64),
        fabric: "tcp".parse().unwrap(),
        listen_shm: false,
        listen_tcp: (side == Side::Responder).then(|| "127.0.0.1:0".parse().unwrap()),
        advertise_host: None,
        settings: LinkSettings::default(),
    };
    Node::new(Endpoint::bind_with(config, None, Some(tls)).unwrap())
}

#[test]
fn new_links_go_by_the_renewed_files_and_old_ones_stay() {
    let (old, new) = (Authority::new(), Authority::new());
    let directory = tempfile::tempdir().unwrap();
    let at = |name| directory.path().join(name);
    let files = TlsFiles {
        cert: at("cert.pem"),
        key: at("key.pem"),
        ca: at("ca.pem"),
    };
    let replace = |by: &TlsFiles| {
        fs::copy(&by.cert, &files.cert).unwrap();
        fs::copy(&by.key, &files.key).unwrap();
        fs::copy(&by.ca, &files.ca).unwrap();
    };
    replace(&old.issue(GOOD));
    let followed = Identity::follow(files.clone()).unwrap();
    let mut ffn = bind(Side::Responder, 2, followed.clone());
    let mut linked = bind(Side::Initiator, 1, old.member(GOOD));
    linked.endpoint.connect(&ffn.address()).unwrap();
    ffn.expect_up(linked.identity());

    // Both ends of a link take renewed files: one that accepts, and one that connects.
    let mut newcomer = bind(Side::Initiator, 3, new.member(GOOD));
    assert!(newcomer.endpoint.connect(&ffn.address()).is_err());
    let mut other_ffn = bind(Side::Responder, 4, new.member(GOOD));
    let mut follower = bind(Side::Initiator, 5, followed);
    assert!(follower.endpoint.connect(&other_ffn.address()).is_err());
    replace(&new.issue(GOOD));
    let begun = Instant::now();
    while newcomer.endpoint.connect(&ffn.address()).is_err() {
        assert!(begun.elapsed() < PATIENCE);
        sleep(Duration::from_millis(100));
    }
    ffn.expect_up(newcomer.identity());
    follower.endpoint.connect(&other_ffn.address()).unwrap();
    other_ffn.expect_up(follower.identity());

    for node in [&mut linked, &mut newcomer] {
        node.push((FFN, LANE), 0, b"still here");
        assert_eq!(ffn.expect_arrival().0, node.instance());
    }
}
