//! The accepting end of a handshake: reads a hello without blocking, judges it, makes the link.
//!
//! It trusts nothing that a stranger says: sizes are this end's own, and a stranger holds one
//! socket until a deadline and nothing else.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Instant;

use thiserror::Error;

use crate::address::ChoiceReason;
use crate::contract::{Link, LinkIdentity};
use crate::handshake::{Kind, MESSAGE_BYTES, Message, RefusalCode};
use crate::hub::{Accepted, Hub, Watch};
use crate::lane::LinkTerms;
use crate::memory::MapError;
use crate::rdma::{self, OFFER_BYTES};
use crate::rdma_status::RdmaError;
use crate::refusal::HandshakeError;
use crate::region::Region;
use crate::shm::{self, NUM_PASSED_FDS, PeerMemory, ShmLink};
use crate::tcp::{TcpLink, TcpSlots};
use crate::tcp_socket::{self, FrameSocket};

/// A connection whose hello has not come yet.
pub(crate) struct Pending {
    pub(crate) deadline: Instant,
    socket: PendingSocket,
}

enum PendingSocket {
    Shm(OwnedFd),
    Tcp {
        stream: TcpStream,
        bytes: Box<[u8; MESSAGE_BYTES + OFFER_BYTES]>,
        num_bytes: usize,
    },
}

/// Whether a connection is still pending.
pub(crate) enum Progress {
    Waiting,
    /// A link or nothing came of it; either way the connection is in other hands or closed.
    Over,
}

