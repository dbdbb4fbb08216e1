//! The state of one TLS connection, without a socket: ciphertext in, plaintext out, and back.
//!
//! It never waits. What must be sent collects in `outgoing`, in the order in which it was encrypted,
//! and must be sent in that order.

use std::sync::Arc;

use rustls::client::UnbufferedClientConnection;
use rustls::pki_types::ServerName;
use rustls::server::UnbufferedServerConnection;
use rustls::unbuffered::{
    ConnectionState, EncodeError, EncodeTlsData, EncryptError, UnbufferedStatus, WriteTraffic,
};
use rustls::{ClientConfig, Error, ServerConfig};

/// Most plaintext that one record carries.
const RECORD_BYTES: usize = 16 * 1024;
/// More than what is around the plaintext of a record: header, content type, tag.
const RECORD_OVERHEAD_BYTES: usize = 64;
const RECORD_HEADER_BYTES: usize = 5;

/// Where a connection stands after a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// Plaintext was given; there may be more in what has come.
    Data,
    /// Nothing more without more bytes; the handshake is not over.
    Handshaking,
    /// Nothing more without more bytes; both ends know each other.
    Open,
    /// The peer has ended its side.
    Closed,
}

/// Bytes to be sent, in memory that is kept.
#[derive(Default)]
pub(super) struct Outgoing {
    bytes: Vec<u8>,
    len: usize,
}

impl Outgoing {
    pub(super) fn as_slice(&self) -> &[u8] {
        &self.bytes[..self.len]
    }

    pub(super) fn clear(&mut self) {
        self.len = 0;
    }

    /// At least `room` bytes to write to; [`Outgoing::advance`] says how many were written.
    fn spare(&mut self, room: usize) -> &mut [u8] {
        if self.bytes.len() < self.len + room {
            self.bytes.resize(self.len + room, 0);
        }
        &mut self.bytes[self.len..]
    }

    fn advance(&mut self, num_bytes: usize) {
        self.len += num_bytes;
    }
}

enum Connection {
    Client(UnbufferedClientConnection),
    Server(UnbufferedServerConnection),
}

/// One end of a TLS connection.
pub(super) struct Session {
    connection: Connection,
    pub(super) outgoing: Outgoing,
}

impl Session {
    pub(super) fn client(
        config: &Arc<ClientConfig>,
        name: ServerName<'static>,
    ) -> Result<Self, Error> {
        let connection = UnbufferedClientConnection::new(Arc::clone(config), name)?;
        Ok(Self::new(Connection::Client(connection)))
    }

    pub(super) fn server(config: &Arc<ServerConfig>) -> Result<Self, Error> {
        let connection = UnbufferedServerConnection::new(Arc::clone(config))?;
        Ok(Self::new(Connection::Server(connection)))
    }

    fn new(connection: Connection) -> Self {
        Self {
            connection,
            outgoing: Outgoing::default(),
        }
    }

    /// Version and cipher, once the handshake is over.
    pub(super) fn description(&self) -> String {
        let suite = match &self.connection {
            Connection::Client(connection) => connection.negotiated_cipher_suite(),
            Connection::Server(connection) => connection.negotiated_cipher_suite(),
        };
        let suite = suite.map_or_else(String::new, |suite| format!("{:?}", suite.suite()));
        format!(
            "encrypted by TLS 1.3, {}",
            suite.trim_start_matches("TLS13_")
        )
    }

    /// Takes ciphertext that has come, up to the next plaintext, which it gives to `sink`. Returns how
    /// many bytes of `incoming` must not be given again.
    pub(super) fn step(
        &mut self,
        incoming: &mut [u8],
        sink: &mut dyn FnMut(&[u8]),
    ) -> (usize, Result<Step, Error>) {
        let mut start = 0;
        let step = loop {
            let (outgoing, rest) = (&mut self.outgoing, &mut incoming[start..]);
            let (discard, step) = match &mut self.connection {
                Connection::Client(connection) => {
                    absorb(connection.process_tls_records(rest), outgoing, sink)
                }
                Connection::Server(connection) => {
                    absorb(connection.process_tls_records(rest), outgoing, sink)
                }
            };
            start = (start + discard).min(incoming.len());
            if let Some(step) = step.transpose() {
                break step;
            }
        };
        match step {
            // Bytes of whole records that are still needed are part of a message whose rest is to
            // come. `encrypt`, which has not got these bytes, must not be called in such a state.
            Ok(Step::Open) if holds_a_record(&incoming[start..]) => {
                let error = Error::General("a control message came in parts".to_owned());
                (start, Err(error))
            }
            step => (start, step),
        }
    }

    /// After an error: what the peer is to be told of it.
    pub(super) fn complain(&mut self, incoming: &mut [u8]) {
        let outgoing = &mut self.outgoing;
        match &mut self.connection {
            Connection::Client(connection) => {
                encode_only(connection.process_tls_records(incoming), outgoing);
            }
            Connection::Server(connection) => {
                encode_only(connection.process_tls_records(incoming), outgoing);
            }
        }
    }

