//! The connecting end of a handshake; blocks, with a deadline.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use step3rt_core::ids::InstanceId;
use thiserror::Error;

use crate::address::{ChoiceReason, FabricChoice, FabricKind, PeerAddress, candidates};
use crate::contract::{Link, LinkIdentity};
use crate::handshake::{Kind, MESSAGE_BYTES, Message};
use crate::hub::{Hub, Watch};
use crate::memory::MapError;
use crate::rdma;
use crate::rdma_status::RdmaError;
use crate::refusal::{HandshakeError, Refusal};
use crate::region::Region;
use crate::shm::{self, NUM_PASSED_FDS, PeerMemory, ShmLink};
use crate::tcp::{TcpLink, TcpSlots};
use crate::tcp_socket;

/// Why a peer could not be linked. Nothing of the attempt is left.
#[derive(Debug, Error)]
pub enum ConnectError {
    /// Only the initiator connects, so that two ends never connect to each other at once.
    #[error(
        "a responder does not connect: its peers connect to it. Call this on the attention instance"
    )]
    WrongSide,
    /// All places for links are taken.
    #[error("this endpoint has no room for instance {instance}. Raise `max_peers`={max_peers}")]
    Full {
        /// Whom it was to link.
        instance: InstanceId,
        /// The setting.
        max_peers: usize,
    },
    /// A later incarnation of that instance was linked before.
    #[error(
        "instance {} was linked with an epoch later than {} before. The address is out of date; wait for the \
         next topology", .0.instance, .0.epoch
    )]
    Stale(LinkIdentity),
    /// The fabric that the setting asks for is not among the peer's addresses.
    #[error(
        "instance {instance} does not listen on {fabric}. Set `fabric` to \"auto\" or have it listen"
    )]
    NotOffered {
        /// Whom it was to link.
        instance: InstanceId,
        /// What was asked for.
        fabric: FabricKind,
    },
    /// Nobody answers there.
    #[error(
        "instance {instance} cannot be reached over {fabric} at {address}: {error}. See that it \
         runs and that nothing between the hosts blocks the port"
    )]
    Unreachable {
        /// Whom it was to link.
        instance: InstanceId,
        /// Tried last.
        fabric: FabricKind,
        /// Tried last.
        address: String,
        /// Of the operating system.
        error: io::Error,
    },
    /// Something answered that makes no sense.
    #[error(
        "instance {instance} answered over {fabric}, but not as a peer does: {error}. See that a \
         step3rt instance of this release listens there"
    )]
    Handshake {
        /// Whom it was to link.
        instance: InstanceId,
        /// Tried last.
        fabric: FabricKind,
        /// What is wrong.
        error: HandshakeError,
    },
    /// The connection failed after it was made.
    #[error(
        "instance {instance} did not finish the handshake over {fabric}: {error}. See its log, then \
         connect again"
    )]
    Interrupted {
        /// Whom it was to link.
        instance: InstanceId,
        /// Tried last.
        fabric: FabricKind,
        /// Of the operating system.
        error: io::Error,
    },
    /// The peer said no.
    #[error("instance {instance} refused the link: {refusal}")]
    Refused {
        /// Whom it was to link.
        instance: InstanceId,
        /// Why.
        refusal: Refusal,
    },
    /// The peer's memory is not what was agreed.
    #[error(
        "instance {instance} passed memory that cannot be used: {error}. Run one release everywhere"
    )]
    Memory {
        /// Whom it was to link.
        instance: InstanceId,
        /// What is wrong.
        error: MapError,
    },
    /// No link over RDMA came about.
    #[error("instance {instance} cannot be linked over rdma: {error}")]
    Rdma {
        /// Whom it was to link.
        instance: InstanceId,
        /// What is missing, and the fix.
        error: RdmaError,
    },
    /// This end could not make the slots or threads of the link.
    #[error(
        "this end cannot make the link to instance {instance}: {error}. Raise its limit of memory, \
         descriptors or threads, or make the slots smaller with `max_tokens_per_micro_batch`"
    )]
    Resources {
        /// Whom it was to link.
        instance: InstanceId,
        /// Of the operating system.
        error: io::Error,
    },
}

