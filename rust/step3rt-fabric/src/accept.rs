//! The accepting end of a handshake: reads a hello without blocking, judges it, makes the link.
//!
//! It trusts nothing that a stranger says: sizes are this end's own, and a stranger holds one
//! socket until a deadline and nothing else.

use std::io;
use std::net::TcpStream;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};

use crate::accept_error::AcceptError;
use crate::choice::Choice;
use crate::contract::{Link, LinkIdentity};
use crate::device_offer::DeviceOffer;
use crate::handshake::{By, Kind, MESSAGE_BYTES, Message, RefusalCode};
use crate::hub::{Hub, Watch};
use crate::lane::LinkTerms;
use crate::link_epoch::LinkEpoch;
use crate::new_link::NewLink;
use crate::opening::Opening;
use crate::rdma;
use crate::rdma_status::RdmaError;
use crate::refusal::HandshakeError;
use crate::region::Region;
use crate::shm::{self, NUM_PASSED_FDS, PeerMemory, ShmLink};
use crate::stream::Stream;
use crate::tcp::{TcpLink, TcpSlots};
use crate::tcp_socket::{self, FrameSocket};
use crate::watcher::timespec;

/// A connection whose hello has not come yet.
pub(crate) struct Pending {
    pub(crate) deadline: Instant,
    socket: PendingSocket,
}

enum PendingSocket {
    Shm(OwnedFd),
    Tcp {
        opening: Opening,
        /// The hello; once that was found good, also what it says that follows.
        bytes: Vec<u8>,
        num_bytes: usize,
    },
}

/// Whether a connection is still pending.
pub(crate) enum Progress {
    Waiting,
    /// A link or nothing came of it; either way the connection is in other hands or closed.
    Over,
}

impl Pending {
    pub(crate) fn shm(socket: OwnedFd, deadline: Instant) -> Self {
        Self {
            deadline,
            socket: PendingSocket::Shm(socket),
        }
    }

    pub(crate) fn tcp(stream: TcpStream, deadline: Instant) -> Self {
        let socket = PendingSocket::Tcp {
            opening: Opening::new(stream),
            bytes: vec![0; MESSAGE_BYTES],
            num_bytes: 0,
        };
        Self { deadline, socket }
    }

    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        match &self.socket {
            PendingSocket::Shm(socket) => socket.as_fd(),
            PendingSocket::Tcp { opening, .. } => opening.fd(),
        }
    }

    /// Reads what has come. With the whole hello here, links or refuses.
    pub(crate) fn advance(&mut self, hub: &Hub) -> Progress {
        let outcome = match &mut self.socket {
            PendingSocket::Shm(socket) => advance_shm(hub, socket),
            PendingSocket::Tcp {
                opening,
                bytes,
                num_bytes,
            } => advance_tcp(hub, opening, bytes, num_bytes),
        };
        match outcome {
            Ok(Some(accepted)) => hub.deliver(accepted),
            Ok(None) => return Progress::Waiting,
            Err(error) => {
                tracing::warn!(%error, "a peer that connected was not linked");
                if let Some(code) = error.refusal() {
                    self.refuse(hub, code);
                }
            }
        }
        Progress::Over
    }

    /// Tells the connecting end; if it does not listen any more, it finds the socket closed.
    fn refuse(&self, hub: &Hub, code: RefusalCode) {
        let message = hub.message(Kind::Refusal(code));
        let _ = match &self.socket {
            PendingSocket::Shm(socket) => shm::send(socket, &message, &[]),
            PendingSocket::Tcp { opening, .. } => opening.refuse(hub, code, &message),
        };
    }
}

/// A hello that was found good; its sender's link is counted.
struct Admitted {
    peer: LinkIdentity,
    choice: Choice,
    by: By,
    /// What both ends will call the link.
    epoch: LinkEpoch,
    /// The peer's, of a link through device memory.
    device_offer: Option<DeviceOffer>,
    /// Why it takes the place of the present link.
    reset: Option<String>,
}

/// Whether a message is a hello that this end wants. Before anything is made for it.
fn judge(hub: &Hub, hello: &Message) -> Result<By, AcceptError> {
    let Kind::Hello { wanted, by, .. } = hello.kind else {
        return Err(HandshakeError::Unexpected("message other than a hello").into());
    };
    let verdict = hub.introduction.judge(&hello.from, wanted);
    verdict.map_err(AcceptError::Refused)?;
    if matches!(by, By::Device { .. }) && hub.device_offer.is_none() {
        return Err(AcceptError::Refused(RefusalCode::NoDeviceOffer));
    }
    Ok(by)
}

