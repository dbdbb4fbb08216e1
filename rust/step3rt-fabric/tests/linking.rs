//! Who may link whom, by which fabric, and what the others are told.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on stops there")]

mod common;

use std::sync::Arc;
use std::time::{Duration, Instant};

use common::{Fabric, Node, PATIENCE, geometry, identity};
use step3rt_core::ids::{Epoch, InstanceId, LaneId};
use step3rt_fabric::address::PeerAddress;
use step3rt_fabric::contract::{Doorbell, Side, SlotMemory};
use step3rt_fabric::endpoint::{
    BindError, ConnectError, Endpoint, EndpointConfig, FabricEvent, LinkSettings,
};

const FFN: InstanceId = InstanceId(2);
const LANE: LaneId = LaneId(0);

#[test]
fn an_older_incarnation_is_refused_and_the_newer_one_not_disturbed() {
    for fabric in [Fabric::Shm, Fabric::Tcp] {
        let mut ffn = Node::ffn(fabric, 2, geometry(1, 64));
        let mut new = Node::bind(fabric, identity(1, 7), Side::Initiator, geometry(1, 64));
        new.link(fabric, &mut ffn);
        let mut old = Node::attention(fabric, 1, geometry(1, 64));
        let error = old.endpoint.connect(&ffn.address()).unwrap_err();
        assert_eq!(
            error.to_string(),
            "instance 2 refused the link: it knows this instance with epoch 7, later than 1. \
             Register again"
        );
        new.push((FFN, LANE), 0, b"undisturbed");
        assert_eq!(ffn.expect_arrival().1.epoch, Epoch(7));
    }
}

#[test]
fn ends_that_do_not_fit_are_told_why() {
    for fabric in [Fabric::Shm, Fabric::Tcp] {
        let mut ffn = Node::ffn(fabric, 2, geometry(1, 64));
        let mut wide = Node::attention(fabric, 1, geometry(1, 128));
        let error = wide
            .endpoint
            .connect(&ffn.address())
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("its slots are 1 lanes of 64 bytes (A2F)"),
            "{error}"
        );
        let mut attention = Node::attention(fabric, 1, geometry(1, 64));
        let mut outdated = ffn.address();
        outdated.identity.epoch = Epoch(9);
        let error = attention
            .endpoint
            .connect(&outdated)
            .unwrap_err()
            .to_string();
        assert!(error.contains("instance 2 of epoch 1 answered"), "{error}");
        assert!(matches!(
            ffn.endpoint.connect(&outdated),
            Err(ConnectError::WrongSide)
        ));
        // None of them left anything behind that keeps the right one out.
        attention.link(fabric, &mut ffn);
    }
}

#[test]
fn a_peer_that_is_gone_cannot_be_reached() {
    for fabric in [Fabric::Shm, Fabric::Tcp] {
        let address = Node::ffn(fabric, 2, geometry(1, 64)).address();
        let mut attention = Node::attention(fabric, 1, geometry(1, 64));
        let error = attention.endpoint.connect(&address).unwrap_err();
        assert!(matches!(error, ConnectError::Unreachable { .. }), "{error}");
    }
}

#[test]
fn dialling_returns_at_once_and_a_poll_says_how_it_went() {
    for fabric in [Fabric::Shm, Fabric::Tcp] {
        let gone = Node::ffn(fabric, 3, geometry(1, 64)).address();
        let mut ffn = Node::ffn(fabric, 2, geometry(1, 64));
        let mut attention = Node::attention(fabric, 1, geometry(1, 64));
        attention.endpoint.dial(ffn.address()).unwrap();
        attention.expect_up(ffn.identity());
        ffn.expect_up(attention.identity());
        attention.push((FFN, LANE), 0, b"over a dialled link");
        ffn.expect_arrival();

        let error = attention.endpoint.connect(&gone).unwrap_err().to_string();
        attention.endpoint.dial(gone.clone()).unwrap();
        let failed = FabricEvent::DialFailed {
            peer: gone.identity,
            reason: error,
        };
        assert_eq!(attention.next(), failed);
        let refused = ffn.endpoint.dial(gone);
        assert!(matches!(refused, Err(ConnectError::WrongSide)));
    }
}

#[test]
fn slots_that_take_longer_to_make_than_a_peer_waits_for_a_hello_are_no_obstacle() {
    const SLOT_BYTES: usize = 128 << 20;
    for fabric in [Fabric::Shm, Fabric::Tcp] {
        let mut sizes = geometry(1, SLOT_BYTES);
        sizes.f2a_slot_bytes = 1;
        let mut config = Node::ffn(fabric, 2, sizes).endpoint.config().clone();
        config.settings.handshake_timeout = Duration::from_millis(10);
        let mut ffn = Node::new(Endpoint::bind(config).unwrap());
        let mut attention = Node::attention(fabric, 1, sizes);
        let started = Instant::now();
        // More than once, because so short a time may pass on a busy machine, too.
        while let Err(error) = attention.endpoint.connect(&ffn.address()) {
            assert!(started.elapsed() < PATIENCE, "{error}");
        }
        ffn.expect_up(attention.identity());
    }
}

