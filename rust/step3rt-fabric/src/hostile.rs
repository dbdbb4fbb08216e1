//! Tests with a peer that breaks the rules: every violation ends its own link, by name, and
//! nothing else.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use step3rt_core::ids::{Epoch, InstanceId, LaneId};

use crate::address::{ChoiceReason, FabricChoice, FabricKind};
use crate::config::{EndpointConfig, LinkSettings};
use crate::contract::{Doorbell, DownReason, Geometry, LinkIdentity, Side};
use crate::doorbell::FutexDoorbell;
use crate::endpoint::{Endpoint, FabricEvent};
use crate::frame::{Direction, Frame, FrameHeader, HEADER_BYTES, ProtocolError};
use crate::handshake::{Introduction, Kind, MESSAGE_BYTES, Message, RefusalCode};
use crate::memory::{Mapping, PAGE_BYTES, Sharing};
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
    let kind = Kind::Hello {
        wanted: VICTIM,
        choice: ChoiceReason::Setting,
    };
    Message {
        from: introduction(),
        kind,
    }
    .encode()
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
            assert_eq!(Message::decode(&answer.bytes).unwrap().kind, Kind::Welcome);
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
            assert_eq!(Message::decode(&answer).unwrap().kind, Kind::Welcome);
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

/// What a good peer would send first: 16 bytes of zeros.
fn good_header() -> FrameHeader {
    FrameHeader {
        source: HOSTILE.instance,
        epoch: HOSTILE.epoch,
        direction: Direction::A2f,
        lane: LaneId(0),
        sequence: 1,
        frame: Frame {
            step: 0,
            layer: 0,
            num_tokens: 1,
            payload_bytes: 16,
        },
        payload_checksum: None,
    }
}

/// Each way to lie in a header, with what it is called.
fn lies() -> Vec<([u8; HEADER_BYTES], ProtocolError)> {
    let mut damaged = good_header().encode();
    damaged[20] ^= 1;
    let damage = FrameHeader::decode(&damaged).unwrap_err();
    let nothing = ([0; HEADER_BYTES], ProtocolError::Magic(0));
    let mut lies = vec![nothing, (damaged, damage)];
    let mut add = |change: &dyn Fn(&mut FrameHeader), error| {
        let mut header = good_header();
        change(&mut header);
        lies.push((header.encode(), error));
    };
    let (found, expected) = (InstanceId(9), HOSTILE.instance);
    add(
        &|header| header.source = found,
        ProtocolError::Source { found, expected },
    );
    let (found, expected) = (Epoch(4), HOSTILE.epoch);
    add(
        &|header| header.epoch = found,
        ProtocolError::Epoch { found, expected },
    );
    let (found, expected) = (Direction::F2a, Direction::A2f);
    add(
        &|header| header.direction = found,
        ProtocolError::Direction { found, expected },
    );
    for found in [2, u64::MAX] {
        let error = ProtocolError::Sequence {
            lane: LaneId(0),
            found,
            expected: 1,
        };
        add(&|header| header.sequence = found, error);
    }
    let oversize = ProtocolError::Oversize {
        payload_bytes: 257,
        slot_bytes: 256,
    };
    add(&|header| header.frame.payload_bytes = 257, oversize);
    let computed = crc32fast::hash(&[0; 16]);
    let wrong_sum = ProtocolError::PayloadChecksum { found: 7, computed };
    add(&|header| header.payload_checksum = Some(7), wrong_sum);
    lies
}

#[test]
fn every_lie_in_a_header_ends_the_link_by_its_name_and_is_never_an_arrival() {
    let mut victim = victim(PATIENCE);
    for fabric in FABRICS {
        for (header, error) in lies() {
            let mut forger = Forger::link(&mut victim, fabric);
            // The flag agrees with the header, where it has one to read.
            let sequence = FrameHeader::decode(&header).map_or(1, |header| header.sequence);
            forger.send(&header, sequence);
            let reason = DownReason::Protocol(error);
            let down = FabricEvent::LinkDown {
                peer: HOSTILE,
                reason,
            };
            assert_eq!(next(&mut victim), [down], "{fabric}");
        }
        let mut honest = Forger::link(&mut victim, fabric);
        honest.send(&good_header().encode(), 1);
        let events = next(&mut victim);
        assert!(
            matches!(events[..], [FabricEvent::Arrived { .. }]),
            "{events:?}"
        );
        drop(honest);
        next(&mut victim);
    }
}

