//! The one thread of an endpoint that waits on sockets: accepts peers and sees links hang up.
//!
//! It never touches a slot and never blocks for one peer; it rings the owner's doorbell.

use std::io;
use std::net::TcpListener;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::net::RecvFlags;

use crate::accept::{Pending, Progress};
use crate::contract::DownReason;
use crate::frame::ProtocolError;
use crate::hub::{Hub, Watch};
use crate::reset_ask::NOTE_BYTES;
use crate::{shm, tcp_socket};

/// Connections without a hello at one time; more wait in the listener's backlog.
const MAX_PENDING: usize = 64;

/// How long accepting rests after it failed, as when descriptors run out: the listener stays
/// readable all the while.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What became ready.
#[derive(Clone, Copy)]
enum Source {
    Wake,
    ShmListener,
    TcpListener,
    Pending(usize),
    WatchedSocket(usize),
    WatchedProcess(usize),
}

/// Where peers come in.
pub(crate) struct Listeners {
    pub(crate) shm: Option<OwnedFd>,
    pub(crate) tcp: Option<TcpListener>,
}

pub(crate) struct Watcher {
    hub: Arc<Hub>,
    listeners: Listeners,
    pending: Vec<Pending>,
    watches: Vec<Watch>,
    accept_after: Option<Instant>,
}

impl Watcher {
    pub(crate) fn new(hub: Arc<Hub>, listeners: Listeners) -> Self {
        Self {
            hub,
            listeners,
            pending: Vec::new(),
            watches: Vec::new(),
            accept_after: None,
        }
    }

    /// Runs until the hub stops.
    pub(crate) fn run(mut self) {
        loop {
            self.watches.extend(self.hub.take_new_watches());
            if self.hub.is_stopping() {
                return;
            }
            self.look();
        }
    }

    /// Waits once, and does what there is to do then: at most one link, because its slots take time to
    /// make, and others' hang-ups are to be seen meanwhile.
    fn look(&mut self) {
        let (mut over, mut is_any_left) = (None, false);
        for source in self.wait() {
            match source {
                Source::Wake => {}
                Source::ShmListener | Source::TcpListener => self.accept(source),
                // Is ready at the next look, too.
                Source::Pending(_) if over.is_some() => is_any_left = true,
                Source::Pending(at) => {
                    if matches!(self.pending[at].advance(&self.hub), Progress::Over) {
                        over = Some(at);
                    }
                }
                Source::WatchedSocket(at) => check_socket(&self.watches[at]),
                Source::WatchedProcess(at) => {
                    self.watches[at].state.fail(DownReason::PeerClosed);
                }
            }
        }
        // Here, where no other index is live.
        if let Some(at) = over {
            self.pending.remove(at);
        }
        // Who came in time and waits for its turn is not late.
        if !is_any_left {
            let now = Instant::now();
            self.pending.retain(|pending| pending.deadline > now);
        }
        self.watches.retain(|watch| watch.state.down().is_none());
    }

    /// Sleeps until something is ready, or a deadline has come.
    fn wait(&mut self) -> Vec<Source> {
        let now = Instant::now();
        self.accept_after = self.accept_after.filter(|after| *after > now);
        let sources = self.sources();
        let mut fds: Vec<_> = sources
            .iter()
            .map(|(_, fd)| PollFd::from_borrowed_fd(*fd, PollFlags::IN))
            .collect();
        let deadlines = self.pending.iter().map(|pending| pending.deadline);
        let first = deadlines.chain(self.accept_after).min();
        let timeout = first.map(|deadline| timespec(deadline.saturating_duration_since(now)));
        match rustix::event::poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => {
                // Out of kernel memory: nothing to do but try again, and not at once.
                tracing::error!(%error, "the fabric's watcher cannot wait for its sockets");
                std::thread::sleep(ACCEPT_PAUSE);
            }
        }
        let is_ready = |fd: &PollFd<'_>| !fd.revents().is_empty();
        let ready = sources.iter().zip(&fds).filter(|(_, fd)| is_ready(fd));
        ready.map(|((source, _), _)| *source).collect()
    }

    fn sources(&self) -> Vec<(Source, BorrowedFd<'_>)> {
        let mut sources = vec![(Source::Wake, self.hub.wake().as_fd())];
        if self.accept_after.is_none() && self.pending.len() < MAX_PENDING {
            let shm = self
                .listeners
                .shm
                .iter()
                .map(|fd| (Source::ShmListener, fd.as_fd()));
            let tcp = self
                .listeners
                .tcp
                .iter()
                .map(|fd| (Source::TcpListener, fd.as_fd()));
            sources.extend(shm.chain(tcp));
        }
        for (at, pending) in self.pending.iter().enumerate() {
            sources.push((Source::Pending(at), pending.fd()));
        }
        for (at, watch) in self.watches.iter().enumerate() {
            sources.push((Source::WatchedSocket(at), watch.socket.as_fd()));
            let process = watch
                .process
                .iter()
                .map(|fd| (Source::WatchedProcess(at), fd.as_fd()));
            sources.extend(process);
        }
        sources
    }

    fn accept(&mut self, listener: Source) {
        let deadline = Instant::now() + self.hub.settings.handshake_timeout;
        while self.pending.len() < MAX_PENDING {
            let accepted = match (listener, &self.listeners) {
                (
                    Source::ShmListener,
                    Listeners {
                        shm: Some(listener),
                        ..
                    },
                ) => shm::accept(listener).map(|socket| Pending::shm(socket, deadline)),
                (
                    Source::TcpListener,
                    Listeners {
                        tcp: Some(listener),
                        ..
                    },
                ) => tcp_socket::accept(listener).map(|stream| Pending::tcp(stream, deadline)),
                _ => return,
            };
            match accepted {
                Ok(pending) => self.pending.push(pending),
                Err(error) => match error.kind() {
                    io::ErrorKind::WouldBlock => return,
                    io::ErrorKind::Interrupted | io::ErrorKind::ConnectionAborted => {}
                    io::ErrorKind::PermissionDenied => {
                        tracing::warn!(%error, "a connection was refused");
                    }
                    _ => {
                        tracing::warn!(%error, "peers cannot be accepted now");
                        self.accept_after = Some(Instant::now() + ACCEPT_PAUSE);
                        return;
                    }
                },
            }
        }
    }
}

