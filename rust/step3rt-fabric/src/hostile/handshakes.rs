//! Hellos that are none, and memory that is not what was agreed.

use std::net::TcpStream;

use super::*;
use crate::handshake::RefusalCode;
use crate::memory::{Mapping, PAGE_BYTES, Sharing};
use crate::rdma::OFFER_BYTES;

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
fn a_hello_for_rdma_that_no_queue_pairs_follow_is_refused() {
    let mut victim = victim(Duration::from_millis(100));
    let nonsense = [&hello_for(true)[..], &[b'x'; OFFER_BYTES]].concat();
    let refusal = Message::decode(&answer_over_tcp(&victim, &nonsense)).unwrap();
    assert_eq!(refusal.kind, Kind::Refusal(RefusalCode::NoRdma));
    #[cfg(feature = "rdma")]
    assert_eq!(answer_over_tcp(&victim, &nonsense[..=MESSAGE_BYTES]), []);
    let socket = shm::connect(&address(&victim, FabricKind::Shm), PATIENCE).unwrap();
    shm::send(&socket, &hello_for(true), &[]).unwrap();
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
