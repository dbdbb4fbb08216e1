//! The bytes of a link over TCP, in clear text or encrypted: what both have in common.
//!
//! One thread may send while another receives; neither waits for the other. It knows nothing of
//! frames.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::ops::Range;
use std::time::{Duration, Instant};

use crate::handshake::MESSAGE_BYTES;
use crate::memory::Mapping;
use crate::tls::TlsStream;

/// A connected socket, and what is between it and the link.
pub(crate) enum Stream {
    Plain(TcpStream),
    Tls(Box<TlsStream>),
}

impl Stream {
    /// For options, polling and shutting down; its bytes may be encrypted.
    pub(crate) fn socket(&self) -> &TcpStream {
        match self {
            Self::Plain(socket) => socket,
            Self::Tls(stream) => stream.socket(),
        }
    }

    /// The socket alone, for what follows a handshake in clear text.
    pub(crate) fn into_socket(self) -> TcpStream {
        match self {
            Self::Plain(socket) => socket,
            Self::Tls(stream) => stream.into_socket(),
        }
    }

    /// How it is encrypted, for people; `None` when it is not.
    pub(crate) fn encryption(&self) -> Option<&str> {
        match self {
            Self::Plain(_) => None,
            Self::Tls(stream) => Some(stream.description()),
        }
    }

    /// Whether something has come that the socket does not tell of any more, because it was taken from
    /// there: who awaits bytes must receive before.
    pub(crate) fn holds_more(&self) -> bool {
        match self {
            Self::Plain(_) => false,
            Self::Tls(stream) => stream.holds_more(),
        }
    }

    /// Sends bytes of a mapping; may send fewer. After `WouldBlock` (which `MSG_DONTWAIT` among the
    /// `flags` allows) the next call must begin with the same bytes: some may be encrypted and half
    /// on their way.
    pub(crate) fn send(
        &self,
        mapping: &Mapping,
        range: Range<usize>,
        flags: i32,
    ) -> io::Result<usize> {
        match self {
            Self::Plain(socket) => mapping.send(socket, range, flags),
            Self::Tls(stream) => stream.send(mapping, range, flags),
        }
    }

    /// Receives into a mapping, at least a byte; 0 when the peer has closed.
    pub(crate) fn receive(&self, mapping: &Mapping, range: Range<usize>) -> io::Result<usize> {
        match self {
            Self::Plain(socket) => mapping.receive(socket, range),
            Self::Tls(stream) => stream.receive(mapping, range),
        }
    }

    /// Receives as [`Stream::receive`] does, into other memory.
    pub(crate) fn read(&self, bytes: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Plain(socket) => (&*socket).read(bytes),
            Self::Tls(stream) => stream.read(bytes),
        }
    }

    /// Sends a handshake's bytes, which are few.
    pub(crate) fn write_all(&self, bytes: &[u8]) -> io::Result<()> {
        match self {
            Self::Plain(socket) => (&*socket).write_all(bytes),
            Self::Tls(stream) => stream.write_all(bytes),
        }
    }

    /// Reads exactly `bytes` up to `deadline`, however slowly they come.
    pub(crate) fn read_exact(&self, mut bytes: &mut [u8], deadline: Instant) -> io::Result<()> {
        while !bytes.is_empty() {
            self.socket().set_read_timeout(Some(left(deadline)?))?;
            match self.read(bytes) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(more) => bytes = &mut bytes[more..],
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Reads a handshake message up to `deadline`.
    pub(crate) fn read_message(&self, deadline: Instant) -> io::Result<[u8; MESSAGE_BYTES]> {
        let mut bytes = [0; MESSAGE_BYTES];
        self.read_exact(&mut bytes, deadline)?;
        Ok(bytes)
    }
}

/// The time to `deadline`; an error when there is none.
pub(crate) fn left(deadline: Instant) -> io::Result<Duration> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() {
        return Err(io::ErrorKind::TimedOut.into());
    }
    Ok(left)
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    fn after(time: Duration) -> Instant {
        Instant::now() + time
    }

    #[test]
    fn a_message_that_drips_in_is_read_up_to_the_deadline() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let client = Stream::Plain(client);
        let (mut socket, _) = listener.accept().unwrap();
        let drip = std::thread::spawn(move || {
            for byte in 0..64 {
                socket.write_all(&[byte]).unwrap();
            }
            socket
        });
        let message = client.read_message(after(Duration::from_secs(30))).unwrap();
        assert_eq!((message[0], message[63]), (0, 63));
        let mut socket = drip.join().unwrap();
        socket.write_all(&[0; MESSAGE_BYTES - 1]).unwrap();
        let error = client
            .read_message(after(Duration::from_millis(20)))
            .unwrap_err();
        assert!(matches!(
            error.kind(),
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut
        ));
    }
}