    /// Encrypts `plaintext`, and before it whatever the connection itself has to say. Only when
    /// [`Step::Open`] was reached.
    pub(super) fn encrypt(&mut self, plaintext: &[u8]) -> Result<(), Error> {
        loop {
            let outgoing = &mut self.outgoing;
            let is_done = match &mut self.connection {
                Connection::Client(connection) => {
                    encrypt(connection.process_tls_records(&mut []), plaintext, outgoing)
                }
                Connection::Server(connection) => {
                    encrypt(connection.process_tls_records(&mut []), plaintext, outgoing)
                }
            };
            if is_done? {
                return Ok(());
            }
        }
    }
}

/// No step when the connection only had something to say, and may go on.
fn absorb<D>(
    status: UnbufferedStatus<'_, '_, D>,
    outgoing: &mut Outgoing,
    sink: &mut dyn FnMut(&[u8]),
) -> (usize, Result<Option<Step>, Error>) {
    let mut discard = status.discard;
    let step = status.state.and_then(|state| match state {
        ConnectionState::ReadTraffic(mut traffic) => {
            while let Some(record) = traffic.next_record() {
                let record = record?;
                discard += record.discard;
                sink(record.payload);
            }
            Ok(Some(Step::Data))
        }
        ConnectionState::EncodeTlsData(data) => encode(data, outgoing).map(|()| None),
        ConnectionState::TransmitTlsData(data) => {
            // It lies in `outgoing`, and nothing overtakes it there.
            data.done();
            Ok(None)
        }
        ConnectionState::BlockedHandshake => Ok(Some(Step::Handshaking)),
        ConnectionState::WriteTraffic(_) => Ok(Some(Step::Open)),
        ConnectionState::PeerClosed | ConnectionState::Closed => Ok(Some(Step::Closed)),
        _ => Err(out_of_order()),
    });
    (discard, step)
}

fn encode_only<D>(status: UnbufferedStatus<'_, '_, D>, outgoing: &mut Outgoing) {
    // With nothing to say, or what cannot be encoded, the socket's end says it all.
    if let Ok(ConnectionState::EncodeTlsData(data)) = status.state {
        let _ = encode(data, outgoing);
    }
}

/// Whether `plaintext` is encrypted; otherwise there was something else to do first.
fn encrypt<D>(
    status: UnbufferedStatus<'_, '_, D>,
    plaintext: &[u8],
    outgoing: &mut Outgoing,
) -> Result<bool, Error> {
    match status.state? {
        ConnectionState::WriteTraffic(traffic) => {
            write_traffic(traffic, plaintext, outgoing).map(|()| true)
        }
        ConnectionState::EncodeTlsData(data) => encode(data, outgoing).map(|()| false),
        ConnectionState::TransmitTlsData(data) => {
            data.done();
            Ok(false)
        }
        ConnectionState::PeerClosed => Ok(false),
        _ => Err(out_of_order()),
    }
}

fn write_traffic<D>(
    mut traffic: WriteTraffic<'_, D>,
    plaintext: &[u8],
    outgoing: &mut Outgoing,
) -> Result<(), Error> {
    let num_records = plaintext.len() / RECORD_BYTES + 1;
    // One more than there are, for a change of keys.
    let mut room = plaintext.len() + (num_records + 1) * RECORD_OVERHEAD_BYTES;
    loop {
        match traffic.encrypt(plaintext, outgoing.spare(room)) {
            Ok(num_bytes) => {
                outgoing.advance(num_bytes);
                return Ok(());
            }
            Err(EncryptError::InsufficientSize(error)) => room = error.required_size,
            Err(EncryptError::EncryptExhausted) => return Err(Error::EncryptError),
        }
    }
}

fn encode<D>(mut data: EncodeTlsData<'_, D>, outgoing: &mut Outgoing) -> Result<(), Error> {
    let mut room = RECORD_BYTES;
    loop {
        match data.encode(outgoing.spare(room)) {
            Ok(num_bytes) => {
                outgoing.advance(num_bytes);
                return Ok(());
            }
            Err(EncodeError::InsufficientSize(error)) => room = error.required_size,
            Err(EncodeError::AlreadyEncoded) => return Err(out_of_order()),
        }
    }
}

fn out_of_order() -> Error {
    Error::General("something came where it does not belong".to_owned())
}

/// Whether `bytes` begin with a whole record.
pub(super) fn holds_a_record(bytes: &[u8]) -> bool {
    bytes.len() >= RECORD_HEADER_BYTES && {
        let len = usize::from(u16::from_be_bytes([bytes[3], bytes[4]]));
        bytes.len() >= RECORD_HEADER_BYTES + len
    }
}
