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
use crate::stream::Stream;
use crate::tcp::{TcpLink, TcpSlots};
use crate::tcp_socket;
use crate::tls::{self, Accepting, Fault, Handshake};

/// A connection whose hello has not come yet.
pub(crate) struct Pending {
    pub(crate) deadline: Instant,
    socket: PendingSocket,
}

enum PendingSocket {
    Shm(OwnedFd),
    Tcp {
        opening: Opening,
        bytes: Box<[u8; MESSAGE_BYTES + OFFER_BYTES]>,
        num_bytes: usize,
    },
}

/// A TCP connection, as far as it has come. Its first byte says whether it is TLS.
enum Opening {
    New(TcpStream),
    ShakingHands(Box<Accepting>, TcpStream),
    /// The hello comes next.
    Open(Stream),
    /// In other hands, or closed.
    Over,
}

/// First byte of a TLS connection: a handshake record. A hello starts with another one.
const TLS_FIRST_BYTE: u8 = 0x16;

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
    #[error("its TLS handshake failed: {0}")]
    Tls(Fault),
    #[error(
        "it speaks plain tcp, and this end has certificates. Give it `tls_cert`, `tls_key` and \
         `tls_ca`, too, or give them to neither"
    )]
    NotTls,
    #[error(
        "it speaks TLS, and this end has no certificate. Give this instance `tls_cert`, `tls_key` \
         and `tls_ca`, too, or give them to neither"
    )]
    UnexpectedTls,
    #[error("{0}")]
    System(io::Error),
}

impl From<io::Error> for AcceptError {
    fn from(error: io::Error) -> Self {
        match tls::fault_of(&error) {
            Some(fault) => Self::Tls(fault),
            None => Self::System(error),
        }
    }
}

impl AcceptError {
    /// What the connecting end is told, if there is something to tell.
    fn refusal(&self) -> Option<RefusalCode> {
        match self {
            Self::Hello(HandshakeError::Version(_)) => Some(RefusalCode::Version),
            Self::Refused(code) => Some(*code),
            Self::Rdma(_) => Some(RefusalCode::NoRdma),
            Self::System(_) => Some(RefusalCode::Resources),
            Self::NotTls => Some(RefusalCode::NeedsTls),
            Self::UnexpectedTls => Some(RefusalCode::NoTls),
            Self::Hello(_) | Self::Memory(_) | Self::Tls(_) => None,
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
            opening: Opening::New(stream),
            bytes: Box::new([0; MESSAGE_BYTES + OFFER_BYTES]),
            num_bytes: 0,
        };
        Self { deadline, socket }
    }

    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        match &self.socket {
            PendingSocket::Shm(socket) => socket.as_fd(),
            PendingSocket::Tcp { opening, .. } => match opening {
                Opening::New(socket) | Opening::ShakingHands(_, socket) => socket.as_fd(),
                Opening::Open(stream) => stream.socket().as_fd(),
                Opening::Over => unreachable!("one that is over is not waited for"),
            },
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
    let link = ShmLink::new(*terms, outgoing, peer_memory, (own_socket, state));
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
    opening: &mut Opening,
    bytes: &mut [u8; MESSAGE_BYTES + OFFER_BYTES],
    num_bytes: &mut usize,
) -> Result<Option<Accepted>, AcceptError> {
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
    if !is_for_rdma(&hello) {
        let admitted = admit(hub, hello)?;
        let link = link_tcp(hub, hub.terms(admitted.peer), opening);
        return admitted.finish(hub, link);
    }
    if !read_up_to(bytes.len(), stream, bytes, num_bytes)? {
        return Ok(None);
    }
    let admitted = admit(hub, hello)?;
    let terms = hub.terms(admitted.peer);
    let link = link_rdma(hub, terms, opening, &bytes[MESSAGE_BYTES..]);
    admitted.finish(hub, link)
}

impl Opening {
    /// Goes on up to where the hello can be read, and returns the stream if it has come there.
    fn advance(&mut self, hub: &Hub) -> Result<Option<&Stream>, AcceptError> {
        if let Self::New(socket) = self {
            let mut first = [0];
            match socket.peek(&mut first) {
                Ok(0) => return Err(HandshakeError::Size(0).into()),
                Ok(_) => {}
                Err(error) if is_passing(&error) => return Ok(None),
                Err(error) => return Err(error.into()),
            }
            let is_tls = first[0] == TLS_FIRST_BYTE;
            let accepting = match &hub.tls {
                Some(tls) if is_tls => Some(Box::new(Accepting::new(tls)?)),
                None if is_tls => return Err(AcceptError::UnexpectedTls),
                // Read up to the hello, to tell a peer from a stranger.
                _ => None,
            };
            if let Self::New(socket) = std::mem::replace(self, Self::Over) {
                *self = match accepting {
                    Some(accepting) => Self::ShakingHands(accepting, socket),
                    None => Self::Open(Stream::Plain(socket)),
                };
            }
        }
        if let Self::ShakingHands(..) = self
            && let Self::ShakingHands(accepting, socket) = std::mem::replace(self, Self::Over)
        {
            *self = match accepting.advance(socket)? {
                Handshake::Waiting(accepting, socket) => Self::ShakingHands(accepting, socket),
                Handshake::Done(stream) => Self::Open(Stream::Tls(stream)),
            };
        }
        match self {
            Self::Open(stream) => Ok(Some(stream)),
            _ => Ok(None),
        }
    }