#[test]
fn one_host_is_linked_by_shm_and_by_tcp_when_that_is_out_of_reach() {
    let bind = |side, instance| {
        let config = EndpointConfig {
            identity: identity(instance, 1),
            side,
            geometry: geometry(1, 64),
            fabric: "auto".parse().unwrap(),
            listen_shm: side == Side::Responder,
            listen_tcp: (side == Side::Responder).then(|| "0.0.0.0:0".parse().unwrap()),
            advertise_host: Some("localhost".to_owned()),
            settings: LinkSettings::default(),
        };
        Node::new(Endpoint::bind(config).unwrap())
    };
    let mut ffn = bind(Side::Responder, 2);
    let mut attention = bind(Side::Initiator, 1);
    let summary = attention.endpoint.connect(&ffn.address()).unwrap();
    assert_eq!(
        (summary.fabric, summary.reason.as_str()),
        ("shm", "both ends run on one host")
    );
    ffn.expect_up(attention.identity());

    let mut in_a_container = ffn.address();
    in_a_container.addresses[0].address = "@step3rt-nobody".to_owned();
    let summary = attention.endpoint.connect(&in_a_container).unwrap();
    // Where this host has an RDMA device, that comes before TCP.
    let has_rdma = ffn.address().addresses.iter().any(|a| a.fabric == "rdma");
    let next = |why_rdma, why_tcp| {
        if has_rdma {
            ("rdma", why_rdma)
        } else {
            ("tcp", why_tcp)
        }
    };
    let (fabric, why) = next(
        "one host, but no shared memory, and both ends have RDMA",
        "one host, but the peer's shm socket is out of reach",
    );
    assert_eq!(summary.fabric, fabric);
    assert!(summary.reason.starts_with(why), "{}", summary.reason);
    assert!(matches!(attention.next(), FabricEvent::LinkDown { .. }));

    let mut on_another_host = ffn.address();
    on_another_host.boot_id = "another".to_owned();
    let summary = attention.endpoint.connect(&on_another_host).unwrap();
    let (fabric, why) = next(
        "the ends run on different hosts, both with RDMA",
        "the ends run on different hosts",
    );
    assert_eq!(summary.fabric, fabric);
    assert!(summary.reason.starts_with(why), "{}", summary.reason);
}

#[test]
fn a_full_endpoint_takes_a_peer_when_another_has_left() {
    for fabric in [Fabric::Shm, Fabric::Tcp] {
        let bind = |identity, side| {
            let mut config = Node::bind(fabric, identity, side, geometry(1, 64))
                .endpoint
                .config()
                .clone();
            config.settings.max_peers = 1;
            Node::new(Endpoint::bind(config).unwrap())
        };
        let mut ffn = bind(identity(2, 1), Side::Responder);
        let mut other_ffn = Node::ffn(fabric, 3, geometry(1, 64));
        let mut attention = bind(identity(1, 1), Side::Initiator);
        let mut other_attention = Node::attention(fabric, 4, geometry(1, 64));
        attention.link(fabric, &mut ffn);

        let error = attention
            .endpoint
            .connect(&other_ffn.address())
            .unwrap_err()
            .to_string();
        assert_eq!(
            error,
            "this endpoint has no room for instance 3. Raise `max_peers`=1"
        );
        let error = other_attention
            .endpoint
            .connect(&ffn.address())
            .unwrap_err()
            .to_string();
        assert!(
            error.ends_with("it has no room for another peer. Raise its `max_peers`"),
            "{error}"
        );

        attention.endpoint.disconnect(FFN);
        attention.link(fabric, &mut other_ffn);
        ffn.expect_down();
        // A link that is over counts until the poll that forgets it.
        ffn.expect_nothing();
        other_attention.link(fabric, &mut ffn);
    }
}

#[test]
fn an_endpoint_that_no_peer_could_reach_or_link_is_refused() {
    let config = |listen: &str, geometry| EndpointConfig {
        identity: identity(2, 1),
        side: Side::Responder,
        geometry,
        fabric: "auto".parse().unwrap(),
        listen_shm: false,
        listen_tcp: Some(listen.parse().unwrap()),
        advertise_host: None,
        settings: LinkSettings::default(),
    };
    let error = |listen, geometry| match Endpoint::bind(config(listen, geometry)) {
        Ok(_) => panic!("bound"),
        Err(error) => error.to_string(),
    };
    assert!(error("0.0.0.0:0", geometry(1, 64)).contains("Set `advertise_host`"));
    assert!(error("192.0.2.1:0", geometry(1, 64)).contains("cannot listen on 192.0.2.1:0"));
    assert!(error("127.0.0.1:0", geometry(0, 64)).contains("a link of 0 lanes"));
    assert!(error("127.0.0.1:0", geometry(33, 64)).contains("1 to 32"));
    assert!(error("127.0.0.1:0", geometry(1, 0)).contains("a slot of 0 bytes"));
    assert!(error("127.0.0.1:0", geometry(1, 1 << 31)).contains("a slot of 2147483648 bytes"));
}

