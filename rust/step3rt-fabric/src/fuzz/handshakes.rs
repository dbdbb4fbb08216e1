//! Hellos at the accepting end.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::Instant;

use rustix::net::{AddressFamily, SocketFlags, SocketType};
use step3rt_core::ids::{Epoch, InstanceId};

use super::messages::{fault, hello, lower_link_epoch, offer_bytes, welcome};
use super::passed::{self, NO_BELL, NONE, RIGHT};
use super::{LOCAL, MEND, PEER, byte, introduction, mend};
use crate::accept::{Pending, Progress};
use crate::config::LinkSettings;
use crate::contract::{LinkIdentity, Side};
use crate::device_offer::DeviceOffer;
use crate::handshake::{
    By, Introduction, Kind, MAX_FOLLOWING_BYTES, MESSAGE_BYTES, Message, RefusalCode,
};
use crate::hub::Hub;
use crate::rdma::OFFER_BYTES;
use crate::refusal::HandshakeError;
use crate::shm;

pub(super) const TCP_SELECTOR: u8 = 1;
pub(super) const SHM_SELECTOR: u8 = 2;

/// Whether the end under test has a device.
const HAS_DEVICE_OFFER: u8 = 1;

/// What it then offers.
const DEVICE_OFFER: [u8; 5] = *b"ours!";

/// First byte of a connection that is encrypted.
const TLS_FIRST_BYTE: u8 = 0x16;

/// The hello that `sent` begins with, if what it says is no reason to refuse it; otherwise the refusal
/// that is due, if one is.
fn judge(sent: &[u8], flags: u8) -> Result<Message, Option<RefusalCode>> {
    let message = match sent.get(..MESSAGE_BYTES).map(Message::decode) {
        Some(Ok(message)) => message,
        Some(Err(HandshakeError::Version(_))) => return Err(Some(RefusalCode::Version)),
        _ => return Err(None),
    };
    let Kind::Hello { by, .. } = message.kind else {
        return Err(None);
    };
    if let Some(code) = fault(&message) {
        return Err(Some(code));
    }
    if matches!(by, By::Device { .. }) && flags & HAS_DEVICE_OFFER == 0 {
        return Err(Some(RefusalCode::NoDeviceOffer));
    }
    Ok(message)
}

/// What follows a hello, if it is that much, and text where it has to be: the reason and the offer.
fn following<'a>(hello: &Message, sent: &'a [u8]) -> Option<(&'a str, &'a [u8])> {
    let Kind::Hello { reason_bytes, .. } = hello.kind else {
        return None;
    };
    let following = sent.get(MESSAGE_BYTES..MESSAGE_BYTES + hello.following_bytes())?;
    let (reason, offer) = following.split_at(reason_bytes.into());
    Some((std::str::from_utf8(reason).ok()?, offer))
}

/// The bytes of a connection.
fn sent(flags: u8, data: &[u8]) -> Vec<u8> {
    let mut sent = data[..data.len().min(MESSAGE_BYTES + MAX_FOLLOWING_BYTES + 1)].to_vec();
    if let Some(message) = sent.first_chunk_mut::<MESSAGE_BYTES>() {
        lower_link_epoch(message);
        if flags & MEND != 0 {
            mend(message);
        }
    }
    sent
}

