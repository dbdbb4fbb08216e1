//! Links through shared memory: tensors lie in the slot, and a push moves nothing but a number.
//!
//! A Unix socket carries the handshake and the descriptors, then at most a request for a new link; its
//! hang-up is how a peer's death is seen.
//!
//! Each end makes the memory that it writes and seals it so that the peer can only read it: a peer
//! can corrupt what it sends, and nothing else. The socket's address is in the abstract namespace:
//! it vanishes with its process, also after `kill -9`, while a path would stay behind. What a path
//! has and an abstract address has not is permissions, so both ends check the other's user. Between
//! network namespaces (most containers) it is out of reach, and `auto` takes TCP. Needs Linux 5.1,
//! for the seal against later writers.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use rustix::io::retry_on_intr;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, Shutdown, SocketAddrUnix, SocketFlags, SocketType, sockopt,
};
use step3rt_core::ids::LaneId;

use crate::bell::FarRinger;
use crate::contract::{Doorbell, Link, LinkEvent, LinkIdentity, PushError, SlotMemory};
use crate::credentials::PeerCredentials;
use crate::doorbell::FutexDoorbell;
use crate::frame::Frame;
use crate::handshake::{MAX_FOLLOWING_BYTES, MESSAGE_BYTES};
use crate::lane::{Lanes, LinkTerms};
use crate::memory::MapError;
use crate::region::Region;
use crate::reset_ask;
use crate::state::LinkState;

/// Descriptors beside a hello or welcome: the sender's slots and the sender's doorbell.
pub(crate) const NUM_PASSED_FDS: usize = 2;

/// Bytes of randomness in a socket's name, so that it cannot be taken in advance.
const NAME_RANDOM_BYTES: usize = 16;

const BACKLOG: i32 = 128;

/// What a message came with.
pub(crate) struct Received {
    pub(crate) bytes: [u8; MESSAGE_BYTES],
    pub(crate) num_bytes: usize,
    pub(crate) fds: Vec<OwnedFd>,
    following: Box<[u8; MAX_FOLLOWING_BYTES]>,
}

impl Received {
    /// What came behind the message.
    pub(crate) fn following(&self) -> &[u8] {
        let len = self.num_bytes.saturating_sub(MESSAGE_BYTES);
        &self.following[..len.min(MAX_FOLLOWING_BYTES)]
    }
}

/// Binds a listener; returns it with its address, an `@` and the abstract name.
pub(crate) fn listen() -> io::Result<(OwnedFd, String)> {
    let mut random = [0; NAME_RANDOM_BYTES];
    rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty())?;
    let name = format!(
        "step3rt-{}-{:032x}",
        std::process::id(),
        u128::from_ne_bytes(random)
    );
    let socket = socket(SocketFlags::CLOEXEC | SocketFlags::NONBLOCK)?;
    rustix::net::bind(
        &socket,
        &SocketAddrUnix::new_abstract_name(name.as_bytes())?,
    )?;
    rustix::net::listen(&socket, BACKLOG)?;
    Ok((socket, format!("@{name}")))
}

/// Takes the next connection of a listener, not blocking, if the user at its other end may have it.
pub(crate) fn accept(listener: &OwnedFd) -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::accept_with(listener, flags)?;
    check_user(&socket)?;
    Ok(socket)
}

/// Connects to an address made by [`listen`]; the socket's calls give up after `timeout`.
pub(crate) fn connect(address: &str, timeout: Duration) -> io::Result<OwnedFd> {
    let name = address.strip_prefix('@').ok_or_else(|| {
        io::Error::new(
            io::ErrorKind::InvalidInput,
            "an shm address starts with '@'",
        )
    })?;
    let address = SocketAddrUnix::new_abstract_name(name.as_bytes())?;
    let socket = socket(SocketFlags::CLOEXEC)?;
    sockopt::set_socket_timeout(&socket, sockopt::Timeout::Recv, Some(timeout))?;
    sockopt::set_socket_timeout(&socket, sockopt::Timeout::Send, Some(timeout))?;
    retry_on_intr(|| rustix::net::connect(&socket, &address))?;
    check_user(&socket)?;
    Ok(socket)
}

fn socket(flags: SocketFlags) -> io::Result<OwnedFd> {
    // Keeps message boundaries, so that a message and its descriptors come together or not at all.
    Ok(rustix::net::socket_with(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        flags,
        None,
    )?)
}

/// A process of root may link any, and any may link one of root: `serve` under systemd and a test
/// by hand need not be the same user.
fn check_user(socket: &OwnedFd) -> io::Result<()> {
    const ROOT: u32 = 0;
    let (peer, own) = (
        PeerCredentials::of(socket)?.user,
        rustix::process::geteuid().as_raw(),
    );
    if peer == own || peer == ROOT || own == ROOT {
        return Ok(());
    }
    let text = format!("the process at the other end runs as user {peer}, this one as {own}");
    Err(io::Error::new(io::ErrorKind::PermissionDenied, text))
}