#[test]
fn rdma_that_is_asked_for_and_not_there_is_refused_with_what_to_do() {
    let has_device = |mut devices: std::fs::ReadDir| devices.next().is_some();
    if std::fs::read_dir("/sys/class/infiniband").is_ok_and(has_device) {
        return;
    }
    for side in [Side::Initiator, Side::Responder] {
        let mut config = Node::bind(Fabric::Tcp, identity(1, 1), side, geometry(1, 64))
            .endpoint
            .config()
            .clone();
        config.fabric = "rdma".parse().unwrap();
        let Err(error) = Endpoint::bind(config) else {
            panic!("bound");
        };
        assert!(matches!(error, BindError::Rdma(_)), "{error}");
        let error = error.to_string();
        assert!(
            error.starts_with("fabric \"rdma\" cannot be used: "),
            "{error}"
        );
        assert!(error.ends_with("Or set `fabric` to \"auto\""), "{error}");
    }
}

#[cfg(feature = "rdma")]
mod rdma {
    use super::*;

    /// An endpoint on another host, as far as others can tell.
    fn elsewhere(node: &Node) -> PeerAddress {
        PeerAddress {
            boot_id: "another".to_owned(),
            ..node.address()
        }
    }

    fn bind(fabric: &str, side: Side, instance: u32) -> Node {
        let config = EndpointConfig {
            identity: identity(instance, 1),
            side,
            geometry: geometry(3, 64),
            fabric: fabric.parse().unwrap(),
            listen_shm: false,
            listen_tcp: (side == Side::Responder).then(|| "127.0.0.1:0".parse().unwrap()),
            advertise_host: None,
            settings: LinkSettings::default(),
        };
        Node::new(Endpoint::bind(config).unwrap())
    }

    #[test]
    #[ignore = "needs an RDMA device: make test-rdma"]
    fn hosts_that_both_have_rdma_are_linked_by_it_and_both_say_by_which_port() {
        let mut ffn = bind("auto", Side::Responder, 2);
        let mut attention = bind("auto", Side::Initiator, 1);
        let summary = attention.endpoint.connect(&elsewhere(&ffn)).unwrap();
        assert_eq!(summary.fabric, "rdma");
        let FabricEvent::LinkUp(accepted) = ffn.next() else {
            panic!("no link");
        };
        for reason in [summary.reason, accepted.reason] {
            let choice = "the ends run on different hosts, both with RDMA; ";
            assert!(reason.starts_with(choice), "{reason}");
            assert!(reason.contains(" port 1, GID "), "{reason}");
        }
        attention.push((FFN, LANE), 0, b"over rdma");
        let (_, header) = ffn.expect_arrival();
        assert_eq!(ffn.payload(&header), b"over rdma");
    }

    #[test]
    #[ignore = "needs an RDMA device: make test-rdma"]
    fn a_peer_that_offers_no_rdma_after_all_is_linked_over_tcp_with_the_reason() {
        let ffn = bind("tcp", Side::Responder, 2);
        let mut outdated = elsewhere(&ffn);
        let mut rdma = outdated.addresses[0].clone();
        "rdma".clone_into(&mut rdma.fabric);
        outdated.addresses.insert(0, rdma);
        let mut attention = bind("auto", Side::Initiator, 1);
        let summary = attention.endpoint.connect(&outdated).unwrap();
        assert_eq!(summary.fabric, "tcp");
        assert_eq!(
            summary.reason,
            "both ends have RDMA, but cannot be linked by it: instance 2 refused the link: it cannot \
             be linked by RDMA. See its log, and `step3rt doctor` on its host"
        );
        // Asked for by name, there is no other way.
        let mut attention = bind("rdma", Side::Initiator, 3);
        let error = attention.endpoint.connect(&outdated).unwrap_err();
        assert!(matches!(error, ConnectError::Refused { .. }), "{error}");
    }
}

#[test]
fn an_endpoint_may_move_between_threads_and_its_doorbell_be_shared() {
    fn is_send<T: Send>() {}
    fn is_shared<T: Send + Sync>() {}
    is_send::<Endpoint>();
    is_shared::<Arc<dyn Doorbell>>();
    is_shared::<Arc<dyn SlotMemory>>();
}
