//! Hellos that are none, and memory that is not what was agreed.

use std::net::{Shutdown, TcpListener, TcpStream};
use std::time::Instant;

use rustix::event::{PollFd, PollFlags};

use super::*;
use crate::accept::{Pending, Progress};
use crate::device_offer::DeviceOffer;
use crate::handshake::RefusalCode;
use crate::hub::Hub;
use crate::memory::{Mapping, PAGE_BYTES, Sharing};
use crate::rdma::OFFER_BYTES;
use crate::tcp_socket;

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
        kind: Kind::Welcome {
            epoch: LinkEpoch(1),
            by: By::Carrier,
        },
    }
    .encode();
    let mut newer = hello();
    newer[4] = 3;
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
fn a_hello_for_rdma_that_no_queue_pairs_follow_is_refused() {
    let mut victim = victim(Duration::from_millis(100));
    let hello = hello_by(By::Rdma, 0);
    let nonsense = [&hello[..], &[b'x'; OFFER_BYTES]].concat();
    let refusal = Message::decode(&answer_over_tcp(&victim, &nonsense)).unwrap();
    assert_eq!(refusal.kind, Kind::Refusal(RefusalCode::NoRdma));
    #[cfg(feature = "rdma")]
    assert_eq!(answer_over_tcp(&victim, &nonsense[..=MESSAGE_BYTES]), []);
    let socket = shm::connect(&address(&victim, FabricKind::Shm), PATIENCE).unwrap();
    shm::send(&socket, &nonsense, &[]).unwrap();
    assert_eq!(shm::receive(&socket).unwrap().num_bytes, 0);
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

/// A hello as version 1 wrote it, which had other fields behind the version.
fn hello_of_version_1() -> [u8; MESSAGE_BYTES] {
    let mut old = hello();
    old[4] = 1;
    old[13..16].fill(0);
    let crc = crc32fast::hash(&old[..MESSAGE_BYTES - 4]);
    old[MESSAGE_BYTES - 4..].copy_from_slice(&crc.to_le_bytes());
    old
}

#[test]
fn a_peer_of_version_1_is_told_so_over_either_carrier() {
    let mut victim = victim(PATIENCE);
    let old = hello_of_version_1();
    let over_tcp = answer_over_tcp(&victim, &old);
    let socket = shm::connect(&address(&victim, FabricKind::Shm), PATIENCE).unwrap();
    shm::send(&socket, &old, &[]).unwrap();
    for answer in [&over_tcp[..], &shm::receive(&socket).unwrap().bytes] {
        let refusal = Message::decode(answer).unwrap();
        assert_eq!(refusal.kind, Kind::Refusal(RefusalCode::Version));
    }
    Forger::link(&mut victim, FabricKind::Tcp);
}

/// A victim that offers `len` bytes of its device's memory.
fn victim_with_device(len: usize) -> Endpoint {
    let config = victim(Duration::from_millis(100)).config().clone();
    let offer = DeviceOffer::new(&vec![7; len]).unwrap();
    Endpoint::bind_with_device(config, Some(offer)).unwrap()
}

#[test]
fn an_offer_that_is_too_long_or_not_of_the_length_it_says_links_nothing() {
    let mut victim = victim_with_device(3);
    let by = |offer_bytes| By::Device { offer_bytes };
    let good = [&hello_by(by(5), 0)[..], &[9; 5]].concat();
    // The encoder writes what it is told; the reader must not make room for it.
    let too_long = [&hello_by(by(4097), 0)[..], &[9; 4097]].concat();
    assert_eq!(answer_over_tcp(&victim, &too_long[..MESSAGE_BYTES]), []);
    // Ends at the handshake's deadline.
    assert_eq!(answer_over_tcp(&victim, &good[..good.len() - 1]), []);
    let (_slots, slots) = Region::share(&GEOMETRY, Direction::A2f).unwrap();
    let (_bell, bell) = FutexDoorbell::create(0).unwrap();
    for bytes in [
        &too_long[..],
        &good[..good.len() - 1],
        &[&good[..], &[9]].concat(),
    ] {
        let socket = shm::connect(&address(&victim, FabricKind::Shm), PATIENCE).unwrap();
        shm::send(&socket, bytes, &[slots.as_fd(), bell.as_fd()]).unwrap();
        assert_eq!(shm::receive(&socket).unwrap().num_bytes, 0);
    }
    let mut events = Vec::new();
    victim.poll(&mut events);
    assert_eq!(events, []);

    let mut stream = TcpStream::connect(address(&victim, FabricKind::Tcp)).unwrap();
    stream.write_all(&good).unwrap();
    let mut answer = [0; MESSAGE_BYTES + 3];
    stream.read_exact(&mut answer).unwrap();
    let welcome = Message::decode(&answer[..MESSAGE_BYTES]).unwrap();
    assert!(matches!(welcome.kind, Kind::Welcome { by, .. } if by.offer_bytes() == 3));
    assert_eq!(answer[MESSAGE_BYTES..], [7; 3]);
    let [FabricEvent::LinkUp(link)] = &next(&mut victim)[..] else {
        panic!("no link");
    };
    assert_eq!(link.device_offer.as_ref().unwrap().as_bytes(), [9; 5]);
}

#[test]
fn an_offer_to_one_that_has_none_is_refused_by_name_also_with_the_offer_unread() {
    let mut victim = victim(PATIENCE);
    let hello = hello_by(By::Device { offer_bytes: 4096 }, 0);
    let bytes = [&hello[..], &[9; 4096]].concat();
    let mut stream = TcpStream::connect(address(&victim, FabricKind::Tcp)).unwrap();
    stream.write_all(&bytes).unwrap();
    let mut by_tcp = [0; MESSAGE_BYTES];
    stream.read_exact(&mut by_tcp).unwrap();
    let socket = shm::connect(&address(&victim, FabricKind::Shm), PATIENCE).unwrap();
    shm::send(&socket, &bytes, &[]).unwrap();
    for answer in [&by_tcp[..], &shm::receive(&socket).unwrap().bytes] {
        let refusal = Message::decode(answer).unwrap();
        assert_eq!(refusal.kind, Kind::Refusal(RefusalCode::NoDeviceOffer));
    }
    Forger::link(&mut victim, FabricKind::Tcp);
}

#[test]
fn a_reason_that_is_no_text_links_nothing() {
    let mut victim = victim(PATIENCE);
    let bytes = [&hello_by(By::Carrier, 2)[..], &[0xff, 0xfe]].concat();
    assert_eq!(answer_over_tcp(&victim, &bytes), []);
    Forger::link(&mut victim, FabricKind::Tcp);
}

#[test]
fn a_peer_that_has_given_up_before_it_is_answered_is_not_linked() {
    let own = Introduction {
        identity: VICTIM,
        side: Side::Responder,
        geometry: GEOMETRY,
    };
    let hub = Hub::new(own, LinkSettings::default(), false, None).unwrap();
    let deadline = Instant::now() + PATIENCE;
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut peer = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    peer.write_all(&hello()).unwrap();
    // As when it has closed its socket on another host, which does not say so to what is sent at once.
    peer.shutdown(Shutdown::Write).unwrap();
    let over_tcp = Pending::tcp(tcp_socket::accept(&listener).unwrap(), deadline);
    let (listener, address) = shm::listen().unwrap();
    let peer = shm::connect(&address, PATIENCE).unwrap();
    let (_slots, slots) = Region::share(&GEOMETRY, Direction::A2f).unwrap();
    let (_bell, bell) = FutexDoorbell::create(0).unwrap();
    shm::send(&peer, &hello(), &[slots.as_fd(), bell.as_fd()]).unwrap();
    drop(peer);
    let over_shm = Pending::shm(shm::accept(&listener).unwrap(), deadline);
    for mut pending in [over_tcp, over_shm] {
        // The end of the connection is here, and so is the hello before it.
        rustix::event::poll(
            &mut [PollFd::from_borrowed_fd(pending.fd(), PollFlags::RDHUP)],
            None,
        )
        .unwrap();
        assert!(matches!(pending.advance(&hub), Progress::Over));
        assert!(hub.take_accepted().is_empty());
    }
}
