//! The connecting end of a TLS handshake; blocks, with a deadline.

use std::io::{self, Write};
use std::net::TcpStream;
use std::time::Instant;

use rustls::pki_types::ServerName;
use step3rt_tls::FIRST_BYTE;

use super::session::{Session, Step};
use super::{Fault, Inbound, Tls, TlsStream, broken};
use crate::stream::left;

/// First byte of a peer that refuses the handshake at once.
const ALERT_BYTE: u8 = 0x15;

/// Shakes hands with the peer at `address`, which must have a certificate for its host. An error that
/// is not the socket's is a [`Fault`].
pub(crate) fn connect(
    socket: TcpStream,
    tls: &Tls,
    address: &str,
    deadline: Instant,
) -> io::Result<TlsStream> {
    let name = server_name(address)?;
    let config = &tls.settings().fabric_client;
    let mut session = Session::client(config, name).map_err(|e| broken(e.into()))?;
    let mut inbound = Inbound::new();
    let mut is_first = true;
    loop {
        let step = inbound.shake_hands(&mut session);
        // What it has to say also when it does not go on, which tells the peer why.
        let sent = (&socket).write_all(session.outgoing.as_slice());
        session.outgoing.clear();
        match step.map_err(broken)? {
            Step::Open | Step::Data => {
                sent?;
                return Ok(TlsStream::new(socket, session, inbound));
            }
            Step::Handshaking => {}
            Step::Closed => return Err(broken(Fault::PeerLeft)),
        }
        sent.map_err(hung_up)?;
        socket.set_read_timeout(Some(left(deadline)?))?;
        match inbound.fill(&socket) {
            Ok(0) => return Err(broken(Fault::PeerLeft)),
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(hung_up(error)),
        }
        if is_first && !matches!(inbound.ciphertext[0], FIRST_BYTE | ALERT_BYTE) {
            return Err(broken(Fault::PeerSpeaksPlain));
        }
        is_first = false;
    }
}

/// A peer that resets the connection now does not like what it has read.
fn hung_up(error: io::Error) -> io::Error {
    match error.kind() {
        io::ErrorKind::ConnectionReset
        | io::ErrorKind::ConnectionAborted
        | io::ErrorKind::BrokenPipe => broken(Fault::PeerLeft),
        _ => error,
    }
}

/// The host of `host:port`.
fn server_name(address: &str) -> io::Result<ServerName<'static>> {
    let host = address.rsplit_once(':').map_or(address, |(host, _)| host);
    let host = host.trim_start_matches('[').trim_end_matches(']');
    ServerName::try_from(host.to_owned()).map_err(|_| {
        let text = "its host is neither an IP address nor a name that a certificate can have";
        io::Error::new(io::ErrorKind::InvalidInput, text)
    })
}
