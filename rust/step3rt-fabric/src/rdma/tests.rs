//! Peers that fall silent or misbehave on a real device. Ignored where there is none: `make
//! test-rdma` runs them.

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, TcpListener, TcpStream};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use step3rt_core::ids::{Epoch, InstanceId, LaneId};

use super::offer::Offer;
use super::request::immediate;
use super::*;
use crate::address::{DataAddress, FabricChoice, FabricKind, PeerAddress};
use crate::config::LinkSettings;
use crate::contract::{Doorbell, DownReason, Geometry, Link, LinkEvent, LinkIdentity, Side};
use crate::dialer::Dialer;
use crate::doorbell::FutexDoorbell;
use crate::frame::{Direction, Frame, FrameHeader, HEADER_BYTES, ProtocolError};
use crate::handshake::{By, Introduction, Kind, MESSAGE_BYTES, Message};
use crate::hub::Hub;
use crate::lane::LinkTerms;
use crate::state::LinkState;

const PATIENCE: Duration = Duration::from_secs(30);
const GEOMETRY: Geometry = Geometry {
    num_lanes: 2,
    a2f_slot_bytes: 4096,
    f2a_slot_bytes: 4096,
};
const ATTENTION: LinkIdentity = LinkIdentity {
    instance: InstanceId(1),
    epoch: Epoch(5),
};
const FFN: LinkIdentity = LinkIdentity {
    instance: InstanceId(2),
    epoch: Epoch(6),
};
const LANE: LaneId = LaneId(0);

fn terms(side: Side) -> LinkTerms {
    let (local, peer) = match side {
        Side::Initiator => (ATTENTION, FFN),
        Side::Responder => (FFN, ATTENTION),
    };
    LinkTerms {
        local,
        peer,
        side,
        geometry: GEOMETRY,
        payload_checksum: false,
    }
}

/// A link of an FFN instance, and the other end's objects in the hands of the test.
struct Victim {
    link: Box<dyn Link>,
    bell: Arc<FutexDoorbell>,
    other: Prepared,
    /// Stays open: what is seen is seen by the device.
    control: TcpStream,
}

impl Victim {
    fn new() -> Self {
        Self::offered(|_| {})
    }

    /// The test's end offers what `forge` makes of its offer.
    fn offered(forge: impl FnOnce(&mut Offer)) -> Self {
        let devices = Devices::default();
        let control = IpAddr::from(Ipv4Addr::LOCALHOST);
        let mut other = Prepared::new(&devices, terms(Side::Initiator), control).unwrap();
        let mut offer = Offer::decode(&other.offer(), GEOMETRY.num_lanes).unwrap();
        forge(&mut offer);
        let offer = offer.encode();
        let end = Prepared::answer(&devices, terms(Side::Responder), control, &offer);
        let end = end.unwrap();
        other.connect(&end.offer()).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let control = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (socket, _) = listener.accept().unwrap();
        let (bell, _fd) = FutexDoorbell::create(0).unwrap();
        let bell = Arc::new(bell);
        let state = Arc::new(LinkState::new(Arc::clone(&bell) as Arc<dyn Doorbell>));
        let settings = LinkSettings {
            handshake_timeout: Duration::ZERO,
            ..LinkSettings::default()
        };
        let link = end.into_link(socket.into(), state, &settings).unwrap();
        Self {
            link,
            bell,
            other,
            control,
        }
    }

    /// Writes a frame as a peer could that follows no rule.
    fn forge(&self, header: &FrameHeader, immediate: u32) {
        let lane = header.lane;
        self.other.outgoing.write_header(lane, &header.encode());
        let range = self
            .other
            .outgoing
            .frame_range(lane, header.frame.payload_bytes);
        self.other.wire.post_frame(lane, range, immediate).unwrap();
    }

    fn next(&mut self) -> LinkEvent {
        let (mut events, started) = (Vec::new(), Instant::now());
        loop {
            let seen = self.bell.current();
            self.link.poll(&mut events);
            if let Some(event) = events.pop() {
                assert_eq!(events, []);
                return event;
            }
            assert!(started.elapsed() < PATIENCE, "nothing happened");
            self.bell.wait(seen, PATIENCE);
        }
    }