/// Judges a hello with what followed it, and counts its sender's link.
fn admit(hub: &Hub, hello: &Message, following: &[u8]) -> Result<Admitted, AcceptError> {
    judge(hub, hello)?;
    let Kind::Hello {
        choice,
        by,
        epoch,
        reason_bytes,
        ..
    } = hello.kind
    else {
        return Err(HandshakeError::Unexpected("message other than a hello").into());
    };
    if following.len() != hello.following_bytes() {
        return Err(HandshakeError::Size(MESSAGE_BYTES + following.len()).into());
    }
    let (reason, offer) = following.split_at(reason_bytes.into());
    let reason = std::str::from_utf8(reason).map_err(|_| HandshakeError::Text)?;
    let device_offer = match by {
        By::Device { .. } => Some(DeviceOffer::new(offer).expect("a message's own limit")),
        By::Carrier | By::Rdma => None,
    };
    let peer = hello.from.identity;
    hub.admit(peer).map_err(AcceptError::Refused)?;
    // Only for peers that are let in: numbers come to an end, and a high proposal uses up those below.
    let epoch = hub.used_epochs.agree(epoch).map_err(|code| {
        hub.dismiss(peer.instance);
        AcceptError::Refused(code)
    })?;
    let reset = (!reason.is_empty()).then(|| reason.to_owned());
    if let Some(reason) = &reset {
        hub.begin_reset(peer.instance, reason.clone());
    }
    Ok(Admitted {
        peer,
        choice,
        by,
        epoch,
        device_offer,
        reset,
    })
}

impl Admitted {
    fn terms(&self, hub: &Hub) -> LinkTerms {
        hub.terms(self.peer, self.by)
    }

    /// The welcome, with this end's device offer if the link is through device memory.
    fn welcome(&self, hub: &Hub) -> Vec<u8> {
        let by = match (self.by, &hub.device_offer) {
            (By::Device { .. }, Some(offer)) => By::of_offer(offer),
            _ => By::Carrier,
        };
        let epoch = self.epoch;
        let message = hub.message(Kind::Welcome { epoch, by });
        [&message, hub.offer_by(by)].concat()
    }

    /// Uncounts the link when it fails to come into being.
    fn finish<E: Into<AcceptError>>(
        self,
        hub: &Hub,
        link: Result<Box<dyn Link>, E>,
    ) -> Result<Option<NewLink>, AcceptError> {
        match link {
            Ok(link) => {
                hub.confirm(self.peer);
                Ok(Some(NewLink {
                    link,
                    reason: self.choice.to_string(),
                    epoch: self.epoch,
                    device_offer: self.device_offer,
                    reset: self.reset,
                }))
            }
            Err(error) => {
                if self.reset.is_some() {
                    hub.end_reset(self.peer.instance);
                }
                hub.dismiss(self.peer.instance);
                Err(error.into())
            }
        }
    }
}

fn advance_shm(hub: &Hub, socket: &OwnedFd) -> Result<Option<NewLink>, AcceptError> {
    let received = match shm::receive(socket) {
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
        received => received?,
    };
    if received.num_bytes < MESSAGE_BYTES {
        return Err(HandshakeError::Size(received.num_bytes).into());
    }
    let hello = Message::decode(&received.bytes)?;
    if received.num_bytes != MESSAGE_BYTES + hello.following_bytes() {
        return Err(HandshakeError::Size(received.num_bytes).into());
    }
    if judge(hub, &hello)? == By::Rdma {
        return Err(HandshakeError::Unexpected("hello for RDMA").into());
    }
    let following = received.following().to_vec();
    let fds: [OwnedFd; NUM_PASSED_FDS] = received
        .fds
        .try_into()
        .map_err(|fds: Vec<_>| HandshakeError::Descriptors(fds.len()))?;
    check_presence(socket)?;
    let admitted = admit(hub, &hello, &following)?;
    let link = link_shm(hub, &admitted, socket, &fds);
    admitted.finish(hub, link)
}

fn link_shm(
    hub: &Hub,
    admitted: &Admitted,
    socket: &OwnedFd,
    fds: &[OwnedFd; NUM_PASSED_FDS],
) -> Result<Box<dyn Link>, AcceptError> {
    let terms = admitted.terms(hub);
    let peer_memory = PeerMemory::open(fds, &terms)?;
    let (outgoing, slots_fd) = Region::share(&terms.geometry, terms.side.sends())?;
    let (process, state) = (shm::peer_process(socket), hub.new_state());
    let own_socket = Arc::new(socket.try_clone()?);
    let fds = [slots_fd.as_fd(), hub.bell_fd()];
    // A refusal may not follow this.
    shm::send(socket, &admitted.welcome(hub), &fds)?;
    hub.watch(Watch {
        socket: Arc::clone(&own_socket),
        process,
        state: Arc::clone(&state),
    });
    let ends = (own_socket, state, hub.bell.expect_far_ringer().into());
    let link = ShmLink::new(terms, outgoing, peer_memory, ends);
    Ok(Box::new(link))
}

