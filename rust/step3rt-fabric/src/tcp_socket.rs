//! TCP sockets before they carry frames: connecting, accepting, the handshake's bytes, options.
//!
//! It never sees a frame.

use std::io::{self, Read};
use std::net::{TcpListener, TcpStream, ToSocketAddrs};
use std::time::{Duration, Instant};

use rustix::net::sockopt;

use crate::contract::DownReason;
use crate::handshake::MESSAGE_BYTES;

/// Probes of a silent peer's host start after this long and come this often, the least that TCP
/// allows.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(1);

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

/// Reads a handshake message within `timeout`, however slowly its bytes come.
pub(crate) fn read_message(
    mut stream: &TcpStream,
    timeout: Duration,
) -> io::Result<[u8; MESSAGE_BYTES]> {
    let deadline = Instant::now() + timeout;
    let mut bytes = [0; MESSAGE_BYTES];
    let mut num_bytes = 0;
    while num_bytes < MESSAGE_BYTES {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        stream.set_read_timeout(Some(left))?;
        match stream.read(&mut bytes[num_bytes..]) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(more) => num_bytes += more,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(bytes)
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
    // that stopped acknowledging what was.
    sockopt::set_socket_keepalive(stream, true)?;
    sockopt::set_tcp_keepidle(stream, KEEPALIVE_INTERVAL)?;
    sockopt::set_tcp_keepintvl(stream, KEEPALIVE_INTERVAL)?;
    let num_probes = u32::try_from(peer_timeout.as_secs().clamp(1, 100)).expect("at most 100");
    sockopt::set_tcp_keepcnt(stream, num_probes)?;
    let timeout_ms = u32::try_from(peer_timeout.as_millis()).unwrap_or(u32::MAX);
    sockopt::set_tcp_user_timeout(stream, timeout_ms)?;
    Ok(())
}

/// The end of a link that an error of its socket means.
pub(crate) fn down_reason(during: &'static str, error: &io::Error) -> DownReason {
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