impl ConnectError {
    /// Whether another fabric may do what this one could not.
    pub(crate) fn is_out_of_reach(&self) -> bool {
        matches!(
            self,
            Self::Unreachable { .. }
                | Self::Rdma { .. }
                | Self::Refused {
                    refusal: Refusal::NoRdma,
                    ..
                }
        )
    }
}

/// What an endpoint needs to link peers, in place or on a thread.
pub(crate) struct Dialer {
    pub(crate) hub: Arc<Hub>,
    pub(crate) fabric: FabricChoice,
    pub(crate) boot_id: String,
}

impl Dialer {
    /// Tries the fabrics in order; the next one only when a peer is out of reach by the one before.
    pub(crate) fn link(&self, peer: &PeerAddress) -> Result<(Box<dyn Link>, String), ConnectError> {
        let mut candidates =
            candidates(self.fabric, &self.boot_id, self.hub.has_rdma, peer).into_iter();
        let mut next = candidates.next();
        let mut unreachable: Option<ConnectError> = None;
        while let Some((fabric, choice)) = next {
            next = candidates.next();
            match (Attempt {
                hub: &self.hub,
                peer,
                fabric,
                choice,
            })
            .run()
            {
                Ok(link) => {
                    let reason = match unreachable {
                        Some(error) => format!("{choice}: {error}"),
                        None => choice.to_string(),
                    };
                    return Ok((link, reason));
                }
                Err(error) if next.is_some() && error.is_out_of_reach() => {
                    unreachable = Some(error);
                }
                // That the last resort is not even offered says less than why the first failed.
                Err(ConnectError::NotOffered { .. }) if unreachable.is_some() => break,
                Err(error) => return Err(error),
            }
        }
        Err(unreachable.expect("there is a candidate, and the last one returns its error"))
    }
}

/// One attempt to link one peer over one fabric.
pub(crate) struct Attempt<'a> {
    pub(crate) hub: &'a Hub,
    pub(crate) peer: &'a PeerAddress,
    pub(crate) fabric: FabricKind,
    pub(crate) choice: ChoiceReason,
}

