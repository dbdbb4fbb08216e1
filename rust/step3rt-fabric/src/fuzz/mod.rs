//! What the fuzzers of `fuzz/` run on bytes that a peer could send, and the messages they begin with.
//!
//! It is in the crate's tests, which replay the committed corpus, and in builds with
//! `--cfg fuzzing`; never in a release. A target panics when a parser breaks one of its promises.

mod addresses;
mod answers;
mod frames;
mod handshakes;
mod messages;
#[cfg(feature = "rdma")]
mod offers;
mod passed;
#[cfg(test)]
#[path = "../../../../fuzz/src/replay.rs"]
mod replay;
mod slots;
mod streams;

use step3rt_core::ids::{Epoch, InstanceId};

use crate::contract::{Geometry, LinkIdentity, Side};
use crate::handshake::Introduction;
use crate::lane::LinkTerms;

/// A target: its folder in `fuzz/corpus`, and what is run on its inputs.
pub type Target = (&'static str, fn(&[u8]));

/// The crate's targets.
pub const TARGETS: [Target; 2] = [("frame", frame), ("handshake", handshake)];

/// Inputs made of messages as this build writes them, each with its target's name.
pub fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let frames = [frames::seeds(), streams::seeds(), slots::seeds()].concat();
    let handshakes = [
        messages::seeds(),
        handshakes::seeds(),
        answers::seeds(),
        addresses::seeds(),
    ]
    .concat();
    #[cfg(feature = "rdma")]
    let (frames, handshakes) = (
        [frames, offers::request_seeds()].concat(),
        [handshakes, offers::seeds()].concat(),
    );
    let frames = frames.into_iter().map(|seed| ("frame", seed));
    let handshakes = handshakes.into_iter().map(|seed| ("handshake", seed));
    frames.chain(handshakes).collect()
}

/// Headers, and what carries them: a stream, a slot that a peer writes, an immediate.
pub fn frame(mut data: &[u8]) {
    match byte(&mut data) {
        frames::SELECTOR => frames::run(data),
        streams::SELECTOR => streams::run(data),
        slots::SELECTOR => slots::run(data),
        #[cfg(feature = "rdma")]
        offers::REQUEST_SELECTOR => offers::run_request(data),
        _ => {}
    }
}

/// Hellos, answers, offers of queue pairs, addresses.
pub fn handshake(mut data: &[u8]) {
    match byte(&mut data) {
        messages::SELECTOR => messages::run(data),
        handshakes::TCP_SELECTOR => handshakes::run_tcp(data),
        handshakes::SHM_SELECTOR => handshakes::run_shm(data),
        answers::SELECTOR => answers::run(data),
        #[cfg(feature = "rdma")]
        offers::SELECTOR => offers::run(data),
        addresses::SELECTOR => addresses::run(data),
        _ => {}
    }
}

/// Rights a checksum, so that what lies behind it is reached, too.
const MEND: u8 = 0x80;

const GEOMETRY: Geometry = Geometry {
    num_lanes: 2,
    a2f_slot_bytes: 96,
    f2a_slot_bytes: 40,
};
const LOCAL: LinkIdentity = LinkIdentity {
    instance: InstanceId(2),
    epoch: Epoch(1),
};
const PEER: LinkIdentity = LinkIdentity {
    instance: InstanceId(1),
    epoch: Epoch(5),
};

fn terms(side: Side, num_lanes: u8) -> LinkTerms {
    LinkTerms {
        local: LOCAL,
        peer: PEER,
        side,
        geometry: Geometry {
            num_lanes,
            ..GEOMETRY
        },
        payload_checksum: false,
    }
}

fn introduction(identity: LinkIdentity, side: Side) -> Introduction {
    Introduction {
        identity,
        side,
        geometry: GEOMETRY,
    }
}

/// The next byte; 0 where there is none.
fn byte(data: &mut &[u8]) -> u8 {
    let Some((first, rest)) = data.split_first() else {
        return 0;
    };
    *data = rest;
    *first
}

/// The next bytes, with zeros for those that are missing.
fn bytes<const N: usize>(data: &mut &[u8]) -> [u8; N] {
    let (here, rest) = data.split_at(N.min(data.len()));
    *data = rest;
    let mut out = [0; N];
    out[..here.len()].copy_from_slice(here);
    out
}

/// Writes the CRC-32 of all bytes but the last four into those.
fn mend(message: &mut [u8]) {
    let at = message.len() - 4;
    let crc = crc32fast::hash(&message[..at]);
    message[at..].copy_from_slice(&crc.to_le_bytes());
}