#[test]
fn a_frame_before_the_last_one_was_answered_ends_the_link() {
    let mut victim = victim(PATIENCE);
    for fabric in FABRICS {
        let mut forger = Forger::link(&mut victim, fabric);
        forger.send(&good_header().encode(), 1);
        let events = next(&mut victim);
        assert!(
            matches!(events[..], [FabricEvent::Arrived { .. }]),
            "{events:?}"
        );
        forger.send(
            &FrameHeader {
                sequence: 2,
                ..good_header()
            }
            .encode(),
            2,
        );
        let reason = DownReason::Protocol(ProtocolError::NoCredit {
            lane: LaneId(0),
            found: 2,
        });
        assert_eq!(
            next(&mut victim),
            [FabricEvent::LinkDown {
                peer: HOSTILE,
                reason
            }]
        );
    }
}

#[test]
fn a_slot_that_is_being_read_is_not_overwritten_by_an_early_frame() {
    let mut victim = victim(PATIENCE);
    let mut forger = Forger::link(&mut victim, FabricKind::Tcp);
    forger.send(&good_header().encode(), 1);
    next(&mut victim);
    let slot = victim.receive_slot(HOSTILE.instance, LaneId(0)).unwrap();
    let Forger::Tcp(stream) = &mut forger else {
        panic!("not tcp")
    };
    let early = FrameHeader {
        sequence: 2,
        ..good_header()
    };
    stream.write_all(&early.encode()).unwrap();
    // The victim may have hung up on seeing the header.
    let _ = stream.write_all(&[0xee; 16]);
    let events = next(&mut victim);
    assert!(
        matches!(events[..], [FabricEvent::LinkDown { .. }]),
        "{events:?}"
    );
    let mut bytes = [1; 16];
    slot.read(&mut bytes);
    assert_eq!(bytes, [0; 16]);
}

#[test]
fn a_right_payload_checksum_is_accepted() {
    let mut victim = victim(PATIENCE);
    for fabric in FABRICS {
        let mut forger = Forger::link(&mut victim, fabric);
        let payload_checksum = Some(crc32fast::hash(&[0; 16]));
        forger.send(
            &FrameHeader {
                payload_checksum,
                ..good_header()
            }
            .encode(),
            1,
        );
        let events = next(&mut victim);
        assert!(
            matches!(events[..], [FabricEvent::Arrived { .. }]),
            "{events:?}"
        );
        drop(forger);
        next(&mut victim);
    }
}

#[test]
fn a_lane_that_is_not_the_slots_or_does_not_exist_ends_the_link() {
    let mut victim = victim(PATIENCE);
    for (fabric, found, expected) in [(FabricKind::Shm, 1, 0), (FabricKind::Tcp, 2, 2)] {
        let mut forger = Forger::link(&mut victim, fabric);
        let header = FrameHeader {
            lane: LaneId(found),
            ..good_header()
        };
        forger.send(&header.encode(), 1);
        let (found, expected) = (LaneId(found), LaneId(expected));
        let reason = DownReason::Protocol(ProtocolError::Lane { found, expected });
        assert_eq!(
            next(&mut victim),
            [FabricEvent::LinkDown {
                peer: HOSTILE,
                reason
            }]
        );
    }
}

#[test]
fn a_flag_that_differs_from_its_header_ends_the_link() {
    let mut victim = victim(PATIENCE);
    let mut forger = Forger::link(&mut victim, FabricKind::Shm);
    forger.send(&good_header().encode(), 3);
    let sequence = ProtocolError::Sequence {
        lane: LaneId(0),
        found: 1,
        expected: 3,
    };
    let reason = DownReason::Protocol(sequence);
    assert_eq!(
        next(&mut victim),
        [FabricEvent::LinkDown {
            peer: HOSTILE,
            reason
        }]
    );
}