/// A duration as system calls take it.
pub(crate) fn timespec(duration: Duration) -> Timespec {
    Timespec {
        tv_sec: i64::try_from(duration.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: duration.subsec_nanos().into(),
    }
}

fn check_socket(watch: &Watch) {
    let mut note = [0; NOTE_BYTES];
    // With TRUNC the length is that of the message, so that one too long is noticed.
    let flags = RecvFlags::TRUNC | RecvFlags::DONTWAIT;
    let chatter = match rustix::net::recv(&*watch.socket, &mut note, flags) {
        Err(Errno::AGAIN | Errno::INTR) => return,
        Ok((_, 0)) | Err(_) => return watch.state.fail(DownReason::PeerClosed),
        Ok((_, NOTE_BYTES)) => match watch.state.hear(&note) {
            Ok(()) => return,
            Err(error) => error,
        },
        Ok(_) => ProtocolError::Chatter,
    };
    watch.state.fail(DownReason::Protocol(chatter));
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::net::TcpStream;
    use std::os::unix::net::UnixStream;

    use step3rt_core::ids::{Epoch, InstanceId};

    use super::*;
    use crate::address::ChoiceReason;
    use crate::choice::{Choice, DeviceNote};
    use crate::config::LinkSettings;
    use crate::contract::{Geometry, LinkIdentity, Side};
    use crate::handshake::{By, Introduction, Kind, Message};
    use crate::link_epoch::LinkEpoch;

    const PATIENCE: Duration = Duration::from_secs(30);

    fn introduction(instance: u32, side: Side) -> Introduction {
        Introduction {
            identity: LinkIdentity {
                instance: InstanceId(instance),
                epoch: Epoch(1),
            },
            side,
            geometry: Geometry {
                num_lanes: 1,
                a2f_slot_bytes: 64,
                f2a_slot_bytes: 64,
            },
        }
    }

    /// Says hello, and waits until it is there to be read.
    fn greeted(instance: u32, listener: &TcpListener, own: &Introduction) -> (TcpStream, Pending) {
        let mut peer = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let kind = Kind::Hello {
            wanted: own.identity,
            choice: Choice {
                reason: ChoiceReason::Setting,
                device: DeviceNote::Nothing,
            },
            epoch: LinkEpoch(1),
            by: By::Carrier,
            reason_bytes: 0,
        };
        let from = introduction(instance, Side::Initiator);
        peer.write_all(&Message { from, kind }.encode()).unwrap();
        let socket = tcp_socket::accept(listener).unwrap();
        let mut fds = [PollFd::new(&socket, PollFlags::IN)];
        rustix::event::poll(&mut fds, None).unwrap();
        (peer, Pending::tcp(socket, Instant::now() + PATIENCE))
    }

    #[test]
    fn a_hang_up_is_seen_although_many_peers_are_to_be_linked() {
        let own = introduction(9, Side::Responder);
        let hub = Arc::new(Hub::new(own, LinkSettings::default(), false, None).unwrap());
        let (shm, tcp) = (None, None);
        let mut watcher = Watcher::new(Arc::clone(&hub), Listeners { shm, tcp });
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let (_peers, pending): (Vec<_>, Vec<_>) = (1..=3)
            .map(|instance| greeted(instance, &listener, &own))
            .unzip();
        watcher.pending = pending;
        let (socket, _) = UnixStream::pair().unwrap();
        let state = hub.new_state();
        watcher.watches.push(Watch {
            socket: Arc::new(socket.into()),
            process: None,
            state: Arc::clone(&state),
        });
        watcher.look();
        assert_eq!(state.down(), Some(&DownReason::PeerClosed));
        // Making slots takes long where they are large: one link's, between two looks.
        assert_eq!(hub.take_accepted().len(), 1);
        watcher.look();
        watcher.look();
        assert_eq!(hub.take_accepted().len(), 2);
        assert!(watcher.pending.is_empty());
        hub.stop();
    }
}