fn advance_tcp(
    hub: &Hub,
    opening: &mut Opening,
    bytes: &mut Vec<u8>,
    num_bytes: &mut usize,
) -> Result<Option<NewLink>, AcceptError> {
    let Some(stream) = opening.advance(hub)? else {
        return Ok(None);
    };
    if !read_up_to(MESSAGE_BYTES, stream, bytes, num_bytes)? {
        return Ok(None);
    }
    let hello = Message::decode(&bytes[..MESSAGE_BYTES])?;
    if hub.tls.is_some() && stream.encryption().is_none() {
        return Err(AcceptError::NotTls);
    }
    let by = judge(hub, &hello)?;
    bytes.resize(MESSAGE_BYTES + hello.following_bytes(), 0);
    if !read_up_to(bytes.len(), stream, bytes, num_bytes)? {
        return Ok(None);
    }
    let following = &bytes[MESSAGE_BYTES..];
    check_presence(stream.socket())?;
    let admitted = admit(hub, &hello, following)?;
    let link = match by {
        By::Rdma => {
            let offer = &following[following.len() - by.offer_bytes()..];
            link_rdma(hub, &admitted, opening, offer)
        }
        By::Carrier | By::Device { .. } => link_tcp(hub, &admitted, opening),
    };
    admitted.finish(hub, link)
}

/// That a peer has not given up waiting, as while this process was stopped, or made slots for others: a
/// link with one that has would come up and be lost at once, and it with its owner. Looked at before
/// slots are made and, where what is sent does not say so, before the welcome.
fn check_presence(socket: impl AsFd) -> Result<(), AcceptError> {
    let mut fds = [PollFd::new(&socket, PollFlags::RDHUP)];
    rustix::event::poll(&mut fds, Some(&timespec(Duration::ZERO))).map_err(io::Error::from)?;
    if fds[0].revents().is_empty() {
        Ok(())
    } else {
        Err(AcceptError::GaveUp)
    }
}

/// Reads what has come, up to `wanted` bytes from the start; whether all of them are here.
fn read_up_to(
    wanted: usize,
    stream: &Stream,
    bytes: &mut [u8],
    num_bytes: &mut usize,
) -> Result<bool, AcceptError> {
    while *num_bytes < wanted {
        match stream.read(&mut bytes[*num_bytes..wanted]) {
            Ok(0) => return Err(HandshakeError::Size(*num_bytes).into()),
            Ok(more) => *num_bytes += more,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(true)
}

fn link_rdma(
    hub: &Hub,
    admitted: &Admitted,
    opening: &mut Opening,
    offer: &[u8],
) -> Result<Box<dyn Link>, AcceptError> {
    if !hub.has_rdma {
        return Err(RdmaError::NotOffered.into());
    }
    let stream = opening.stream();
    let control = stream.socket().local_addr()?.ip();
    let terms = admitted.terms(hub);
    let end = rdma::Prepared::answer(&hub.rdma_devices, terms, control, offer)?;
    check_presence(stream.socket())?;
    tcp_socket::prepare(stream.socket(), hub.settings.peer_timeout)?;
    // As for TCP, no refusal may follow. From here on the peer may write.
    stream.write_all(&[&admitted.welcome(hub)[..], &end.offer()].concat())?;
    let control = opening.take().into_socket().into();
    Ok(end.into_link(control, hub.new_state(), &hub.settings)?)
}

fn link_tcp(
    hub: &Hub,
    admitted: &Admitted,
    opening: &mut Opening,
) -> Result<Box<dyn Link>, AcceptError> {
    let terms = admitted.terms(hub);
    let slots = TcpSlots::new(&terms)?;
    let stream = opening.stream();
    check_presence(stream.socket())?;
    tcp_socket::prepare(stream.socket(), hub.settings.peer_timeout)?;
    // A refusal may not follow this, short of a thread that cannot be started: the peer then sees
    // its link end. Does not block: 4160 bytes fit a fresh socket.
    stream.write_all(&admitted.welcome(hub))?;
    let socket = FrameSocket::new(opening.take(), hub.settings.peer_timeout)?;
    let ends = (hub.new_state(), hub.bell.sockets());
    Ok(Box::new(TcpLink::new(terms, slots, socket, ends)?))
}
