//! Stands in for `tls` in a build without it: no certificate can be given, so nothing is encrypted.

use std::convert::Infallible;
use std::io;
use std::net::TcpStream;
use std::ops::Range;
use std::time::Instant;

use thiserror::Error;

use crate::memory::Mapping;

/// There is none.
#[derive(Clone, Debug)]
pub enum Tls {}

/// There is none.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum Fault {}

pub(crate) struct TlsStream(Infallible);

pub(crate) struct Accepting(Infallible);

pub(crate) enum Handshake {
    #[expect(dead_code, reason = "is matched, never made")]
    Waiting(Box<Accepting>, TcpStream),
    #[expect(dead_code, reason = "is matched, never made")]
    Done(Box<TlsStream>),
}

pub(crate) fn connect(
    _socket: TcpStream,
    tls: &Tls,
    _address: &str,
    _deadline: Instant,
) -> io::Result<TlsStream> {
    match *tls {}
}

pub(crate) fn fault_of(_error: &io::Error) -> Option<Fault> {
    None
}

impl Accepting {
    pub(crate) fn new(tls: &Tls) -> io::Result<Self> {
        match *tls {}
    }

    pub(crate) fn advance(self: Box<Self>, _socket: TcpStream) -> io::Result<Handshake> {
        match self.0 {}
    }
}

impl TlsStream {
    pub(crate) fn socket(&self) -> &TcpStream {
        match self.0 {}
    }

    pub(crate) fn into_socket(self) -> TcpStream {
        match self.0 {}
    }

    pub(crate) fn description(&self) -> &str {
        match self.0 {}
    }

    pub(crate) fn holds_more(&self) -> bool {
        match self.0 {}
    }

    pub(crate) fn send(&self, _: &Mapping, _: Range<usize>, _flags: i32) -> io::Result<usize> {
        match self.0 {}
    }

    pub(crate) fn receive(&self, _: &Mapping, _: Range<usize>) -> io::Result<usize> {
        match self.0 {}
    }

    pub(crate) fn read(&self, _: &mut [u8]) -> io::Result<usize> {
        match self.0 {}
    }

    pub(crate) fn write_all(&self, _: &[u8]) -> io::Result<()> {
        match self.0 {}
    }
}
