//! The connecting end of a handshake; blocks, with a deadline.

use std::cell::OnceCell;
use std::io;
use std::net::TcpStream;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Instant;

use step3rt_core::ids::InstanceId;

use crate::address::{FabricKind, PeerAddress};
use crate::choice::Candidate;
use crate::connect_error::ConnectError;
use crate::contract::Link;
use crate::device_offer::DeviceOffer;
use crate::handshake::{By, Kind, MESSAGE_BYTES, Message};
use crate::hub::{Hub, Watch};
use crate::lane::LinkTerms;
use crate::link_epoch::LinkEpoch;
use crate::new_link::NewLink;
use crate::rdma;
use crate::rdma_status::RdmaError;
use crate::refusal::{HandshakeError, Refusal};
use crate::region::Region;
use crate::reset_ask;
use crate::shm::{self, NUM_PASSED_FDS, PeerMemory, ShmLink};
use crate::stream::Stream;
use crate::tcp::{TcpLink, TcpSlots};
use crate::tcp_socket::{self, FrameSocket};
use crate::tls;

/// One attempt to link one peer over one fabric.
pub(crate) struct Attempt<'a> {
    pub(crate) hub: &'a Hub,
    pub(crate) peer: &'a PeerAddress,
    pub(crate) candidate: Candidate,
    /// Why the present link is to be replaced, if it is.
    pub(crate) reset: Option<&'a str>,
    /// What earlier attempts leave to later ones.
    pub(crate) abandoned: &'a Abandoned,
}

/// The control connection of a link over RDMA that the peer made and no packet came through. It stays
/// open until another link takes that one's place: were it to end before, the peer would be told that
/// this end is lost.
#[derive(Default)]
pub(crate) struct Abandoned(OnceCell<TcpStream>);

impl Abandoned {
    /// What the peer is told of the link in its hands.
    const REASON: &str = "no packet came through by RDMA";

    fn keep(&self, control: TcpStream) {
        // One is enough to try: there is one candidate over RDMA.
        let _ = self.0.set(control);
    }

    fn reason(&self) -> Option<&'static str> {
        self.0.get().map(|_| Self::REASON)
    }
}

/// What the peer's welcome says.
pub(crate) struct Welcome {
    pub(crate) epoch: LinkEpoch,
    /// How many bytes of its device offer follow, of a link through device memory.
    pub(crate) offer_bytes: Option<usize>,
}

/// A link, with the bytes of the peer's device offer.
type Made = (Box<dyn Link>, Welcome, Vec<u8>);