    /// Says why there is no link, in clear text where the peer speaks that.
    fn refuse(&self, hub: &Hub, code: RefusalCode, message: &[u8]) -> io::Result<()> {
        match self {
            Self::Open(stream) => {
                drain(stream.socket());
                if hub.tls.is_some() && stream.encryption().is_none() {
                    return stream.write_all(&Message::anonymous_refusal(code));
                }
                stream.write_all(message)
            }
            Self::New(socket) => {
                drain(socket);
                let mut socket = socket;
                socket.write_all(message)
            }
            Self::ShakingHands(..) | Self::Over => Ok(()),
        }
    }

    /// The stream, which is open, for a link.
    fn take(&mut self) -> Stream {
        match std::mem::replace(self, Self::Over) {
            Self::Open(stream) => stream,
            _ => unreachable!("a link is made of a stream that its hello came by"),
        }
    }

    /// The stream, while it is here.
    fn stream(&self) -> &Stream {
        match self {
            Self::Open(stream) => stream,
            _ => unreachable!("a link is made of a stream that its hello came by"),
        }
    }
}

/// Takes what else has come: a socket that is closed over unread bytes may take back what was sent.
fn drain(mut socket: &TcpStream) {
    let mut scratch = [0; 1024];
    for _ in 0..16 {
        if !matches!(socket.read(&mut scratch), Ok(1..)) {
            return;
        }
    }
}

fn is_passing(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
    )
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
    terms: LinkTerms,
    opening: &mut Opening,
    offer: &[u8],
) -> Result<Box<dyn Link>, AcceptError> {
    if !hub.has_rdma {
        return Err(RdmaError::NotOffered.into());
    }
    let stream = opening.stream();
    let control = stream.socket().local_addr()?.ip();
    let end = rdma::Prepared::answer(&hub.rdma_devices, terms, control, offer)?;
    tcp_socket::prepare(stream.socket(), hub.settings.peer_timeout)?;
    // As for TCP, no refusal may follow. From here on the peer may write.
    stream.write_all(&[&hub.message(Kind::Welcome)[..], &end.offer()].concat())?;
    let control = opening.take().into_socket().into();
    Ok(end.into_link(control, hub.new_state(), &hub.settings)?)
}

fn link_tcp(hub: &Hub, terms: LinkTerms, opening: &mut Opening) -> io::Result<Box<dyn Link>> {
    let slots = TcpSlots::new(&terms)?;
    let stream = opening.stream();
    tcp_socket::prepare(stream.socket(), hub.settings.peer_timeout)?;
    // A refusal may not follow this, short of a thread that cannot be started: the peer then sees
    // its link end. Does not block: 64 bytes fit a fresh socket.
    stream.write_all(&hub.message(Kind::Welcome))?;
    let state = hub.new_state();
    Ok(Box::new(TcpLink::new(terms, slots, opening.take(), state)?))
}