/// A descriptor that becomes readable when the process at the other end ends. A hang-up alone does
/// not say that when a child that the peer forked holds its socket open. None where it cannot be
/// had; the hang-up has to do then.
pub(crate) fn peer_process(socket: impl AsFd) -> Option<OwnedFd> {
    PeerCredentials::of(socket).ok()?.watch_process()
}

/// Sends one handshake message, with what follows it.
pub(crate) fn send(
    socket: &OwnedFd,
    bytes: &[u8],
    fds: &[std::os::fd::BorrowedFd<'_>],
) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(NUM_PASSED_FDS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let parts = [IoSlice::new(bytes)];
    retry_on_intr(|| rustix::net::sendmsg(socket, &parts, &mut control, SendFlags::NOSIGNAL))?;
    Ok(())
}

/// Receives one handshake message; an empty one is the end of the connection. Descriptors beyond
/// those expected are closed by the kernel.
pub(crate) fn receive(socket: &OwnedFd) -> io::Result<Received> {
    let mut bytes = [0; MESSAGE_BYTES];
    // Of a fixed size: nothing is allocated on a stranger's word.
    let mut following = Box::new([0; MAX_FOLLOWING_BYTES]);
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(NUM_PASSED_FDS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut parts = [
        IoSliceMut::new(&mut bytes),
        IoSliceMut::new(&mut following[..]),
    ];
    // With TRUNC the length is that of the message, so that one too long is noticed.
    let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::TRUNC;
    let num_bytes =
        retry_on_intr(|| Ok(rustix::net::recvmsg(socket, &mut parts, &mut control, flags)?.bytes))?;
    let mut fds = Vec::with_capacity(NUM_PASSED_FDS);
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(passed) = message {
            fds.extend(passed);
        }
    }
    Ok(Received {
        bytes,
        num_bytes,
        fds,
        following,
    })
}

/// One end of a link through shared memory.
pub(crate) struct ShmLink {
    lanes: Lanes,
    peer_bell: FutexDoorbell,
    state: Arc<LinkState>,
    socket: Arc<OwnedFd>,
    /// The peer rings this end's bell.
    _ringer: Option<FarRinger>,
    is_down_reported: bool,
}

/// The peer's memory, as received beside its message: slots, doorbell.
pub(crate) struct PeerMemory {
    incoming: Region,
    bell: FutexDoorbell,
}

impl PeerMemory {
    /// Maps what the peer passed, after checking that it is what the geometry says.
    pub(crate) fn open(
        fds: &[OwnedFd; NUM_PASSED_FDS],
        terms: &LinkTerms,
    ) -> Result<Self, MapError> {
        let [slots, bell] = fds;
        let incoming = Region::open(slots, &terms.geometry, terms.side.receives())?;
        Ok(Self {
            incoming,
            bell: FutexDoorbell::open(bell)?,
        })
    }
}

impl ShmLink {
    /// A link over memory that both ends have mapped. `socket` is watched by the caller, who fails
    /// `state` when it hangs up.
    pub(crate) fn new(
        terms: LinkTerms,
        outgoing: Region,
        peer: PeerMemory,
        (socket, state, ringer): (Arc<OwnedFd>, Arc<LinkState>, Option<FarRinger>),
    ) -> Self {
        let lanes = Lanes::new(terms, outgoing, peer.incoming);
        Self {
            lanes,
            peer_bell: peer.bell,
            state,
            socket,
            _ringer: ringer,
            is_down_reported: false,
        }
    }
}

impl Link for ShmLink {
    fn peer(&self) -> LinkIdentity {
        self.lanes.terms.peer
    }

    fn fabric(&self) -> &'static str {
        "shm"
    }

    fn send_slot(&self, lane: LaneId) -> Option<Arc<dyn SlotMemory>> {
        self.lanes.outgoing.slot(lane)
    }

    fn receive_slot(&self, lane: LaneId) -> Option<Arc<dyn SlotMemory>> {
        self.lanes.incoming.slot(lane)
    }

    fn push(&mut self, lane: LaneId, frame: Frame) -> Result<(), PushError> {
        if let Some(reason) = self.state.down() {
            return Err(PushError::Down(reason.clone()));
        }
        let sequence = self.lanes.begin_push(lane, frame)?;
        self.lanes.outgoing.publish(lane, sequence);
        self.peer_bell.ring();
        Ok(())
    }

    fn ask_reset(&mut self, reason: &str) -> io::Result<()> {
        for note in reset_ask::encode(reason) {
            let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
            retry_on_intr(|| rustix::net::send(&*self.socket, &note, flags))?;
        }
        Ok(())
    }

    fn poll(&mut self, out: &mut Vec<LinkEvent>) {
        self.state
            .poll_lanes(&mut self.lanes, &mut self.is_down_reported, out);
    }
}

impl Drop for ShmLink {
    fn drop(&mut self) {
        // The watcher holds the socket too: the peer must see the end now, and so does the watcher,
        // which then lets go of it. Fails only when the peer was first.
        let _ = rustix::net::shutdown(&*self.socket, Shutdown::Both);
    }
}
