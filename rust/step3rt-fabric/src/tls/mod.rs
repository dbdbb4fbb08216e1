//! Links over TCP that are encrypted (TLS 1.3), and whose ends know each other by certificates.
//!
//! A connection's cryptographic state is one and cannot be split into a sending and a receiving
//! half, while whoever waits receives and the owner sends. So there are three locks, and the one that
//! both directions need is never held across a system call:
//!
//! ```text
//!   sending:    outbound ─┬─ session: encrypt ─┬─ send()
//!   receiving:  inbound  ─┴─ session: decrypt ─┴─ recv()
//! ```
//! `session` is held for the arithmetic alone, of a few records at a time. So two ends that both
//! write more than the sockets hold do not stop each other, whether their sockets block (while they
//! shake hands) or not (afterwards).

mod accepting;
mod connecting;
mod session;

use std::io;
use std::net::TcpStream;
use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::net::{RecvFlags, SendFlags};
pub use step3rt_tls::{Fault, Identity as Tls};

pub(crate) use self::accepting::{Accepting, Handshake};
pub(crate) use self::connecting::connect;
use self::session::{Outgoing, Session, Step};
use crate::memory::Mapping;

/// Plaintext that is encrypted at a time: eight records. Less makes more system calls and switches
/// between encrypting and sending (896 KiB took 299 µs with 64 KiB, 446 µs with 16 KiB, 242 µs with
/// this and with twice as much; 2026-11-22, docs/links.md), more makes the other direction wait
/// longer for the session.
const CHUNK_BYTES: usize = 128 * 1024;

/// Ciphertext that is received at a time: a chunk of the peer's, and what is left of another. At
/// least two records, of which one may be incomplete.
const RECEIVE_BYTES: usize = 2 * CHUNK_BYTES;

const TOO_LARGE: &str = "a message is larger than any that is sent here";
const ANEW: &str = "the handshake began anew";

/// An open connection.
pub(crate) struct TlsStream {
    socket: TcpStream,
    description: String,
    session: Mutex<Session>,
    inbound: Mutex<Inbound>,
    outbound: Mutex<Outbound>,
}

/// What has come and is not taken yet.
struct Inbound {
    ciphertext: Box<[u8]>,
    /// Of `ciphertext`: what has come and is not decrypted.
    unread: Range<usize>,
    /// The rest of a record whose first bytes were wanted alone, from `taken` on.
    plaintext: Vec<u8>,
    taken: usize,
    /// What followed the last plaintext, once it is known.
    end: Option<End>,
}

/// Why nothing more comes.
#[derive(Clone, Debug)]
enum End {
    Closed,
    Fault(Fault),
}

impl End {
    fn outcome(&self) -> io::Result<usize> {
        match self {
            Self::Closed => Ok(0),
            Self::Fault(fault) => Err(broken(fault.clone())),
        }
    }
}

/// What is on its way out.
struct Outbound {
    chunk: Box<[u8]>,
    ciphertext: Outgoing,
    /// How much of `ciphertext` the socket has taken.
    num_sent: usize,
    /// How many bytes of the caller's `ciphertext` stands for.
    num_plain: usize,
}

impl Inbound {
    fn new() -> Self {
        Self {
            ciphertext: vec![0; RECEIVE_BYTES].into(),
            unread: 0..0,
            plaintext: Vec::new(),
            taken: 0,
            end: None,
        }
    }

    /// Receives more ciphertext; 0 when the peer has closed.
    fn fill(&mut self, socket: &TcpStream) -> io::Result<usize> {
        self.ciphertext.copy_within(self.unread.clone(), 0);
        self.unread = 0..self.unread.len();
        let room = &mut self.ciphertext[self.unread.end..];
        if room.is_empty() {
            return Err(broken(Fault::Protocol(TOO_LARGE.to_owned())));
        }
        let (_, num_bytes) = rustix::net::recv(socket, room, RecvFlags::empty())?;
        self.unread.end += num_bytes;
        Ok(num_bytes)
    }

    /// Lets the session decrypt up to a record of what has come.
    fn step(&mut self, session: &mut Session, sink: &mut dyn FnMut(&[u8])) -> Result<Step, Fault> {
        let (discard, step) = session.step(&mut self.ciphertext[self.unread.clone()], sink);
        self.unread.start += discard;
        step.map_err(|error| {
            session.complain(&mut self.ciphertext[self.unread.clone()]);
            Fault::from(error)
        })
    }
}

impl Inbound {
    /// As [`Inbound::step`], for a handshake; what the peer sends right behind it is kept.
    fn shake_hands(&mut self, session: &mut Session) -> Result<Step, Fault> {
        let mut early = std::mem::take(&mut self.plaintext);
        let step = self.step(session, &mut |bytes| early.extend_from_slice(bytes));
        self.plaintext = early;
        step
    }
}

impl TlsStream {
    /// A connection whose handshake is over; `inbound` has what came behind it.
    fn new(socket: TcpStream, session: Session, inbound: Inbound) -> Self {
        Self {
            socket,
            description: session.description(),
            session: Mutex::new(session),
            inbound: Mutex::new(inbound),
            outbound: Mutex::new(Outbound {
                chunk: vec![0; CHUNK_BYTES].into(),
                ciphertext: Outgoing::default(),
                num_sent: 0,
                num_plain: 0,
            }),
        }
    }

    pub(crate) fn socket(&self) -> &TcpStream {
        &self.socket
    }

    pub(crate) fn into_socket(self) -> TcpStream {
        self.socket
    }

    pub(crate) fn description(&self) -> &str {
        &self.description
    }

