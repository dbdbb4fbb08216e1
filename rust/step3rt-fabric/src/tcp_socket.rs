//! TCP sockets: connecting, accepting, options, and the bytes of frames.
//!
//! It never looks into a frame.

use std::io;
use std::net::{Shutdown, TcpListener, TcpStream, ToSocketAddrs};
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use rustix::net::sockopt;

use crate::contract::DownReason;
use crate::memory::Mapping;
use crate::stream::Stream;
use crate::tls;

/// Probes of a silent peer's host start after this long and come this often, the least that TCP
/// allows.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(1);

/// The congestion control that every kernel has and everybody may choose. It does not pace.
const UNPACED: &str = "reno";

/// Connects to `host:port` within `timeout`, trying each address that the name has. Looking the name
/// up takes what the resolver takes.
pub(crate) fn connect(address: &str, timeout: Duration) -> io::Result<TcpStream> {
    let deadline = Instant::now() + timeout;
    let mut last_error = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    for address in address.to_socket_addrs()? {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        match TcpStream::connect_timeout(&address, left) {
            Ok(stream) => {
                stream.set_write_timeout(Some(timeout))?;
                return Ok(stream);
            }
            Err(error) => last_error = error,
        }
    }
    Err(last_error)
}

/// Takes the next connection of a listener, not blocking.
pub(crate) fn accept(listener: &TcpListener) -> io::Result<TcpStream> {
    let (stream, _) = listener.accept()?;
    stream.set_nonblocking(true)?;
    Ok(stream)
}

/// Sets a socket up for frames, once the handshake is over.
pub(crate) fn prepare(stream: &TcpStream, peer_timeout: Duration) -> io::Result<()> {
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(None)?;
    stream.set_write_timeout(None)?;
    stream.set_nodelay(true)?;
    // Keepalive finds a host that fell silent while nothing was being sent, the user timeout one
    // that stopped acknowledging what was. With 3 s, a link whose wire was cut was down after 3.2 s
    // either way (2026-11-22, two network namespaces).
    sockopt::set_socket_keepalive(stream, true)?;
    sockopt::set_tcp_keepidle(stream, KEEPALIVE_INTERVAL)?;
    sockopt::set_tcp_keepintvl(stream, KEEPALIVE_INTERVAL)?;
    let num_probes = u32::try_from(peer_timeout.as_secs().clamp(1, 100)).expect("at most 100");
    sockopt::set_tcp_keepcnt(stream, num_probes)?;
    let timeout_ms = u32::try_from(peer_timeout.as_millis()).unwrap_or(u32::MAX);
    sockopt::set_tcp_user_timeout(stream, timeout_ms)?;
    Ok(())
}

/// Keeps the kernel from spacing out what is sent between two ends of one host. Between hosts that is
/// the system's choice, `net.ipv4.tcp_congestion_control`, because others use the network as well.
///
/// BBR paces by how fast it has seen bytes arrive, which is what it lets pass: on one host, where bytes
/// are copied at once, a connection that was slow for a moment stays slow. 1.75 MiB took 525 µs
/// with it and 157 µs without (2026-11-22, docs/links.md).
pub(crate) fn send_unpaced_within_host(stream: &TcpStream) -> io::Result<()> {
    let (ours, peers) = (stream.local_addr()?.ip(), stream.peer_addr()?.ip());
    if (ours == peers || peers.is_loopback())
        && let Err(error) = sockopt::set_tcp_congestion(stream, UNPACED)
    {
        tracing::debug!(%error, "the system's congestion control stays, which may pace frames");
    }
    Ok(())
}

/// A socket that carries frames: all of their bytes pass here. No call blocks; one that would is an
/// error of that kind.
pub(crate) struct FrameSocket {
    stream: Stream,
}

impl FrameSocket {
    /// Of a socket whose handshake is over, once it is set up for frames.
    pub(crate) fn new(stream: Stream, peer_timeout: Duration) -> io::Result<Self> {
        prepare(stream.socket(), peer_timeout)?;
        send_unpaced_within_host(stream.socket())?;
        stream.socket().set_nonblocking(true)?;
        Ok(Self { stream })
    }