    fn protocol_error(&mut self) -> ProtocolError {
        match self.next() {
            LinkEvent::Down(DownReason::Protocol(error)) => error,
            other => panic!("{other:?}"),
        }
    }
}

fn header(sequence: u64) -> FrameHeader {
    FrameHeader {
        source: ATTENTION.instance,
        epoch: ATTENTION.epoch,
        direction: Direction::A2f,
        lane: LANE,
        sequence,
        frame: Frame {
            step: 0,
            layer: 0,
            num_tokens: 1,
            payload_bytes: 8,
        },
        payload_checksum: None,
    }
}

#[test]
#[ignore = "needs an RDMA device: make test-rdma"]
#[expect(clippy::print_stdout, reason = "a figure for who runs it")]
fn a_device_that_falls_silent_is_noticed_within_a_second_on_an_idle_link() {
    let mut fastest = Duration::MAX;
    for _ in 0..3 {
        let mut victim = Victim::new();
        // The first frame: from now on each end looks after the other.
        victim.forge(&header(1), immediate(LANE, 1));
        assert_eq!(victim.next(), LinkEvent::Arrived(header(1)));
        let started = Instant::now();
        // As when a host loses its power: no packet, and no word on the control connection.
        victim.other.wire.take_down();
        let silent = DownReason::Transport {
            during: "waiting for the peer's device to acknowledge",
            os_error: libc::ETIMEDOUT,
        };
        assert_eq!(victim.next(), LinkEvent::Down(silent));
        let elapsed = started.elapsed();
        println!("a silent device was noticed after {elapsed:?}");
        fastest = fastest.min(elapsed);
    }
    // Of three, so that one hiccup of a busy machine does not count.
    assert!(
        fastest < Duration::from_secs(1),
        "noticed after {fastest:?}"
    );
}

#[test]
#[ignore = "needs an RDMA device: make test-rdma"]
fn the_control_connection_ends_the_link_and_carries_nothing_else() {
    let mut victim = Victim::new();
    victim.control.shutdown(std::net::Shutdown::Both).unwrap();
    assert_eq!(victim.next(), LinkEvent::Down(DownReason::PeerClosed));
    let mut victim = Victim::new();
    victim.control.write_all(b"x").unwrap();
    assert_eq!(victim.protocol_error(), ProtocolError::Chatter);
}

#[test]
#[ignore = "needs an RDMA device: make test-rdma"]
fn frames_that_break_the_protocol_end_the_link_by_name() {
    let mut victim = Victim::new();
    victim.forge(&header(2), immediate(LANE, 2));
    let error = victim.protocol_error();
    assert!(
        matches!(
            error,
            ProtocolError::Sequence {
                found: 2,
                expected: 1,
                ..
            }
        ),
        "{error}"
    );

    // The immediate of another lane on this lane's queue pair.
    let mut victim = Victim::new();
    victim.forge(&header(1), immediate(LaneId(1), 1));
    let error = victim.protocol_error();
    assert!(matches!(error, ProtocolError::Sequence { .. }), "{error}");

    let mut victim = Victim::new();
    let epoch = Epoch(4);
    victim.forge(&FrameHeader { epoch, ..header(1) }, immediate(LANE, 1));
    let error = victim.protocol_error();
    assert!(
        matches!(
            error,
            ProtocolError::Epoch {
                found: Epoch(4),
                ..
            }
        ),
        "{error}"
    );

    let mut victim = Victim::new();
    victim.forge(&header(1), immediate(LANE, 1));
    assert_eq!(victim.next(), LinkEvent::Arrived(header(1)));
    victim.forge(&header(2), immediate(LANE, 2));
    let error = victim.protocol_error();
    assert_eq!(
        error,
        ProtocolError::NoCredit {
            lane: LANE,
            found: 2
        }
    );
}

#[test]
#[ignore = "needs an RDMA device: make test-rdma"]
fn slots_that_are_nowhere_cost_their_owner_the_link_and_the_writer_nothing_else() {
    for slots_at in [0, u64::MAX - 7] {
        let mut victim = Victim::offered(|offer| offer.slots_at = slots_at);
        victim.forge(&header(1), immediate(LANE, 1));
        assert_eq!(victim.next(), LinkEvent::Arrived(header(1)));
        // Not at the start of the slots, so that the end of the address space is passed.
        let lane = LaneId(1);
        victim.forge(&FrameHeader { lane, ..header(1) }, immediate(lane, 1));
        assert!(matches!(victim.next(), LinkEvent::Arrived(_)));
        victim.link.push(lane, header(1).frame).unwrap();
        let event = victim.next();
        let is_refused = |reason: &DownReason| matches!(reason, DownReason::Transport { .. });
        assert!(
            matches!(&event, LinkEvent::Down(reason) if is_refused(reason)),
            "{event:?}"
        );
    }
}

