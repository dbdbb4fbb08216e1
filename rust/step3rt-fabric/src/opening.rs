//! A TCP connection that a peer has opened, up to where its hello can be read: in clear text, or once
//! the TLS handshake is over.
//!
//! It never blocks, and knows nothing of links.

use std::io::{self, Write};
use std::net::TcpStream;

use rustix::net::RecvFlags;
use std::os::fd::{AsFd, BorrowedFd};

use crate::handshake::{Message, RefusalCode};
use crate::hub::Hub;
use crate::stream::Stream;
use crate::tls::{Accepting, Handshake};

/// First byte of a TLS connection: a handshake record. A hello starts with another one.
const TLS_FIRST_BYTE: u8 = 0x16;

/// Most bytes that are taken from a connection that is refused: a hello and what follows it, and the
/// beginning of a TLS handshake, are fewer.
const MAX_DRAINED_BYTES: usize = 16 * 1024;

/// A connection, as far as it has come. Its first byte says whether it is TLS.
pub(crate) struct Opening(State);

enum State {
    New(TcpStream),
    ShakingHands(Box<Accepting>, TcpStream),
    /// The hello comes next.
    Open(Stream),
    /// In other hands, or closed.
    Over,
}

/// Why no hello will come.
pub(crate) enum Unopened {
    /// The peer left without a byte.
    Closed,
    /// It speaks TLS, and this end has no certificate.
    UnexpectedTls,
    /// Of the socket, or a [`crate::Fault`] of the TLS handshake.
    System(io::Error),
}

impl From<io::Error> for Unopened {
    fn from(error: io::Error) -> Self {
        Self::System(error)
    }
}

impl Opening {
    /// Of a socket that does not block.
    pub(crate) fn new(socket: TcpStream) -> Self {
        Self(State::New(socket))
    }

    /// What tells of bytes to come.
    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        match &self.0 {
            State::New(socket) | State::ShakingHands(_, socket) => socket.as_fd(),
            State::Open(stream) => stream.socket().as_fd(),
            State::Over => unreachable!("one that is over is not waited for"),
        }
    }

    /// Goes on up to where the hello can be read, and returns the stream if it has come there.
    pub(crate) fn advance(&mut self, hub: &Hub) -> Result<Option<&Stream>, Unopened> {
        if let State::New(socket) = &self.0 {
            let mut first = [0];
            match socket.peek(&mut first) {
                Ok(0) => return Err(Unopened::Closed),
                Ok(_) => {}
                Err(error) if is_passing(&error) => return Ok(None),
                Err(error) => return Err(error.into()),
            }
            let is_tls = first[0] == TLS_FIRST_BYTE;
            let accepting = match &hub.tls {
                Some(tls) if is_tls => Some(Box::new(Accepting::new(tls)?)),
                None if is_tls => return Err(Unopened::UnexpectedTls),
                // Read up to the hello, to tell a peer from a stranger.
                _ => None,
            };
            if let State::New(socket) = std::mem::replace(&mut self.0, State::Over) {
                self.0 = match accepting {
                    Some(accepting) => State::ShakingHands(accepting, socket),
                    None => State::Open(Stream::Plain(socket)),
                };
            }
        }
        if let State::ShakingHands(..) = &self.0
            && let State::ShakingHands(accepting, socket) =
                std::mem::replace(&mut self.0, State::Over)
        {
            self.0 = match accepting.advance(socket)? {
                Handshake::Waiting(accepting, socket) => State::ShakingHands(accepting, socket),
                Handshake::Done(stream) => State::Open(Stream::Tls(stream)),
            };
        }
        match &self.0 {
            State::Open(stream) => Ok(Some(stream)),
            _ => Ok(None),
        }
    }

    /// Says why there is no link, in clear text where the peer speaks that.
    pub(crate) fn refuse(&self, hub: &Hub, code: RefusalCode, message: &[u8]) -> io::Result<()> {
        match &self.0 {
            State::Open(stream) => {
                drain(stream.socket());
                if hub.tls.is_some() && stream.encryption().is_none() {
                    return stream.write_all(&Message::anonymous_refusal(code));
                }
                stream.write_all(message)
            }
            State::New(socket) => {
                drain(socket);
                let mut socket = socket;
                socket.write_all(message)
            }
            State::ShakingHands(..) | State::Over => Ok(()),
        }
    }

    /// The stream, which is open, for a link.
    pub(crate) fn take(&mut self) -> Stream {
        match std::mem::replace(&mut self.0, State::Over) {
            State::Open(stream) => stream,
            _ => unreachable!("a link is made of a stream that its hello came by"),
        }
    }

    /// The stream, while it is here.
    pub(crate) fn stream(&self) -> &Stream {
        match &self.0 {
            State::Open(stream) => stream,
            _ => unreachable!("a link is made of a stream that its hello came by"),
        }
    }
}

/// Takes what else has come: a socket that is closed over unread bytes may take back what was sent.
/// Does not block, also on a socket that was prepared for frames already and does.
fn drain(socket: &TcpStream) {
    let mut scratch = [0; 1024];
    for _ in 0..MAX_DRAINED_BYTES / scratch.len() {
        let received = rustix::net::recv(socket, &mut scratch, RecvFlags::DONTWAIT);
        if !matches!(received, Ok((_, 1..))) {
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
