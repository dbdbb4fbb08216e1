//! What comes before a link: hellos at the accepting end, answers at the connecting end.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::OnceLock;
use std::time::Instant;

use rustix::net::{AddressFamily, SocketFlags, SocketType};
use step3rt_core::ids::{Epoch, InstanceId};

use super::{GEOMETRY, LOCAL, MEND, PEER, byte, bytes, introduction, mend};
use crate::accept::{Pending, Progress};
use crate::address::{ChoiceReason, FabricKind, PeerAddress};
use crate::config::LinkSettings;
use crate::connect::{Attempt, ConnectError};
use crate::contract::{LinkIdentity, Side};
use crate::doorbell::FutexDoorbell;
use crate::frame::Direction;
use crate::handshake::{Introduction, Kind, MESSAGE_BYTES, Message, RefusalCode};
use crate::hub::Hub;
use crate::memory::{Mapping, Sharing};
use crate::refusal::HandshakeError;
use crate::region::Region;
use crate::shm;

pub(super) const MESSAGE_SELECTOR: u8 = 0;
pub(super) const TCP_SELECTOR: u8 = 1;
pub(super) const SHM_SELECTOR: u8 = 2;
pub(super) const ANSWER_SELECTOR: u8 = 3;

/// One message. What is understood comes back as it went, and is judged by its fields alone.
pub(super) fn run_message(mut data: &[u8]) {
    let flags = byte(&mut data);
    let mut bytes = data[..data.len().min(2 * MESSAGE_BYTES)].to_vec();
    if flags & MEND != 0 && bytes.len() == MESSAGE_BYTES {
        mend(&mut bytes);
    }
    match Message::decode(&bytes) {
        Ok(message) => {
            assert_eq!(bytes.len(), MESSAGE_BYTES);
            assert_eq!(Message::decode(&message.encode()), Ok(message));
            check_judgement(&message);
        }
        Err(HandshakeError::Size(found)) => {
            assert_eq!(found, bytes.len());
            assert_ne!(found, MESSAGE_BYTES);
        }
        Err(HandshakeError::Magic(_)) => assert_ne!(&bytes[..4], b"S3HS"),
        Err(HandshakeError::Version(_)) => assert_ne!(bytes[4..6], [1, 0]),
        Err(HandshakeError::Checksum) => {
            let crc = crc32fast::hash(&bytes[..60]);
            assert_ne!(bytes[60..], crc.to_le_bytes());
        }
        Err(HandshakeError::Field { .. }) => {}
        Err(error) => panic!("{error} of a message alone"),
    }
}

fn check_judgement(message: &Message) {
    let ours = introduction(LOCAL, Side::Responder);
    match message.kind {
        Kind::Hello { wanted, .. } => {
            let verdict = ours.judge(&message.from, wanted);
            assert_eq!(verdict.is_ok(), is_welcome(message), "{message:?}");
        }
        Kind::Refusal(code) => {
            let refusal = ours.explain(&message.from, PEER, code);
            assert!(!refusal.to_string().is_empty());
        }
        Kind::Welcome => {}
    }
}

/// Whether the accepting end of these tests may link the sender of a hello.
fn is_welcome(hello: &Message) -> bool {
    let Kind::Hello { wanted, .. } = hello.kind else {
        return false;
    };
    let from = hello.from;
    wanted == LOCAL && from.side == Side::Initiator && from.geometry == GEOMETRY
}

/// A connection over TCP: `flags`, then the bytes, which come in two parts.
pub(super) fn run_tcp(mut data: &[u8]) {
    let flags = byte(&mut data);
    let cut = usize::from(byte(&mut data)).min(data.len());
    let mut sent = data[..data.len().min(4 * MESSAGE_BYTES)].to_vec();
    if flags & MEND != 0 && sent.len() >= MESSAGE_BYTES {
        mend(&mut sent[..MESSAGE_BYTES]);
    }
    let hub = accepting();
    let (mut far, near) = UnixStream::pair().expect("a socket pair");
    near.set_nonblocking(true).expect("a socket");
    let mut pending = Pending::tcp(TcpStream::from(OwnedFd::from(near)), Instant::now());
    let (first, second) = sent.split_at(cut.min(sent.len()));
    far.write_all(first).expect("fits the buffer");
    if let Progress::Waiting = pending.advance(&hub) {
        // The other end may have hung up on a stranger.
        let _ = far.write_all(second);
        far.shutdown(Shutdown::Write).expect("connected");
        let end = pending.advance(&hub);
        assert!(
            matches!(end, Progress::Over),
            "a stranger that left is kept"
        );
    }
    drop(pending);
    let mut answer = Vec::new();
    // A reset is what unread bytes leave.
    let _ = far.read_to_end(&mut answer);
    let answer = (!answer.is_empty()).then_some(answer);
    check_answer_to(&sent, answer.as_deref());
    // A Unix socket has no options of TCP: no link can come of this, so no place may be taken.
    assert!(hub.take_accepted().is_empty());
    check_places(&hub);
}

