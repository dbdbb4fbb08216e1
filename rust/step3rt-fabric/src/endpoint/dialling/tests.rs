//! Dials that overlap: which of their links stays.

use std::time::Duration;

use step3rt_core::ids::{Epoch, LaneId};

use super::*;
use crate::address::FabricChoice;
use crate::config::{EndpointConfig, LinkSettings};
use crate::contract::{DownReason, Geometry};
use crate::frame::Frame;
use crate::link_epoch::LinkEpoch;

const PATIENCE: Duration = Duration::from_secs(30);
const LANE: LaneId = LaneId(0);

fn bind(side: Side) -> Endpoint {
    let is_responder = side == Side::Responder;
    Endpoint::bind(EndpointConfig {
        identity: identity(side),
        side,
        geometry: Geometry {
            num_lanes: 1,
            a2f_slot_bytes: 64,
            f2a_slot_bytes: 64,
        },
        fabric: FabricChoice::Tcp,
        listen_shm: false,
        listen_tcp: is_responder.then(|| "127.0.0.1:0".parse().unwrap()),
        advertise_host: None,
        settings: LinkSettings {
            max_peers: 2,
            ..LinkSettings::default()
        },
    })
    .unwrap()
}

fn identity(side: Side) -> LinkIdentity {
    LinkIdentity {
        instance: InstanceId(u32::from(side == Side::Responder)),
        epoch: Epoch(1),
    }
}

/// Polls until `wanted` says that an event is the last, and returns all.
fn events_until(
    endpoint: &mut Endpoint,
    wanted: impl Fn(&FabricEvent) -> bool,
) -> Vec<FabricEvent> {
    let bell = endpoint.doorbell();
    let mut events = Vec::new();
    loop {
        let seen = bell.current();
        endpoint.poll(&mut events);
        if events.iter().any(&wanted) {
            return events;
        }
        assert!(bell.wait(seen, PATIENCE), "{events:?}");
    }
}

fn push(endpoint: &mut Endpoint, peer: LinkIdentity) {
    let frame = Frame {
        step: 0,
        layer: 0,
        num_tokens: 1,
        payload_bytes: 8,
    };
    endpoint.push(peer.instance, LANE, frame).unwrap();
}

/// As its thread does, but the outcome is left to the test.
fn link(endpoint: &Endpoint, peer: &PeerAddress, reset: Option<&str>) -> NewLink {
    endpoint.admit(peer.identity).unwrap();
    if let Some(reason) = reset {
        let hub = &endpoint.hub;
        hub.begin_reset(peer.identity.instance, reason.to_owned());
    }
    let dialer = endpoint.dialer(reset.map(ToOwned::to_owned));
    dialer.link(peer).unwrap()
}

#[test]
fn of_overlapping_dials_the_link_that_the_peer_accepted_last_stays() {
    let (mut near, mut far) = (bind(Side::Initiator), bind(Side::Responder));
    let (ours, theirs) = (identity(Side::Initiator), identity(Side::Responder));
    let peer = PeerAddress {
        identity: theirs,
        boot_id: String::new(),
        addresses: far.addresses().to_vec(),
    };
    let first = link(&near, &peer, None);
    let second = link(&near, &peer, Some("why"));
    let kept: LinkEpoch = second.epoch;
    assert!(first.epoch < kept);
    for (is_reset, outcome) in [(true, second), (false, first)] {
        near.dialled
            .0
            .send((theirs, is_reset, Ok(outcome)))
            .unwrap();
    }
    let events = events_until(&mut near, |event| {
        matches!(event, FabricEvent::DialFailed { .. })
    });
    let [
        FabricEvent::LinkUp(up),
        FabricEvent::DialFailed { peer, reason },
    ] = &events[..]
    else {
        panic!("{events:?}");
    };
    assert_eq!((up.epoch, *peer), (kept, theirs));
    assert!(reason.contains("dialled more than once"), "{reason}");
    assert_eq!(near.hub.reset_of(theirs.instance), None);

    push(&mut near, theirs);
    let is_arrival = |event: &FabricEvent| matches!(event, FabricEvent::Arrived { .. });
    let seen = events_until(&mut far, is_arrival);
    let mut ups = seen.iter().filter_map(|event| match event {
        FabricEvent::LinkUp(link) => Some(link.epoch),
        _ => None,
    });
    assert_eq!(ups.next_back(), Some(kept));
    push(&mut far, ours);
    events_until(&mut near, is_arrival);

    // The one that was turned down is not counted any more: there is room for two others.
    near.disconnect(theirs.instance);
    let events = events_until(&mut near, |event| {
        matches!(event, FabricEvent::LinkDown { .. })
    });
    let closed = FabricEvent::LinkDown {
        peer: theirs,
        reason: DownReason::Closed,
    };
    assert_eq!(events, [closed]);
    for other in [8, 9] {
        let instance = InstanceId(other);
        near.admit(LinkIdentity { instance, ..theirs }).unwrap();
    }
}