#[test]
#[ignore = "needs an RDMA device: make test-rdma"]
fn a_write_beyond_the_slots_is_stopped_by_the_device() {
    let mut victim = Victim::new();
    let len = HEADER_BYTES + GEOMETRY.a2f_slot_bytes;
    // Everything is shifted up by the size of the slots, so that the write starts at their end.
    victim.other.wire.remote.0 += len as u64 * 2;
    let range = victim
        .other
        .outgoing
        .frame_range(LANE, GEOMETRY.a2f_slot_bytes);
    victim
        .other
        .wire
        .post_frame(LANE, range, immediate(LANE, 1))
        .unwrap();
    let event = victim.next();
    assert!(
        matches!(event, LinkEvent::Down(DownReason::Transport { .. })),
        "{event:?}"
    );
}

/// An accepting end whose device lets no packet through, and which then accepts over TCP. Returns how
/// its peer's hello for that explains itself.
fn accept_without_packets(listener: &TcpListener) -> String {
    let welcome = |hello: &[u8]| {
        let Kind::Hello { epoch, .. } = Message::decode(hello).unwrap().kind else {
            panic!("no hello");
        };
        let by = By::Carrier;
        let from = Introduction {
            identity: FFN,
            side: Side::Responder,
            geometry: GEOMETRY,
        };
        let kind = Kind::Welcome { epoch, by };
        Message { from, kind }.encode()
    };
    let (mut control, _) = listener.accept().unwrap();
    let mut hello = [0; MESSAGE_BYTES + OFFER_BYTES];
    control.read_exact(&mut hello).unwrap();
    let (devices, local) = (Devices::default(), IpAddr::from(Ipv4Addr::LOCALHOST));
    let offer = &hello[MESSAGE_BYTES..];
    let end = Prepared::answer(&devices, terms(Side::Responder), local, offer).unwrap();
    end.wire.take_down();
    let answer = [&welcome(&hello[..MESSAGE_BYTES])[..], &end.offer()].concat();
    control.write_all(&answer).unwrap();

    let (mut tcp, _) = listener.accept().unwrap();
    let mut hello = [0; MESSAGE_BYTES];
    tcp.read_exact(&mut hello).unwrap();
    let mut reason = vec![0; Message::decode(&hello).unwrap().following_bytes()];
    tcp.read_exact(&mut reason).unwrap();
    // The link over RDMA has not ended meanwhile.
    control.set_nonblocking(true).unwrap();
    let error = control.read(&mut [0]).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock);
    tcp.write_all(&welcome(&hello)).unwrap();
    String::from_utf8(reason).unwrap()
}

#[test]
#[ignore = "needs an RDMA device: make test-rdma"]
fn a_link_without_packets_lasts_until_another_takes_its_place() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let there = listener.local_addr().unwrap().to_string();
    let address = |fabric: FabricKind| DataAddress {
        fabric: fabric.as_str().to_owned(),
        address: there.clone(),
    };
    let peer = PeerAddress {
        identity: FFN,
        boot_id: "another".to_owned(),
        addresses: [FabricKind::Rdma, FabricKind::Tcp].map(address).to_vec(),
    };
    let own = Introduction {
        identity: ATTENTION,
        side: Side::Initiator,
        geometry: GEOMETRY,
    };
    let hub = Hub::new(own, LinkSettings::default(), true, None).unwrap();
    let dialer = Dialer {
        hub: Arc::new(hub),
        fabric: FabricChoice::Auto,
        boot_id: "this".to_owned(),
        reset: None,
    };
    let far = thread::spawn(move || accept_without_packets(&listener));
    let made = dialer.link(&peer).unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(made.link.fabric(), "tcp");
    assert!(
        made.reason.contains("no packet came through by"),
        "{}",
        made.reason
    );
    assert_eq!(far.join().unwrap(), "no packet came through by RDMA");
}
