//! Tests with a peer that breaks the rules: every violation ends its own link, by name, and
//! nothing else.

mod frames;
mod handshakes;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use step3rt_core::ids::{Epoch, InstanceId, LaneId};

use crate::address::{ChoiceReason, FabricChoice, FabricKind};
use crate::choice::{Choice, DeviceNote};
use crate::config::{EndpointConfig, LinkSettings};
use crate::contract::{Doorbell, Geometry, LinkIdentity, Side};
use crate::doorbell::FutexDoorbell;
use crate::endpoint::{Endpoint, FabricEvent};
use crate::frame::{Direction, HEADER_BYTES};
use crate::handshake::{By, Introduction, Kind, MESSAGE_BYTES, Message};
use crate::link_epoch::LinkEpoch;
use crate::region::Region;
use crate::shm;

const PATIENCE: Duration = Duration::from_secs(30);
const GEOMETRY: Geometry = Geometry {
    num_lanes: 2,
    a2f_slot_bytes: 256,
    f2a_slot_bytes: 128,
};
const VICTIM: LinkIdentity = LinkIdentity {
    instance: InstanceId(2),
    epoch: Epoch(1),
};
const HOSTILE: LinkIdentity = LinkIdentity {
    instance: InstanceId(1),
    epoch: Epoch(5),
};
const FABRICS: [FabricKind; 2] = [FabricKind::Shm, FabricKind::Tcp];

fn victim(handshake_timeout: Duration) -> Endpoint {
    Endpoint::bind(EndpointConfig {
        identity: VICTIM,
        side: Side::Responder,
        geometry: GEOMETRY,
        fabric: FabricChoice::Auto,
        listen_shm: true,
        listen_tcp: Some("127.0.0.1:0".parse().unwrap()),
        advertise_host: None,
        settings: LinkSettings {
            handshake_timeout,
            ..LinkSettings::default()
        },
    })
    .unwrap()
}

fn next(victim: &mut Endpoint) -> Vec<FabricEvent> {
    let mut events = Vec::new();
    let doorbell = victim.doorbell();
    loop {
        let seen = doorbell.current();
        victim.poll(&mut events);
        if !events.is_empty() {
            return events;
        }
        assert!(doorbell.wait(seen, PATIENCE), "nothing happened");
    }
}

/// A link whose far end says what it is told to.
enum Forger {
    Shm {
        socket: OwnedFd,
        slots: Region,
        bell: FutexDoorbell,
    },
    Tcp(TcpStream),
}

fn address(victim: &Endpoint, fabric: FabricKind) -> String {
    let found = victim
        .addresses()
        .iter()
        .find(|a| a.fabric == fabric.as_str());
    found.unwrap().address.clone()
}

fn introduction() -> Introduction {
    Introduction {
        identity: HOSTILE,
        side: Side::Initiator,
        geometry: GEOMETRY,
    }
}

fn hello() -> [u8; MESSAGE_BYTES] {
    hello_by(By::Carrier, 0)
}

fn hello_by(by: By, reason_bytes: u8) -> [u8; MESSAGE_BYTES] {
    let kind = Kind::Hello {
        wanted: VICTIM,
        choice: Choice {
            reason: ChoiceReason::Setting,
            device: DeviceNote::Nothing,
        },
        epoch: LinkEpoch(1),
        by,
        reason_bytes,
    };
    Message {
        from: introduction(),
        kind,
    }
    .encode()
}

fn expect_welcome(answer: &[u8]) {
    let kind = Message::decode(answer).unwrap().kind;
    assert!(matches!(kind, Kind::Welcome { .. }), "{kind:?}");
}

impl Forger {
    fn link(victim: &mut Endpoint, fabric: FabricKind) -> Self {
        let address = address(victim, fabric);
        let forger = if fabric == FabricKind::Shm {
            let socket = shm::connect(&address, PATIENCE).unwrap();
            let (slots, slots_fd) = Region::share(&GEOMETRY, Direction::A2f).unwrap();
            let (_own_bell, bell_fd) = FutexDoorbell::create(0).unwrap();
            shm::send(&socket, &hello(), &[slots_fd.as_fd(), bell_fd.as_fd()]).unwrap();
            let answer = shm::receive(&socket).unwrap();
            expect_welcome(&answer.bytes);
            Self::Shm {
                socket,
                slots,
                bell: FutexDoorbell::open(&answer.fds[1]).unwrap(),
            }
        } else {
            let mut stream = TcpStream::connect(address).unwrap();
            stream.write_all(&hello()).unwrap();
            let mut answer = [0; MESSAGE_BYTES];
            stream.read_exact(&mut answer).unwrap();
            expect_welcome(&answer);
            Self::Tcp(stream)
        };
        let events = next(victim);
        assert!(matches!(events[..], [FabricEvent::LinkUp(_)]), "{events:?}");
        forger
    }

    /// Publishes bytes as the frame `sequence` of lane 0.
    fn send(&mut self, header: &[u8; HEADER_BYTES], sequence: u64) {
        match self {
            Self::Shm { slots, bell, .. } => {
                slots.write_header(LaneId(0), header);
                slots.publish(LaneId(0), sequence);
                bell.ring();
            }
            Self::Tcp(stream) => {
                stream.write_all(header).unwrap();
                // The victim may have hung up on seeing the header.
                let _ = stream.write_all(&[0; 16]);
            }
        }
    }
}
