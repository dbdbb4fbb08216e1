//! Numbers of links: what uses them up, and what both ends hear when none is left. And what the peer
//! hears of a link over RDMA that came to nothing.

use std::net::TcpListener;
use std::thread;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags};
use step3rt_core::ids::Epoch;

use super::*;
use crate::accept::{Pending, Progress};
use crate::address::{ChoiceReason, DataAddress};
use crate::choice::{Choice, DeviceNote};
use crate::config::LinkSettings;
use crate::contract::{Geometry, LinkIdentity, Side};
use crate::handshake::Introduction;
use crate::link_epoch::{MAX_LINK_EPOCH, UsedEpochs};

const PATIENCE: Duration = Duration::from_secs(30);
const FABRICS: [FabricKind; 2] = [FabricKind::Shm, FabricKind::Tcp];

static NONE: UsedEpochs = UsedEpochs::up_to(0);
static ALL: UsedEpochs = UsedEpochs::up_to(MAX_LINK_EPOCH);

fn hub(side: Side, used_epochs: &'static UsedEpochs) -> Hub {
    let introduction = Introduction {
        identity: identity(side),
        side,
        geometry: Geometry {
            num_lanes: 1,
            a2f_slot_bytes: 64,
            f2a_slot_bytes: 64,
        },
    };
    let settings = LinkSettings {
        handshake_timeout: PATIENCE,
        max_peers: 1,
        ..LinkSettings::default()
    };
    let mut hub = Hub::new(introduction, settings, false, None).unwrap();
    hub.used_epochs = used_epochs;
    hub
}

fn identity(side: Side) -> LinkIdentity {
    LinkIdentity {
        instance: InstanceId(u32::from(side == Side::Responder)),
        epoch: Epoch(1),
    }
}

/// Where the far end listens.
enum Listener {
    Shm(OwnedFd),
    Tcp(TcpListener),
}

impl Listener {
    fn bind(fabric: FabricKind) -> (Self, String) {
        if fabric == FabricKind::Shm {
            let (listener, address) = shm::listen().unwrap();
            return (Self::Shm(listener), address);
        }
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        (Self::Tcp(listener), address)
    }

    /// Answers the hello of the one that has connected, or connects.
    fn answer(&self, hub: &Hub) {
        let listener = match self {
            Self::Shm(listener) => listener.as_fd(),
            Self::Tcp(listener) => listener.as_fd(),
        };
        await_readable(&listener);
        let deadline = Instant::now() + PATIENCE;
        let mut pending = match self {
            Self::Shm(listener) => Pending::shm(shm::accept(listener).unwrap(), deadline),
            Self::Tcp(listener) => Pending::tcp(tcp_socket::accept(listener).unwrap(), deadline),
        };
        loop {
            await_readable(&pending.fd());
            if matches!(pending.advance(hub), Progress::Over) {
                return;
            }
        }
    }
}

fn await_readable(fd: &impl AsFd) {
    rustix::event::poll(&mut [PollFd::new(fd, PollFlags::IN)], None).unwrap();
}

fn link(hub: &Hub, fabric: FabricKind, address: &str) -> Result<NewLink, ConnectError> {
    link_after(hub, fabric, address, &Abandoned::default())
}

fn link_after(
    hub: &Hub,
    fabric: FabricKind,
    address: &str,
    abandoned: &Abandoned,
) -> Result<NewLink, ConnectError> {
    let peer = PeerAddress {
        identity: identity(Side::Responder),
        boot_id: String::new(),
        addresses: vec![DataAddress {
            fabric: fabric.as_str().to_owned(),
            address: address.to_owned(),
        }],
    };
    let choice = Choice {
        reason: ChoiceReason::Setting,
        device: DeviceNote::Nothing,
    };
    let candidate = Candidate {
        fabric,
        carrier: fabric,
        choice,
    };
    let attempt = Attempt {
        hub,
        peer: &peer,
        candidate,
        reset: None,
        abandoned,
    };
    attempt.run()
}

