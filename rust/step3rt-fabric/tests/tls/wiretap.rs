//! What stands between two ends of an encrypted link, and hears or spoils what passes.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use step3rt_fabric::address::PeerAddress;

use crate::common::Node;

/// Stands between an attention instance and an FFN instance, and hears or spoils what passes.
pub(crate) struct Wiretap {
    address: String,
    is_spoiling: Arc<AtomicBool>,
    directions: Option<thread::JoinHandle<[Vec<u8>; 2]>>,
}

impl Wiretap {
    pub(crate) fn start(ffn: &Node) -> Self {
        Self::lingering(ffn, Duration::ZERO)
    }

    /// One that passes on together what comes within `nap`.
    pub(crate) fn lingering(ffn: &Node, nap: Duration) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let target = ffn.address().addresses[0].address.clone();
        let is_spoiling = Arc::new(AtomicBool::new(false));
        let spoils = Arc::clone(&is_spoiling);
        let directions = thread::spawn(move || {
            let (attention, _) = listener.accept().unwrap();
            let ffn = TcpStream::connect(target).unwrap();
            let ways = [
                (attention.try_clone().unwrap(), ffn.try_clone().unwrap()),
                (ffn, attention),
            ];
            let passing = ways.map(|(from, to)| {
                let spoils = Arc::clone(&spoils);
                thread::spawn(move || pass(from, to, &spoils, nap))
            });
            passing.map(|way| way.join().unwrap())
        });
        Self {
            address,
            is_spoiling,
            directions: Some(directions),
        }
    }

    /// The FFN instance's address, by way of this.
    pub(crate) fn address(&self, ffn: &Node) -> PeerAddress {
        let mut address = ffn.address();
        address.addresses[0].address.clone_from(&self.address);
        address
    }

    pub(crate) fn spoil(&self) {
        self.is_spoiling.store(true, Ordering::Relaxed);
    }

    /// What passed from the attention instance, and from the FFN instance, once both have hung up.
    pub(crate) fn heard(&mut self) -> [Vec<u8>; 2] {
        self.directions.take().unwrap().join().unwrap()
    }
}

fn pass(mut from: TcpStream, mut to: TcpStream, spoils: &AtomicBool, nap: Duration) -> Vec<u8> {
    let mut heard = Vec::new();
    let mut buffer = [0; 8192];
    while from.peek(&mut [0]).is_ok() {
        thread::sleep(nap);
        let Ok(num_bytes @ 1..) = from.read(&mut buffer) else {
            break;
        };
        let passed = &mut buffer[..num_bytes];
        if spoils.load(Ordering::Relaxed) {
            // Past the record's header, which is checked otherwise.
            passed[num_bytes / 2] ^= 1;
        }
        heard.extend_from_slice(passed);
        if to.write_all(passed).is_err() {
            break;
        }
    }
    let _ = to.shutdown(Shutdown::Write);
    let _ = from.shutdown(Shutdown::Read);
    heard
}