impl Attempt<'_> {
    /// Connects, introduces, and makes the link.
    pub(crate) fn run(&self) -> Result<Box<dyn Link>, ConnectError> {
        let address = self
            .peer
            .address_of(self.fabric)
            .ok_or(ConnectError::NotOffered {
                instance: self.instance(),
                fabric: self.fabric,
            })?;
        match self.fabric {
            FabricKind::Shm => self.link_shm(address),
            FabricKind::Tcp => self.link_tcp(address),
            FabricKind::Rdma => self.link_rdma(address),
        }
    }

    fn link_shm(&self, address: &str) -> Result<Box<dyn Link>, ConnectError> {
        let terms = self.hub.terms(self.peer.identity);
        let socket = shm::connect(address, self.hub.settings.handshake_timeout)
            .map_err(|error| self.unreachable(address, error))?;
        let (outgoing, slots_fd) = Region::share(&terms.geometry, terms.side.sends())
            .map_err(|error| self.resources(error))?;
        shm::send(
            &socket,
            &self.hello(),
            &[slots_fd.as_fd(), self.hub.bell_fd()],
        )
        .map_err(|error| self.interrupted(error))?;
        let received = shm::receive(&socket).map_err(|error| self.interrupted(error))?;
        if received.num_bytes == 0 {
            return Err(self.interrupted(io::ErrorKind::UnexpectedEof.into()));
        }
        self.check_answer(&received.bytes)?;
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
        Ok(Box::new(ShmLink::new(
            terms,
            outgoing,
            memory,
            (socket, state),
        )))
    }

    fn link_tcp(&self, address: &str) -> Result<Box<dyn Link>, ConnectError> {
        let terms = self.hub.terms(self.peer.identity);
        let mut stream = tcp_socket::connect(address, self.hub.settings.handshake_timeout)
            .map_err(|error| self.unreachable(address, error))?;
        let slots = TcpSlots::new(&terms).map_err(|error| self.resources(error))?;
        stream
            .write_all(&self.hello())
            .map_err(|error| self.interrupted(error))?;
        let bytes = tcp_socket::read_message(&stream, self.hub.settings.handshake_timeout)
            .map_err(|error| self.interrupted(error))?;
        self.check_answer(&bytes)?;
        tcp_socket::prepare(&stream, self.hub.settings.peer_timeout)
            .and_then(|()| TcpLink::new(terms, slots, stream, self.hub.new_state()))
            .map(|link| Box::new(link) as Box<dyn Link>)
            .map_err(|error| self.resources(error))
    }

    fn link_rdma(&self, address: &str) -> Result<Box<dyn Link>, ConnectError> {
        let timeout = self.hub.settings.handshake_timeout;
        let mut stream = tcp_socket::connect(address, timeout)
            .map_err(|error| self.unreachable(address, error))?;
        let control = stream
            .local_addr()
            .map_err(|error| self.interrupted(error))?;
        let terms = self.hub.terms(self.peer.identity);
        let devices = &self.hub.rdma_devices;
        let mut end =
            rdma::Prepared::new(devices, terms, control.ip()).map_err(|error| self.rdma(error))?;
        stream
            .write_all(&[&self.hello()[..], &end.offer()].concat())
            .map_err(|error| self.interrupted(error))?;
        let bytes =
            tcp_socket::read_message(&stream, timeout).map_err(|error| self.interrupted(error))?;
        self.check_answer(&bytes)?;
        let mut offer = [0; rdma::OFFER_BYTES];
        // Sent with the welcome, and so under the timeout that was left of it.
        stream
            .read_exact(&mut offer)
            .map_err(|error| self.interrupted(error))?;
        end.connect(&offer).map_err(|error| self.rdma(error))?;
        tcp_socket::prepare(&stream, self.hub.settings.peer_timeout)
            .and_then(|()| end.into_link(stream.into(), self.hub.new_state(), &self.hub.settings))
            .map_err(|error| self.resources(error))
    }

    fn hello(&self) -> [u8; MESSAGE_BYTES] {
        self.hub.message(Kind::Hello {
            wanted: self.peer.identity,
            choice: self.choice,
            is_for_rdma: self.fabric == FabricKind::Rdma,
        })
    }

    pub(crate) fn check_answer(&self, bytes: &[u8; MESSAGE_BYTES]) -> Result<(), ConnectError> {
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
        match answer.kind {
            Kind::Refusal(code) => Err(refused(ours.explain(&answer.from, wanted, code))),
            Kind::Hello { .. } => Err(self.wrong(HandshakeError::Unexpected("hello"))),
            // The peer has judged this end; this is the same judgement the other way.
            Kind::Welcome => answer
                .from
                .judge(ours, wanted)
                .map_err(|code| refused(ours.explain(&answer.from, wanted, code))),
        }
    }

    fn instance(&self) -> InstanceId {
        self.peer.identity.instance
    }

    fn unreachable(&self, address: &str, error: io::Error) -> ConnectError {
        let (instance, fabric, address) = (self.instance(), self.fabric, address.to_owned());
        ConnectError::Unreachable {
            instance,
            fabric,
            address,
            error,
        }
    }

    fn interrupted(&self, error: io::Error) -> ConnectError {
        // A socket's own timeout reads as "try again".
        let error = match error.kind() {
            io::ErrorKind::WouldBlock => io::ErrorKind::TimedOut.into(),
            _ => error,
        };
        ConnectError::Interrupted {
            instance: self.instance(),
            fabric: self.fabric,
            error,
        }
    }

    fn wrong(&self, error: HandshakeError) -> ConnectError {
        ConnectError::Handshake {
            instance: self.instance(),
            fabric: self.fabric,
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