#[test]
fn an_end_without_a_number_left_links_nobody_and_both_ends_hear_why() {
    for fabric in FABRICS {
        let (listener, address) = Listener::bind(fabric);
        let error = link(&hub(Side::Initiator, &ALL), fabric, &address).err();
        let error = error.expect("no number is left");
        assert!(matches!(error, ConnectError::NoEpoch { .. }), "{error}");
        assert!(error.to_string().contains("16777215 numbers"), "{error}");

        let (near, far) = (hub(Side::Initiator, &NONE), hub(Side::Responder, &ALL));
        // The one that gave up, without a hello, waits before the other.
        let error = thread::scope(|scope| {
            scope.spawn(|| (0..2).for_each(|_| listener.answer(&far)));
            link(&near, fabric, &address).err()
        });
        let refusal = Refusal::NoEpoch;
        assert!(
            matches!(&error, Some(ConnectError::Refused { refusal: found, .. }) if *found == refusal),
            "{error:?}"
        );
        assert!(far.take_accepted().is_empty());
        let other = LinkIdentity {
            instance: InstanceId(7),
            epoch: Epoch(1),
        };
        far.admit(other).expect("its one place is free again");
    }
}

#[test]
fn a_number_far_above_the_others_is_taken_from_nobody() {
    for fabric in FABRICS {
        for (near_last, far_last) in [(MAX_LINK_EPOCH - 9, 0), (0, MAX_LINK_EPOCH - 9)] {
            let used =
                [near_last, far_last].map(|last| &*Box::leak(UsedEpochs::up_to(last).into()));
            let (near, far) = (hub(Side::Initiator, used[0]), hub(Side::Responder, used[1]));
            let (listener, address) = Listener::bind(fabric);
            let error = thread::scope(|scope| {
                scope.spawn(|| listener.answer(&far));
                link(&near, fabric, &address).err()
            });
            if near_last > far_last {
                let refusal = Refusal::FarEpoch;
                assert!(
                    matches!(&error, Some(ConnectError::Refused { refusal: found, .. }) if *found == refusal),
                    "{error:?}"
                );
            } else {
                let field = "link_epoch";
                assert!(
                    matches!(
                        &error,
                        Some(ConnectError::Handshake { error: HandshakeError::Field { field: found, .. }, .. })
                            if *found == field
                    ),
                    "{error:?}"
                );
            }
            let youngest = used[usize::from(near_last > far_last)].propose();
            assert!(youngest <= Some(LinkEpoch(2)), "{youngest:?}");
        }
    }
}

#[test]
fn a_peer_that_is_not_there_uses_no_number_up() {
    static USED: UsedEpochs = UsedEpochs::up_to(0);
    let near = hub(Side::Initiator, &USED);
    for fabric in FABRICS {
        let (listener, address) = Listener::bind(fabric);
        drop(listener);
        let error = link(&near, fabric, &address).err();
        assert!(
            matches!(error, Some(ConnectError::Unreachable { .. })),
            "{error:?}"
        );
    }
    assert_eq!(USED.propose(), Some(LinkEpoch(1)));
}

#[test]
fn what_takes_the_place_of_a_link_without_packets_says_so() {
    for fabric in FABRICS {
        let (listener, address) = Listener::bind(fabric);
        let (near, far) = (hub(Side::Initiator, &NONE), hub(Side::Responder, &NONE));
        let control = TcpListener::bind("127.0.0.1:0").unwrap();
        let abandoned = Abandoned::default();
        abandoned.keep(TcpStream::connect(control.local_addr().unwrap()).unwrap());
        let made = thread::scope(|scope| {
            scope.spawn(|| listener.answer(&far));
            link_after(&near, fabric, &address, &abandoned)
        });
        assert_eq!(made.expect("a link").reset, None);
        let [accepted] = &far.take_accepted()[..] else {
            panic!("one link comes of a hello");
        };
        let why = "no packet came through by RDMA";
        assert_eq!(accepted.reset.as_deref(), Some(why));
    }
}