impl Attempt<'_> {
    /// Connects, introduces, and makes the link.
    pub(crate) fn run(&self) -> Result<NewLink, ConnectError> {
        let carrier = self.candidate.carrier;
        let address = self
            .peer
            .address_of(carrier)
            .ok_or(ConnectError::NotOffered {
                instance: self.instance(),
                fabric: carrier,
            })?;
        let (link, welcome, offer) = match carrier {
            FabricKind::Shm => self.link_shm(address)?,
            FabricKind::Tcp => self.link_tcp(address)?,
            FabricKind::Rdma => self.link_rdma(address)?,
            FabricKind::CudaIpc => unreachable!("device memory carries no handshake"),
        };
        let device_offer = welcome.offer_bytes.map(|_| DeviceOffer::new(&offer));
        Ok(NewLink {
            link,
            reason: self.candidate.choice.to_string(),
            epoch: welcome.epoch,
            device_offer: device_offer.transpose().expect("a message's own limit"),
            reset: self.reset.map(ToOwned::to_owned),
        })
    }

    fn link_shm(&self, address: &str) -> Result<Made, ConnectError> {
        let terms = self.terms();
        // Before the peer begins to wait for a hello: large slots take longer than it does.
        let (outgoing, slots_fd) = Region::share(&terms.geometry, terms.side.sends())
            .map_err(|error| self.resources(error))?;
        let socket = shm::connect(address, self.hub.settings.handshake_timeout)
            .map_err(|error| self.unreachable(address, error))?;
        let proposed = self.propose()?;
        shm::send(
            &socket,
            &self.hello(proposed),
            &[slots_fd.as_fd(), self.hub.bell_fd()],
        )
        .map_err(|error| self.interrupted(error))?;
        let received = shm::receive(&socket).map_err(|error| self.interrupted(error))?;
        if received.num_bytes == 0 {
            return Err(self.interrupted(io::ErrorKind::UnexpectedEof.into()));
        }
        let welcome = self.check_answer(&received.bytes, proposed)?;
        if received.num_bytes != MESSAGE_BYTES + welcome.offer_bytes.unwrap_or(0) {
            return Err(self.wrong(HandshakeError::Size(received.num_bytes)));
        }
        let offer = received.following().to_vec();
        let fds: [OwnedFd; NUM_PASSED_FDS] = received
            .fds
            .try_into()
            .map_err(|fds: Vec<_>| self.wrong(HandshakeError::Descriptors(fds.len())))?;
        let memory = PeerMemory::open(&fds, &terms).map_err(|error| ConnectError::Memory {
            instance: self.instance(),
            error,
        })?;
        let process = shm::peer_process(&socket);
        let (socket, state) = (Arc::new(socket), self.hub.new_state());
        self.hub.watch(Watch {
            socket: Arc::clone(&socket),
            process,
            state: Arc::clone(&state),
        });
        let ends = (socket, state, self.hub.bell.expect_far_ringer().into());
        let link = ShmLink::new(terms, outgoing, memory, ends);
        Ok((Box::new(link), welcome, offer))
    }

    fn link_tcp(&self, address: &str) -> Result<Made, ConnectError> {
        let terms = self.terms();
        // As for shared memory.
        let slots = TcpSlots::new(&terms).map_err(|error| self.resources(error))?;
        let stream = self.open(address)?;
        let (welcome, offer) = self.greet(&stream, &[])?;
        let ends = (self.hub.new_state(), self.hub.bell.sockets());
        FrameSocket::new(stream, self.hub.settings.peer_timeout)
            .and_then(|socket| TcpLink::new(terms, slots, socket, ends))
            .map(|link| (Box::new(link) as Box<dyn Link>, welcome, offer))
            .map_err(|error| self.resources(error))
    }

    fn link_rdma(&self, address: &str) -> Result<Made, ConnectError> {
        let stream = self.open(address)?;
        let control = stream
            .socket()
            .local_addr()
            .map_err(|error| self.interrupted(error))?;
        let devices = &self.hub.rdma_devices;
        let mut end = rdma::Prepared::new(devices, self.terms(), control.ip())
            .map_err(|error| self.rdma(error))?;
        let (welcome, offer) = self.greet(&stream, &end.offer())?;
        let connected = end.connect(&offer);
        let socket = stream.into_socket();
        if let Err(error) = connected {
            self.abandoned.keep(socket);
            return Err(self.rdma(error));
        }
        tcp_socket::prepare(&socket, self.hub.settings.peer_timeout)
            .and_then(|()| end.into_link(socket.into(), self.hub.new_state(), &self.hub.settings))
            .map(|link| (link, welcome, offer))
            .map_err(|error| self.resources(error))
    }

    /// Says hello over TCP, with an offer of queue pairs if there is one; returns the welcome and the
    /// offer behind it.
    fn greet(
        &self,
        stream: &Stream,
        queue_pairs: &[u8],
    ) -> Result<(Welcome, Vec<u8>), ConnectError> {
        let (proposed, deadline) = (self.propose()?, self.deadline());
        stream
            .write_all(&[&self.hello(proposed), queue_pairs].concat())
            .map_err(|error| self.interrupted(error))?;
        let bytes = stream.read_message(deadline);
        let bytes = bytes.map_err(|error| self.interrupted(error))?;
        let welcome = self.check_answer(&bytes, proposed)?;
        let mut offer = vec![0; welcome.offer_bytes.unwrap_or(queue_pairs.len())];
        stream
            .read_exact(&mut offer, deadline)
            .map_err(|error| self.interrupted(error))?;
        Ok((welcome, offer))
    }

    /// Connects, and shakes hands where this end has certificates.
    fn open(&self, address: &str) -> Result<Stream, ConnectError> {
        let timeout = self.hub.settings.handshake_timeout;
        let socket = tcp_socket::connect(address, timeout)
            .map_err(|error| self.unreachable(address, error))?;
        let Some(tls) = &self.hub.tls else {
            return Ok(Stream::Plain(socket));
        };
        tls::connect(socket, tls, address, self.deadline())
            .map(|stream| Stream::Tls(Box::new(stream)))
            .map_err(|error| self.interrupted(error))
    }

    /// A number for the link, once the peer is there: one that is dialled in vain uses none up.
    fn propose(&self) -> Result<LinkEpoch, ConnectError> {
        let instance = self.instance();
        let proposed = self.hub.used_epochs.propose();
        proposed.ok_or(ConnectError::NoEpoch { instance })
    }

    /// Of a part of the handshake that begins now.
    fn deadline(&self) -> Instant {
        Instant::now() + self.hub.settings.handshake_timeout
    }

    fn terms(&self) -> LinkTerms {
        self.hub.terms(self.peer.identity, self.by())
    }

    fn by(&self) -> By {
        match (self.candidate.fabric, &self.hub.device_offer) {
            (FabricKind::Rdma, _) => By::Rdma,
            (FabricKind::CudaIpc, Some(offer)) => By::of_offer(offer),
            _ => By::Carrier,
        }
    }

    /// A hello, with the reason and the device offer that follow it, if any do.
    fn hello(&self, epoch: LinkEpoch) -> Vec<u8> {
        let reason = self.reset.or(self.abandoned.reason());
        let (by, reason) = (self.by(), reason.map_or("", reset_ask::bounded));
        let message = self.hub.message(Kind::Hello {
            wanted: self.peer.identity,
            choice: self.candidate.choice,
            epoch,
            by,
            reason_bytes: u8::try_from(reason.len()).expect("bounded"),
        });
        [&message, reason.as_bytes(), self.hub.offer_by(by)].concat()
    }

    pub(crate) fn check_answer(
        &self,
        bytes: &[u8; MESSAGE_BYTES],
        proposed: LinkEpoch,
    ) -> Result<Welcome, ConnectError> {
        let ours = &self.hub.introduction;
        let wanted = self.peer.identity;
        let refused = |refusal| ConnectError::Refused {
            instance: self.instance(),
            refusal,
        };
        let answer = match Message::decode(bytes) {
            Err(HandshakeError::Version(version)) => {
                return Err(refused(Refusal::Version(version)));
            }
            answer => answer.map_err(|error| self.wrong(error))?,
        };
        let (epoch, by) = match answer.kind {
            Kind::Refusal(code) => return Err(refused(ours.explain(&answer.from, wanted, code))),
            Kind::Hello { .. } => return Err(self.wrong(HandshakeError::Unexpected("hello"))),
            Kind::Welcome { epoch, by } => (epoch, by),
        };
        // The peer has judged this end; this is the same judgement the other way.
        answer
            .from
            .judge(ours, wanted)
            .map_err(|code| refused(ours.explain(&answer.from, wanted, code)))?;
        let offer_bytes = match by {
            By::Device { .. } => Some(by.offer_bytes()),
            _ => None,
        };
        if offer_bytes.is_some() != (self.candidate.fabric == FabricKind::CudaIpc) {
            return Err(self.wrong(HandshakeError::Unexpected("welcome by another fabric")));
        }
        if epoch < proposed || !self.hub.used_epochs.note(epoch) {
            let (field, value) = ("link_epoch", epoch.0.into());
            return Err(self.wrong(HandshakeError::Field { field, value }));
        }
        Ok(Welcome { epoch, offer_bytes })
    }

    fn instance(&self) -> InstanceId {
        self.peer.identity.instance
    }

    fn unreachable(&self, address: &str, error: io::Error) -> ConnectError {
        let (instance, fabric) = (self.instance(), self.candidate.carrier);
        let address = address.to_owned();
        ConnectError::Unreachable {
            instance,
            fabric,
            address,
            error,
        }
    }

    fn interrupted(&self, error: io::Error) -> ConnectError {
        if let Some(fault) = tls::fault_of(&error) {
            return ConnectError::Tls {
                instance: self.instance(),
                fabric: self.candidate.carrier,
                fault,
            };
        }
        // A socket's own timeout reads as "try again".
        let error = match error.kind() {
            io::ErrorKind::WouldBlock => io::ErrorKind::TimedOut.into(),
            _ => error,
        };
        ConnectError::Interrupted {
            instance: self.instance(),
            fabric: self.candidate.carrier,
            error,
        }
    }

    fn wrong(&self, error: HandshakeError) -> ConnectError {
        ConnectError::Handshake {
            instance: self.instance(),
            fabric: self.candidate.carrier,
            error,
        }
    }

    fn rdma(&self, error: RdmaError) -> ConnectError {
        let instance = self.instance();
        ConnectError::Rdma { instance, error }
    }

    fn resources(&self, error: io::Error) -> ConnectError {
        ConnectError::Resources {
            instance: self.instance(),
            error,
        }
    }
}

#[cfg(test)]
mod tests;