    /// Of a socket that is no TCP socket, and has none of its options.
    #[cfg(any(test, fuzzing))]
    pub(crate) fn without_options(stream: Stream) -> io::Result<Self> {
        stream.socket().set_nonblocking(true)?;
        Ok(Self { stream })
    }

    /// How it is encrypted, for people; `None` when it is not.
    pub(crate) fn encryption(&self) -> Option<&str> {
        self.stream.encryption()
    }

    /// Whether there is something to receive that polling the socket does not tell of.
    pub(crate) fn holds_more(&self) -> bool {
        self.stream.holds_more()
    }

    /// Sends bytes of a mapping; may send fewer than asked. A call that would block is made again with
    /// the same first byte.
    pub(crate) fn send(&self, memory: &Mapping, range: Range<usize>) -> io::Result<usize> {
        retry_on_signal(|| self.stream.send(memory, range.clone(), 0))
    }

    /// Receives into a mapping; may receive fewer than asked, and 0 when the peer has closed.
    pub(crate) fn receive(&self, memory: &Mapping, range: Range<usize>) -> io::Result<usize> {
        retry_on_signal(|| self.stream.receive(memory, range.clone()))
    }

    /// The same for bytes that lie in no slot yet.
    pub(crate) fn receive_header(&self, bytes: &mut [u8]) -> io::Result<usize> {
        retry_on_signal(|| self.stream.read(bytes))
    }

    /// Ends the connection for both ends.
    pub(crate) fn shut_down(&self) {
        // Fails only when the peer was first.
        let _ = self.stream.socket().shutdown(Shutdown::Both);
    }
}

impl AsFd for FrameSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.socket().as_fd()
    }
}

fn retry_on_signal(mut call: impl FnMut() -> io::Result<usize>) -> io::Result<usize> {
    loop {
        match call() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            other => return other,
        }
    }
}

/// The end of a link that an error of its socket means.
pub(crate) fn down_reason(during: &'static str, error: &io::Error) -> DownReason {
    if let Some(fault) = tls::fault_of(error) {
        return DownReason::Encryption(fault.to_string());
    }
    match error.kind() {
        io::ErrorKind::ConnectionReset
        | io::ErrorKind::ConnectionAborted
        | io::ErrorKind::BrokenPipe
        | io::ErrorKind::NotConnected => DownReason::PeerClosed,
        _ => DownReason::Transport {
            during,
            os_error: error.raw_os_error().unwrap_or(0),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn connected() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let client = connect(&address, Duration::from_secs(30)).unwrap();
        (client, accept(&listener).unwrap())
    }

    #[test]
    fn a_prepared_socket_sends_at_once_and_gives_a_silent_peer_up() {
        let (_client, socket) = connected();
        prepare(&socket, Duration::from_millis(2500)).unwrap();
        assert!(socket.nodelay().unwrap());
        assert_eq!(socket.read_timeout().unwrap(), None);
        assert!(sockopt::socket_keepalive(&socket).unwrap());
        assert_eq!(
            sockopt::tcp_keepidle(&socket).unwrap(),
            Duration::from_secs(1)
        );
        assert_eq!(
            sockopt::tcp_keepintvl(&socket).unwrap(),
            Duration::from_secs(1)
        );
        assert_eq!(sockopt::tcp_keepcnt(&socket).unwrap(), 2);
        assert_eq!(sockopt::tcp_user_timeout(&socket).unwrap(), 2500);
    }

    #[test]
    fn frames_between_two_ends_of_this_host_are_not_paced() {
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let Ok(listener) = TcpListener::bind(address) else {
                continue; // no IPv6 here
            };
            let socket = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            // As it is where that is the system's choice; not everybody may make it.
            let _ = sockopt::set_tcp_congestion(&socket, "bbr");
            let socket = FrameSocket::new(Stream::Plain(socket), Duration::from_secs(3)).unwrap();
            assert_eq!(sockopt::tcp_congestion(&socket).unwrap(), "reno");
        }
    }

    #[test]
    fn an_address_without_a_port_is_an_error() {
        for address in ["127.0.0.1", "127.0.0.1:x", ""] {
            assert!(
                connect(address, Duration::from_secs(30)).is_err(),
                "{address}"
            );
        }
    }
}