    /// Whether a call to receive brings something without a system call: plaintext, whole records, or
    /// why nothing more comes.
    pub(crate) fn holds_more(&self) -> bool {
        let inbound = &*lock(&self.inbound);
        inbound.taken < inbound.plaintext.len()
            || inbound.end.is_some()
            || session::holds_a_record(&inbound.ciphertext[inbound.unread.clone()])
    }

    pub(crate) fn send(
        &self,
        mapping: &Mapping,
        range: Range<usize>,
        flags: i32,
    ) -> io::Result<usize> {
        let copy = |chunk: &mut [u8]| mapping.copy_out(range.start, chunk);
        self.send_from(range.len(), copy, flags)
    }

    pub(crate) fn receive(&self, mapping: &Mapping, range: Range<usize>) -> io::Result<usize> {
        let mut at = range.start;
        self.receive_to(range.len(), &mut |bytes| {
            mapping.copy_in(at, bytes);
            at += bytes.len();
        })
    }

    pub(crate) fn read(&self, bytes: &mut [u8]) -> io::Result<usize> {
        let mut at = 0;
        self.receive_to(bytes.len(), &mut |more| {
            bytes[at..at + more.len()].copy_from_slice(more);
            at += more.len();
        })
    }

    pub(crate) fn write_all(&self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let copy = |chunk: &mut [u8]| chunk.copy_from_slice(&bytes[..chunk.len()]);
            match self.send_from(bytes.len(), copy, 0) {
                Ok(num_bytes) => bytes = &bytes[num_bytes..],
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // A peer that does not accept this end's certificate says so and hangs up.
                Err(error) => return Err(self.last_word().unwrap_or(error)),
            }
        }
        Ok(())
    }

    /// What the peer said before it hung up.
    fn last_word(&self) -> Option<io::Error> {
        self.socket.set_nonblocking(true).ok()?;
        let error = self.read(&mut [0; 1]).err()?;
        (error.kind() == io::ErrorKind::InvalidData).then_some(error)
    }

    /// Sends up to `len` bytes that `copy` puts into a buffer. Says that a chunk is sent when the
    /// socket has taken all of it, and until then goes on with that chunk, whatever the call.
    fn send_from(&self, len: usize, copy: impl FnOnce(&mut [u8]), flags: i32) -> io::Result<usize> {
        let outbound = &mut *lock(&self.outbound);
        if outbound.num_plain == 0 {
            let chunk = &mut outbound.chunk[..len.min(CHUNK_BYTES)];
            copy(chunk);
            let session = &mut *lock(&self.session);
            session
                .encrypt(chunk)
                .map_err(|error| broken(Fault::from(error)))?;
            std::mem::swap(&mut session.outgoing, &mut outbound.ciphertext);
            outbound.num_plain = chunk.len();
        }
        let flags = SendFlags::from_bits_retain(flags.cast_unsigned()) | SendFlags::NOSIGNAL;
        while let rest = &outbound.ciphertext.as_slice()[outbound.num_sent..]
            && !rest.is_empty()
        {
            outbound.num_sent += rustix::net::send(&self.socket, rest, flags)?;
        }
        outbound.ciphertext.clear();
        outbound.num_sent = 0;
        Ok(std::mem::take(&mut outbound.num_plain))
    }

    /// Receives up to `len` bytes, at least one unless the peer has closed, and gives them to `put` in
    /// order.
    fn receive_to(&self, len: usize, put: &mut dyn FnMut(&[u8])) -> io::Result<usize> {
        let inbound = &mut *lock(&self.inbound);
        let kept = inbound.plaintext.len() - inbound.taken;
        if kept > 0 {
            let num_bytes = kept.min(len);
            put(&inbound.plaintext[inbound.taken..][..num_bytes]);
            inbound.taken += num_bytes;
            return Ok(num_bytes);
        }
        loop {
            if let Some(end) = &inbound.end {
                return end.outcome();
            }
            let num_bytes = self.decrypt(inbound, len, put);
            if num_bytes > 0 || len == 0 {
                return Ok(num_bytes);
            }
            if inbound.end.is_none() && inbound.fill(&self.socket)? == 0 {
                return Ok(0);
            }
        }
    }

    /// Decrypts what has come, as far as it is wanted, and returns how much was given to `put`.
    fn decrypt(&self, inbound: &mut Inbound, len: usize, put: &mut dyn FnMut(&[u8])) -> usize {
        let mut rest = std::mem::take(&mut inbound.plaintext);
        rest.clear();
        inbound.taken = 0;
        let mut num_bytes = 0;
        while num_bytes < len && !inbound.unread.is_empty() {
            // Locked anew for each record, so that a sender waits for one at most.
            let step = inbound.step(&mut lock(&self.session), &mut |bytes| {
                let (wanted, more) = bytes.split_at(bytes.len().min(len - num_bytes));
                put(wanted);
                num_bytes += wanted.len();
                rest.extend_from_slice(more);
            });
            match step {
                Ok(Step::Data) => {}
                Ok(Step::Open) => break,
                Ok(Step::Closed) => inbound.end = Some(End::Closed),
                Ok(Step::Handshaking) => {
                    inbound.end = Some(End::Fault(Fault::Protocol(ANEW.to_owned())));
                }
                Err(fault) => inbound.end = Some(End::Fault(fault)),
            }
            if inbound.end.is_some() {
                break;
            }
        }
        inbound.plaintext = rest;
        num_bytes
    }
}

fn broken(fault: Fault) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, fault)
}

/// What an error of a [`TlsStream`] means when it is not the socket's.
pub(crate) fn fault_of(error: &io::Error) -> Option<Fault> {
    error.get_ref()?.downcast_ref().cloned()
}

/// Whoever panicked was in the middle of nothing that another thread would use: its link is over.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