#[test]
fn a_connection_that_ends_within_a_frame_is_a_short_frame() {
    let mut victim = victim(PATIENCE);
    let whole = [good_header().encode().as_slice(), &[0; 16]].concat();
    for (len, expected) in [(10, HEADER_BYTES), (HEADER_BYTES, 80), (79, 80)] {
        let Forger::Tcp(mut stream) = Forger::link(&mut victim, FabricKind::Tcp) else {
            panic!("not tcp");
        };
        stream.write_all(&whole[..len]).unwrap();
        drop(stream);
        let reason = DownReason::Protocol(ProtocolError::ShortFrame {
            found: len,
            expected,
        });
        assert_eq!(
            next(&mut victim),
            [FabricEvent::LinkDown {
                peer: HOSTILE,
                reason
            }]
        );
    }
}

#[test]
fn bytes_on_the_socket_of_shared_memory_end_the_link() {
    let mut victim = victim(PATIENCE);
    let Forger::Shm { socket, .. } = &Forger::link(&mut victim, FabricKind::Shm) else {
        panic!("not shm");
    };
    shm::send(socket, &hello(), &[]).unwrap();
    let reason = DownReason::Protocol(ProtocolError::Chatter);
    assert_eq!(
        next(&mut victim),
        [FabricEvent::LinkDown {
            peer: HOSTILE,
            reason
        }]
    );
}

/// Connects over TCP, says `bytes`, and returns all of the answer.
fn answer_over_tcp(victim: &Endpoint, bytes: &[u8]) -> Vec<u8> {
    let mut stream = TcpStream::connect(address(victim, FabricKind::Tcp)).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.write_all(bytes).unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).unwrap();
    answer
}

#[test]
fn a_hello_that_is_none_is_hung_up_on_and_one_of_another_version_answered() {
    let mut victim = victim(Duration::from_millis(100));
    let welcome = Message {
        from: introduction(),
        kind: Kind::Welcome,
    }
    .encode();
    let mut newer = hello();
    newer[4] = 2;
    assert_eq!(answer_over_tcp(&victim, &[b'x'; MESSAGE_BYTES]), []);
    assert_eq!(answer_over_tcp(&victim, &welcome), []);
    // Ends at the handshake's deadline.
    assert_eq!(answer_over_tcp(&victim, &hello()[..63]), []);
    let refusal = Message::decode(&answer_over_tcp(&victim, &newer)).unwrap();
    assert_eq!(refusal.kind, Kind::Refusal(RefusalCode::Version));
    assert_eq!(refusal.from.identity, VICTIM);
    Forger::link(&mut victim, FabricKind::Tcp);
}

#[test]
fn memory_that_is_not_what_was_agreed_is_not_mapped() {
    let mut victim = victim(PATIENCE);
    let (_slots, right) = Region::share(&GEOMETRY, Direction::A2f).unwrap();
    let (_bell, bell) = FutexDoorbell::create(0).unwrap();
    let len = usize::try_from(rustix::fs::fstat(&right).unwrap().st_size).unwrap();
    let (_large, large) = Mapping::share("test", len + PAGE_BYTES, Sharing::PeerReads).unwrap();
    let (_open, unsealed) = Mapping::share("test", len, Sharing::PeerWrites).unwrap();
    let file: OwnedFd = std::fs::File::open("/proc/self/exe").unwrap().into();
    let attempts: [&[&OwnedFd]; 6] = [
        &[],
        &[&right],
        &[&large, &bell],
        &[&unsealed, &bell],
        &[&file, &bell],
        &[&right, &file],
    ];
    for fds in attempts {
        let socket = shm::connect(&address(&victim, FabricKind::Shm), PATIENCE).unwrap();
        let fds: Vec<_> = fds.iter().map(|fd| fd.as_fd()).collect();
        shm::send(&socket, &hello(), &fds).unwrap();
        assert_eq!(
            shm::receive(&socket).unwrap().num_bytes,
            0,
            "a welcome, or a refusal"
        );
    }
    let mut events = Vec::new();
    victim.poll(&mut events);
    assert_eq!(events, []);
    Forger::link(&mut victim, FabricKind::Shm);
}

#[test]
fn strangers_that_say_nothing_keep_no_peer_out() {
    let mut victim = victim(Duration::from_millis(50));
    let tcp = address(&victim, FabricKind::Tcp);
    let _strangers: Vec<_> = (0..100)
        .map(|_| TcpStream::connect(&tcp).unwrap())
        .collect();
    for fabric in FABRICS {
        let peer = Forger::link(&mut victim, fabric);
        drop(peer);
        next(&mut victim);
    }
}