/// A connection over a Unix socket: `flags`, which descriptors come along, and the message.
pub(super) fn run_shm(mut data: &[u8]) {
    let flags = byte(&mut data);
    let passed = byte(&mut data);
    let mut sent = data[..data.len().min(2 * MESSAGE_BYTES)].to_vec();
    if flags & MEND != 0 && sent.len() >= MESSAGE_BYTES {
        mend(&mut sent[..MESSAGE_BYTES]);
    }
    let hub = accepting();
    let socket = |flags| {
        let kind = SocketType::SEQPACKET;
        rustix::net::socketpair(AddressFamily::UNIX, kind, flags, None).expect("a socket pair")
    };
    let (far, near) = socket(SocketFlags::CLOEXEC | SocketFlags::NONBLOCK);
    send(&far, &sent, &descriptors(passed));
    let mut pending = Pending::shm(near, Instant::now());
    let end = pending.advance(&hub);
    assert!(matches!(end, Progress::Over));
    drop(pending);
    let answer = shm::receive(&far).ok();
    let answer = answer.filter(|answer| answer.num_bytes > 0);
    let bytes = answer.as_ref().map(|answer| &answer.bytes[..]);
    let kind = check_answer_to(&sent, bytes);
    let links = hub.take_accepted();
    assert_eq!(links.len(), usize::from(kind == Some(Kind::Welcome)));
    let is_right_memory = matches!(passed % 8, RIGHT);
    assert!(
        links.is_empty() || is_right_memory,
        "another's memory was mapped"
    );
    for mut link in links {
        assert_eq!(answer.as_ref().map(|answer| answer.fds.len()), Some(2));
        let mut events = Vec::new();
        link.link.poll(&mut events);
        assert_eq!(events, [], "nothing was sent yet");
        hub.dismiss(link.link.peer().instance);
    }
    check_places(&hub);
}

/// The connecting end; it keeps nothing of an answer.
static HUB: OnceLock<Hub> = OnceLock::new();

/// Bytes that come to the connecting end where an answer is due.
pub(super) fn run_answer(mut data: &[u8]) {
    let flags = byte(&mut data);
    let mut answer: [u8; MESSAGE_BYTES] = bytes(&mut data);
    if flags & MEND != 0 {
        mend(&mut answer);
    }
    let hub = HUB.get_or_init(|| hub(introduction(LOCAL, Side::Initiator)));
    let peer = PeerAddress {
        identity: PEER,
        boot_id: String::new(),
        addresses: Vec::new(),
    };
    let attempt = Attempt {
        hub,
        peer: &peer,
        fabric: FabricKind::Tcp,
        choice: ChoiceReason::Setting,
    };
    let decoded = Message::decode(&answer);
    let is_good = decoded == Ok(welcome());
    match attempt.check_answer(&answer) {
        Ok(()) => assert!(is_good, "{decoded:?} was taken for a welcome"),
        Err(ConnectError::Handshake { .. }) => {
            let kind = decoded.map(|message| message.kind);
            assert!(!matches!(kind, Ok(Kind::Welcome | Kind::Refusal(_))));
        }
        Err(ConnectError::Refused { .. }) => assert!(!is_good),
        Err(error) => panic!("{error}"),
    }
}

/// The accepting end; it has one place.
fn accepting() -> Hub {
    hub(introduction(LOCAL, Side::Responder))
}

fn hub(introduction: Introduction) -> Hub {
    let settings = LinkSettings {
        max_peers: 1,
        ..LinkSettings::default()
    };
    Hub::new(introduction, settings, false).expect("memory")
}

/// Checks what the accepting end said to a connection that sent `sent`, and returns it.
fn check_answer_to(sent: &[u8], answer: Option<&[u8]>) -> Option<Kind> {
    let hello = sent.get(..MESSAGE_BYTES).map(Message::decode);
    let answer = answer.map(|bytes| Message::decode(bytes).expect("an answer is a message"));
    if let Some(answer) = &answer {
        assert_eq!(answer.from, introduction(LOCAL, Side::Responder));
    }
    let kind = answer.map(|answer| answer.kind);
    match hello {
        Some(Err(HandshakeError::Version(_))) => {
            let is_told = kind == Some(Kind::Refusal(RefusalCode::Version));
            assert!(is_told || sent.len() != MESSAGE_BYTES);
        }
        Some(Ok(hello)) if is_welcome(&hello) => {
            let is_refused_for_itself = matches!(
                kind,
                Some(Kind::Refusal(
                    RefusalCode::Version
                        | RefusalCode::NotMe
                        | RefusalCode::SameSide
                        | RefusalCode::Geometry
                        | RefusalCode::Stale(_)
                        | RefusalCode::Full
                ))
            );
            assert!(!is_refused_for_itself, "{kind:?} to {hello:?}");
        }
        _ => assert_ne!(kind, Some(Kind::Welcome), "to {hello:?}"),
    }
    kind
}

