//! The accepting end of a TLS handshake, on a socket that does not block.

use std::io::{self, Write};
use std::net::TcpStream;

use super::session::{Session, Step};
use super::{Fault, Inbound, Tls, TlsStream, broken};

/// A connection whose handshake is not over.
pub(crate) struct Accepting {
    session: Session,
    inbound: Inbound,
}

/// How far a handshake has come.
pub(crate) enum Handshake {
    Waiting(Box<Accepting>, TcpStream),
    Done(Box<TlsStream>),
}

impl Accepting {
    pub(crate) fn new(tls: &Tls) -> io::Result<Self> {
        let config = &tls.settings().fabric_server;
        let session = Session::server(config).map_err(|e| broken(e.into()))?;
        Ok(Self {
            session,
            inbound: Inbound::new(),
        })
    }

    /// Takes what has come. An error that is not the socket's is a [`Fault`].
    pub(crate) fn advance(mut self: Box<Self>, socket: TcpStream) -> io::Result<Handshake> {
        loop {
            match self.inbound.fill(&socket) {
                Ok(0) => return Err(broken(Fault::PeerLeft)),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    return Ok(Handshake::Waiting(self, socket));
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            }
            let step = self.inbound.shake_hands(&mut self.session);
            // Some KiB, which a fresh socket takes at once; one that does not is not worth waiting
            // for.
            let sent = (&socket).write_all(self.session.outgoing.as_slice());
            self.session.outgoing.clear();
            match step.map_err(broken)? {
                Step::Open | Step::Data => {
                    sent?;
                    let Self { session, inbound } = *self;
                    let stream = TlsStream::new(socket, session, inbound);
                    return Ok(Handshake::Done(Box::new(stream)));
                }
                Step::Handshaking => sent?,
                Step::Closed => return Err(broken(Fault::PeerLeft)),
            }
        }
    }
}