/// A connection over TCP: `flags`, then the bytes, which come in two parts.
pub(super) fn run_tcp(mut data: &[u8]) {
    let flags = byte(&mut data);
    let cut = usize::from(byte(&mut data));
    let sent = sent(flags, data);
    let (decided_at, due) = due_over_tcp(flags, &sent);
    let hub = accepting(flags);
    let (mut far, near) = UnixStream::pair().expect("a socket pair");
    near.set_nonblocking(true).expect("a socket");
    let mut pending = Pending::tcp(TcpStream::from(OwnedFd::from(near)), Instant::now());
    let (first, second) = sent.split_at(cut.min(sent.len()));
    far.write_all(first).expect("fits the buffer");
    let is_waiting = matches!(pending.advance(&hub), Progress::Waiting);
    assert_eq!(is_waiting, first.len() < decided_at, "{due:?}");
    if is_waiting {
        far.write_all(second).expect("the other end waits for it");
        if sent.len() < decided_at {
            far.shutdown(Shutdown::Write).expect("connected");
        }
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
    let due = due.map(|code| answer_of(Kind::Refusal(code)).encode());
    assert_eq!(answer, due.as_ref().map_or(&[][..], |due| due));
    // A Unix socket has no options of TCP: no link can come of this, so no place may be taken.
    assert!(hub.take_accepted().is_empty());
    check_places(&hub);
}

/// How many bytes decide what becomes of a connection, and the refusal that is due, if one is.
fn due_over_tcp(flags: u8, sent: &[u8]) -> (usize, Option<RefusalCode>) {
    if sent.first() == Some(&TLS_FIRST_BYTE) {
        return (1, Some(RefusalCode::NoTls));
    }
    match judge(sent, flags) {
        Err(code) => (MESSAGE_BYTES, code),
        Ok(hello) => {
            let is_rdma = matches!(hello.kind, Kind::Hello { by: By::Rdma, .. });
            // Of the options that the socket has not.
            let code = if is_rdma {
                RefusalCode::NoRdma
            } else {
                RefusalCode::Resources
            };
            let code = following(&hello, sent).map(|_| code);
            (MESSAGE_BYTES + hello.following_bytes(), code)
        }
    }
}

/// A connection over a Unix socket: `flags`, which descriptors come along, and the message.
pub(super) fn run_shm(mut data: &[u8]) {
    let flags = byte(&mut data);
    let which = byte(&mut data);
    let sent = sent(flags, data);
    let hub = accepting(flags);
    let socket = |flags| {
        let kind = SocketType::SEQPACKET;
        rustix::net::socketpair(AddressFamily::UNIX, kind, flags, None).expect("a socket pair")
    };
    let (far, near) = socket(SocketFlags::CLOEXEC | SocketFlags::NONBLOCK);
    passed::send(&far, &sent, &passed::descriptors(which));
    let mut pending = Pending::shm(near, Instant::now());
    let end = pending.advance(&hub);
    assert!(matches!(end, Progress::Over));
    drop(pending);
    let answer = shm::receive(&far).ok();
    let answer = answer.filter(|answer| answer.num_bytes > 0);
    match due_over_shm(flags, which, &sent) {
        Ok(hello) => check_link(&hub, &hello, &sent, &answer.expect("a welcome is due")),
        Err(due) => {
            let answer = answer.map(|answer| (answer.num_bytes, answer.bytes, answer.fds.len()));
            let due = due.map(|code| answer_of(Kind::Refusal(code)).encode());
            assert_eq!(answer, due.map(|due| (MESSAGE_BYTES, due, 0)));
            assert!(hub.take_accepted().is_empty());
        }
    }
    check_places(&hub);
}

/// The hello that must be welcomed; otherwise the refusal that is due, if one is.
fn due_over_shm(flags: u8, which: u8, sent: &[u8]) -> Result<Message, Option<RefusalCode>> {
    if let Some(Ok(message)) = sent.get(..MESSAGE_BYTES).map(Message::decode)
        && sent.len() != MESSAGE_BYTES + message.following_bytes()
    {
        return Err(None);
    }
    let hello = judge(sent, flags)?;
    let is_rdma = matches!(hello.kind, Kind::Hello { by: By::Rdma, .. });
    let is_good = which % 8 == RIGHT && !is_rdma && following(&hello, sent).is_some();
    if is_good { Ok(hello) } else { Err(None) }
}

/// Checks what came of a hello that had to be welcomed.
fn check_link(hub: &Hub, hello: &Message, sent: &[u8], answer: &shm::Received) {
    let welcome = Message::decode(&answer.bytes).expect("a welcome is a message");
    assert_eq!(welcome.from, introduction(LOCAL, Side::Responder));
    let (
        Kind::Hello { epoch, by, .. },
        Kind::Welcome {
            epoch: agreed,
            by: theirs,
        },
    ) = (hello.kind, welcome.kind)
    else {
        panic!("{welcome:?} to {hello:?}");
    };
    assert!(agreed >= epoch, "{agreed} where {epoch} was proposed");
    let (reason, offer) = following(hello, sent).expect("the hello is good");
    let (due_by, due_offer) = match by {
        By::Device { .. } => {
            let offer_bytes = DEVICE_OFFER.len().try_into().expect("short");
            (By::Device { offer_bytes }, Some(offer))
        }
        _ => (By::Carrier, None),
    };
    assert_eq!(theirs, due_by);
    assert_eq!(answer.num_bytes, MESSAGE_BYTES + offer_bytes(due_by));
    assert_eq!(answer.following(), &DEVICE_OFFER[..offer_bytes(due_by)]);
    assert_eq!(answer.fds.len(), 2);
    let Ok([mut new]) = <[_; 1]>::try_from(hub.take_accepted()) else {
        panic!("one link comes of a hello");
    };
    assert_eq!(new.link.peer(), hello.from.identity);
    assert_eq!(new.epoch, agreed);
    assert_eq!(
        new.device_offer.as_ref().map(DeviceOffer::as_bytes),
        due_offer
    );
    let due_reset = (!reason.is_empty()).then_some(reason);
    assert_eq!(new.reset.as_deref(), due_reset);
    let instance = hello.from.identity.instance;
    assert_eq!(hub.reset_of(instance).as_deref(), due_reset);
    let mut events = Vec::new();
    new.link.poll(&mut events);
    assert_eq!(events, [], "nothing was sent yet");
    if new.reset.is_some() {
        hub.end_reset(instance);
    }
    hub.dismiss(instance);
}

/// The accepting end; it has one place.
fn accepting(flags: u8) -> Hub {
    #[cfg(fuzzing)]
    crate::link_epoch::OF_PROCESS.forget();
    let mut hub = hub(introduction(LOCAL, Side::Responder));
    if flags & HAS_DEVICE_OFFER != 0 {
        hub.device_offer = Some(DeviceOffer::new(&DEVICE_OFFER).expect("short"));
    }
    hub
}

pub(super) fn hub(introduction: Introduction) -> Hub {
    let settings = LinkSettings {
        max_peers: 1,
        ..LinkSettings::default()
    };
    Hub::new(introduction, settings, false, None).expect("memory")
}

/// What the accepting end of these tests says.
fn answer_of(kind: Kind) -> Message {
    Message {
        from: introduction(LOCAL, Side::Responder),
        kind,
    }
}

/// Whoever came to nothing has left his place to others.
fn check_places(hub: &Hub) {
    let other = LinkIdentity {
        instance: InstanceId(77),
        epoch: Epoch(u64::MAX),
    };
    assert_eq!(hub.admit(other), Ok(()), "a place is lost");
    assert_eq!(hub.reset_of(PEER.instance), None, "a request is left");
}

pub(super) fn seeds() -> Vec<Vec<u8>> {
    let seed = |head: &[u8], message: &Message, following: &[u8]| {
        [head, &message.encode(), following].concat()
    };
    let device = By::Device { offer_bytes: 7 };
    let offer = b"theirs!";
    let (reason, queue_pairs) = ("lane 1 timed out", [0x5a; OFFER_BYTES]);
    let mut seeds = Vec::new();
    let plain = hello(By::Carrier, "");
    let asking = hello(By::Carrier, reason);
    let asking_device = hello(device, reason);
    let all = [reason.as_bytes(), offer].concat();
    let pairs = [reason.as_bytes(), &queue_pairs].concat();
    let no_text = [&[0xff], &reason.as_bytes()[1..]].concat();
    let has_device = MEND | HAS_DEVICE_OFFER;
    for (flags, cut, message, following) in [
        (MEND, 64, plain, &[][..]),
        (MEND, 255, plain, &[]),
        (MEND, 10, plain, &[]),
        (MEND, 64, welcome(By::Carrier), &[]),
        (MEND, 70, asking, reason.as_bytes()),
        (MEND, 255, asking, reason.as_bytes()),
        (MEND, 70, asking, &reason.as_bytes()[1..]),
        (MEND, 255, asking, &no_text),
        (MEND, 70, hello(By::Rdma, ""), &queue_pairs),
        (MEND, 255, hello(By::Rdma, reason), &pairs),
        (MEND, 70, asking_device, &all),
        (has_device, 70, asking_device, &all),
        (has_device, 255, asking_device, &all),
    ] {
        seeds.push(seed(&[TCP_SELECTOR, flags, cut], &message, following));
    }
    seeds.push(vec![TCP_SELECTOR, 0, 2, TLS_FIRST_BYTE, 3, 1]);
    for which in NONE..=NO_BELL + 1 {
        seeds.push(seed(&[SHM_SELECTOR, MEND, which], &plain, &[]));
    }
    for (flags, message, following) in [
        (0, hello(By::Rdma, ""), &queue_pairs[..]),
        (MEND, asking, reason.as_bytes()),
        (MEND, asking, &no_text),
        (MEND, asking, &reason.as_bytes()[1..]),
        (MEND, asking_device, &all),
        (has_device, asking_device, &all),
        (has_device, hello(device, ""), offer),
        (has_device, hello(By::Device { offer_bytes: 0 }, ""), &[]),
    ] {
        seeds.push(seed(&[SHM_SELECTOR, flags, RIGHT], &message, following));
    }
    seeds
}