/// Whoever came to nothing has left his place to others.
fn check_places(hub: &Hub) {
    let other = LinkIdentity {
        instance: InstanceId(77),
        epoch: Epoch(u64::MAX),
    };
    assert_eq!(hub.admit(other), Ok(()), "a place is lost");
}

const NONE: u8 = 0;
const RIGHT: u8 = 1;
const SLOTS_ONLY: u8 = 2;
const LARGE: u8 = 3;
const UNSEALED: u8 = 4;
const NO_MEMORY: u8 = 5;
const NO_BELL: u8 = 6;

struct Memory {
    slots: OwnedFd,
    bell: OwnedFd,
    large: OwnedFd,
    unsealed: OwnedFd,
    other: OwnedFd,
    _mappings: (Region, FutexDoorbell, [Mapping; 2]),
}

fn descriptors(passed: u8) -> Vec<BorrowedFd<'static>> {
    static MEMORY: OnceLock<Memory> = OnceLock::new();
    let memory = MEMORY.get_or_init(|| {
        let (region, slots) = Region::share(&GEOMETRY, Direction::A2f).expect("memory");
        let (doorbell, bell) = FutexDoorbell::create(0).expect("memory");
        let len = rustix::fs::fstat(&slots).expect("a memfd").st_size;
        let len = usize::try_from(len).expect("a few pages");
        let share = |len, sharing| Mapping::share("fuzz", len, sharing).expect("memory");
        let (first, large) = share(2 * len, Sharing::PeerReads);
        let (second, unsealed) = share(len, Sharing::PeerWrites);
        Memory {
            slots,
            bell,
            large,
            unsealed,
            other: std::fs::File::open("/dev/null").expect("a device").into(),
            _mappings: (region, doorbell, [first, second]),
        }
    });
    let Memory {
        slots,
        bell,
        large,
        unsealed,
        other,
        ..
    } = memory;
    let descriptors = match passed % 8 {
        NONE => vec![],
        RIGHT => vec![slots, bell],
        SLOTS_ONLY => vec![slots],
        LARGE => vec![large, bell],
        UNSEALED => vec![unsealed, bell],
        NO_MEMORY => vec![other, bell],
        NO_BELL => vec![slots, other],
        _ => vec![slots, bell, other],
    };
    descriptors.into_iter().map(AsFd::as_fd).collect()
}

/// As [`shm::send`], for a message of any length.
fn send(socket: &OwnedFd, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(3))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() {
        assert!(control.push(SendAncillaryMessage::ScmRights(fds)));
    }
    let parts = [std::io::IoSlice::new(bytes)];
    sendmsg(socket, &parts, &mut control, SendFlags::NOSIGNAL).expect("fits the buffer");
}

/// What the connecting end of these tests awaits.
fn welcome() -> Message {
    Message {
        from: introduction(PEER, Side::Responder),
        kind: Kind::Welcome,
    }
}

fn hello(is_for_rdma: bool) -> Message {
    Message {
        from: introduction(PEER, Side::Initiator),
        kind: Kind::Hello {
            wanted: LOCAL,
            choice: ChoiceReason::SameHost,
            is_for_rdma,
        },
    }
}

pub(super) fn seeds() -> Vec<Vec<u8>> {
    let seed = |head: &[u8], message: &Message| [head, &message.encode()].concat();
    let mut seeds = Vec::new();
    let codes = [
        RefusalCode::Version,
        RefusalCode::NotMe,
        RefusalCode::SameSide,
        RefusalCode::Geometry,
        RefusalCode::Stale(Epoch(9)),
        RefusalCode::Full,
        RefusalCode::Resources,
        RefusalCode::NoRdma,
    ];
    let refusals = codes.map(|code| Message {
        kind: Kind::Refusal(code),
        ..welcome()
    });
    for message in [&[hello(false), hello(true), welcome()][..], &refusals].concat() {
        seeds.push(seed(&[MESSAGE_SELECTOR, MEND], &message));
        seeds.push(seed(&[ANSWER_SELECTOR, MEND], &message));
    }
    seeds.push(seed(&[MESSAGE_SELECTOR, 0], &hello(false)));
    seeds.push(seed(&[MESSAGE_SELECTOR, 0, 0], &hello(false))); // a byte too long
    for (cut, message) in [(64, hello(false)), (10, hello(false)), (64, welcome())] {
        seeds.push(seed(&[TCP_SELECTOR, MEND, cut], &message));
    }
    let offer = [0x5a; 172];
    seeds.push([&seed(&[TCP_SELECTOR, MEND, 70], &hello(true))[..], &offer].concat());
    for passed in NONE..=NO_BELL + 1 {
        seeds.push(seed(&[SHM_SELECTOR, MEND, passed], &hello(false)));
    }
    seeds.push(seed(&[SHM_SELECTOR, 0, RIGHT], &hello(true)));
    seeds
}