/// Why nothing came of a connection.
#[derive(Debug, Error)]
enum AcceptError {
    #[error("its hello is wrong: {0}")]
    Hello(#[from] HandshakeError),
    #[error("its memory is wrong: {0}")]
    Memory(#[from] MapError),
    #[error("it was refused: {0:?}")]
    Refused(RefusalCode),
    #[error("it cannot be linked by RDMA: {0}")]
    Rdma(#[from] RdmaError),
    #[error("{0}")]
    System(#[from] io::Error),
}

impl AcceptError {
    /// What the connecting end is told, if there is something to tell.
    fn refusal(&self) -> Option<RefusalCode> {
        match self {
            Self::Hello(HandshakeError::Version(_)) => Some(RefusalCode::Version),
            Self::Refused(code) => Some(*code),
            Self::Rdma(_) => Some(RefusalCode::NoRdma),
            Self::System(_) => Some(RefusalCode::Resources),
            Self::Hello(_) | Self::Memory(_) => None,
        }
    }
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
            stream,
            bytes: Box::new([0; MESSAGE_BYTES + OFFER_BYTES]),
            num_bytes: 0,
        };
        Self { deadline, socket }
    }

    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        match &self.socket {
            PendingSocket::Shm(socket) => socket.as_fd(),
            PendingSocket::Tcp { stream, .. } => stream.as_fd(),
        }
    }

    /// Reads what has come. With the whole hello here, links or refuses.
    pub(crate) fn advance(&mut self, hub: &Hub) -> Progress {
        let outcome = match &mut self.socket {
            PendingSocket::Shm(socket) => advance_shm(hub, socket),
            PendingSocket::Tcp {
                stream,
                bytes,
                num_bytes,
            } => advance_tcp(hub, stream, bytes, num_bytes),
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
            PendingSocket::Tcp { stream, .. } => (&*stream).write_all(&message),
        };
    }
}

/// A hello that was found good; its sender's link is counted.
struct Admitted {
    peer: LinkIdentity,
    choice: ChoiceReason,
}

fn admit(hub: &Hub, hello: Message) -> Result<Admitted, AcceptError> {
    let Message { from, kind } = hello;
    let Kind::Hello { wanted, choice, .. } = kind else {
        return Err(HandshakeError::Unexpected("message other than a hello").into());
    };
    let verdict = hub.introduction.judge(&from, wanted);
    verdict
        .and_then(|()| hub.admit(from.identity))
        .map_err(AcceptError::Refused)?;
    Ok(Admitted {
        peer: from.identity,
        choice,
    })
}

impl Admitted {
    /// Uncounts the link when it fails to come into being.
    fn finish<E: Into<AcceptError>>(
        self,
        hub: &Hub,
        link: Result<Box<dyn Link>, E>,
    ) -> Result<Option<Accepted>, AcceptError> {
        let Self { peer, choice } = self;
        match link {
            Ok(link) => {
                hub.confirm(peer);
                let reason = choice.to_string();
                Ok(Some(Accepted { link, reason }))
            }
            Err(error) => {
                hub.dismiss(peer.instance);
                Err(error.into())
            }
        }
    }
}

fn advance_shm(hub: &Hub, socket: &OwnedFd) -> Result<Option<Accepted>, AcceptError> {
    let received = match shm::receive(socket) {
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
        received => received?,
    };
    if received.num_bytes != MESSAGE_BYTES {
        return Err(HandshakeError::Size(received.num_bytes).into());
    }
    let hello = Message::decode(&received.bytes)?;
    if is_for_rdma(&hello) {
        return Err(HandshakeError::Unexpected("hello for RDMA").into());
    }
    let fds: [OwnedFd; NUM_PASSED_FDS] = received
        .fds
        .try_into()
        .map_err(|fds: Vec<_>| HandshakeError::Descriptors(fds.len()))?;
    let admitted = admit(hub, hello)?;
    let link = link_shm(hub, &hub.terms(admitted.peer), socket, &fds);
    admitted.finish(hub, link)
}

fn link_shm(
    hub: &Hub,
    terms: &LinkTerms,
    socket: &OwnedFd,
    fds: &[OwnedFd; NUM_PASSED_FDS],
) -> Result<Box<dyn Link>, AcceptError> {
    let peer_memory = PeerMemory::open(fds, terms)?;
    let (outgoing, slots_fd) = Region::share(&terms.geometry, terms.side.sends())?;
    let (process, state) = (shm::peer_process(socket), hub.new_state());
    let own_socket = Arc::new(socket.try_clone()?);
    let fds = [slots_fd.as_fd(), hub.bell_fd()];
    // A refusal may not follow this.
    shm::send(socket, &hub.message(Kind::Welcome), &fds)?;
    hub.watch(Watch {
        socket: Arc::clone(&own_socket),
        process,
        state: Arc::clone(&state),
    });
    let ends = (own_socket, state, hub.bell.expect_far_ringer());
    let link = ShmLink::new(*terms, outgoing, peer_memory, ends);
    Ok(Box::new(link))
}

fn is_for_rdma(hello: &Message) -> bool {
    matches!(
        hello.kind,
        Kind::Hello {
            is_for_rdma: true,
            ..
        }
    )
}

fn advance_tcp(
    hub: &Hub,
    stream: &mut TcpStream,
    bytes: &mut [u8; MESSAGE_BYTES + OFFER_BYTES],
    num_bytes: &mut usize,
) -> Result<Option<Accepted>, AcceptError> {
    if !read_up_to(MESSAGE_BYTES, stream, bytes, num_bytes)? {
        return Ok(None);
    }
    let hello = Message::decode(&bytes[..MESSAGE_BYTES])?;
    if !is_for_rdma(&hello) {
        let admitted = admit(hub, hello)?;
        let link = link_tcp(hub, hub.terms(admitted.peer), stream);
        return admitted.finish(hub, link);
    }
    if !read_up_to(bytes.len(), stream, bytes, num_bytes)? {
        return Ok(None);
    }
    let admitted = admit(hub, hello)?;
    let link = link_rdma(
        hub,
        hub.terms(admitted.peer),
        stream,
        &bytes[MESSAGE_BYTES..],
    );
    admitted.finish(hub, link)
}

/// Reads what has come, up to `wanted` bytes from the start; whether all of them are here.
fn read_up_to(
    wanted: usize,
    stream: &mut TcpStream,
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
    terms: LinkTerms,
    stream: &TcpStream,
    offer: &[u8],
) -> Result<Box<dyn Link>, AcceptError> {
    if !hub.has_rdma {
        return Err(RdmaError::NotOffered.into());
    }
    let mut stream = stream.try_clone()?;
    let control = stream.local_addr()?.ip();
    let end = rdma::Prepared::answer(&hub.rdma_devices, terms, control, offer)?;
    tcp_socket::prepare(&stream, hub.settings.peer_timeout)?;
    // As for TCP, no refusal may follow. From here on the peer may write.
    stream.write_all(&[&hub.message(Kind::Welcome)[..], &end.offer()].concat())?;
    Ok(end.into_link(stream.into(), hub.new_state(), &hub.settings)?)
}

fn link_tcp(hub: &Hub, terms: LinkTerms, mut stream: &TcpStream) -> io::Result<Box<dyn Link>> {
    let slots = TcpSlots::new(&terms)?;
    let socket = FrameSocket::new(stream.try_clone()?, hub.settings.peer_timeout)?;
    // A refusal may not follow this, short of a thread that cannot be started: the peer then sees
    // its link end. Does not block: 64 bytes fit a fresh socket.
    stream.write_all(&hub.message(Kind::Welcome))?;
    let ends = (hub.new_state(), hub.bell.sockets());
    Ok(Box::new(TcpLink::new(terms, slots, socket, ends)?))
}
