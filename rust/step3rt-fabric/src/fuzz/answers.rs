//! What comes to the connecting end where an answer is due.

use std::sync::OnceLock;

use super::handshakes::hub;
use super::messages::{self, CHOICE, PROPOSED, lower_link_epoch};
use super::{LOCAL, MEND, PEER, byte, bytes, introduction, mend};
use crate::address::{FabricKind, PeerAddress};
use crate::choice::Candidate;
use crate::connect::{Abandoned, Attempt};
use crate::connect_error::ConnectError;
use crate::contract::Side;
use crate::handshake::{By, Kind, MESSAGE_BYTES, Message};
use crate::hub::Hub;
use crate::refusal::HandshakeError;

pub(super) const SELECTOR: u8 = 3;

/// The connecting end; it keeps nothing of an answer.
static HUB: OnceLock<Hub> = OnceLock::new();

/// Whether it asked for device memory.
const BY_DEVICE: u8 = 2;

/// Bytes that come to the connecting end where an answer is due.
pub(super) fn run(mut data: &[u8]) {
    let flags = byte(&mut data);
    let mut answer: [u8; MESSAGE_BYTES] = bytes(&mut data);
    lower_link_epoch(&mut answer);
    if flags & MEND != 0 {
        mend(&mut answer);
    }
    let hub = HUB.get_or_init(|| hub(introduction(LOCAL, Side::Initiator)));
    let peer = PeerAddress {
        identity: PEER,
        boot_id: String::new(),
        addresses: Vec::new(),
    };
    let is_by_device = flags & BY_DEVICE != 0;
    let attempt = Attempt {
        hub,
        peer: &peer,
        candidate: Candidate {
            fabric: if is_by_device {
                FabricKind::CudaIpc
            } else {
                FabricKind::Tcp
            },
            carrier: FabricKind::Tcp,
            choice: CHOICE,
        },
        reset: None,
        abandoned: &Abandoned::default(),
    };
    let decoded = Message::decode(&answer);
    let kind = decoded.map(|message| message.kind);
    let is_from_the_peer =
        decoded.is_ok_and(|message| message.from == introduction(PEER, Side::Responder));
    // Anybody may refuse, and its word is taken; a welcome has to be the one that is due.
    let good = match kind {
        Ok(Kind::Welcome { epoch, by }) if is_from_the_peer && epoch >= PROPOSED => match by {
            By::Device { offer_bytes } => is_by_device.then_some((epoch, Some(offer_bytes))),
            _ => (!is_by_device).then_some((epoch, None)),
        },
        _ => None,
    };
    match attempt.check_answer(&answer, PROPOSED) {
        Ok(welcome) => {
            let offer_bytes = welcome.offer_bytes;
            let found = (
                welcome.epoch,
                offer_bytes.map(|n| n.try_into().expect("16 bits")),
            );
            assert_eq!(Some(found), good, "{decoded:?} was taken for a welcome");
        }
        Err(ConnectError::Handshake { .. }) => {
            assert!(good.is_none(), "{decoded:?}");
            // What is well-formed is wrong only as a link that was not asked for.
            let is_welcome = matches!(kind, Ok(Kind::Welcome { .. })) && is_from_the_peer;
            let is_version = matches!(kind, Err(HandshakeError::Version(_)));
            assert!(is_welcome || !matches!(kind, Ok(Kind::Welcome { .. } | Kind::Refusal(_))));
            assert!(!is_version);
        }
        Err(ConnectError::Refused { .. }) => {
            assert!(good.is_none(), "{decoded:?}");
            let is_welcome = matches!(kind, Ok(Kind::Welcome { .. })) && !is_from_the_peer;
            let is_refusal = matches!(kind, Ok(Kind::Refusal(_)) | Err(HandshakeError::Version(_)));
            assert!(
                is_welcome || is_refusal,
                "{decoded:?} was taken for a refusal"
            );
        }
        Err(error) => panic!("{error}"),
    }
}

pub(super) fn seeds() -> Vec<Vec<u8>> {
    let seed = |flags, message: &Message| [&[SELECTOR, flags][..], &message.encode()].concat();
    let seeds = messages::each();
    let seeds = seeds.iter();
    seeds
        .flat_map(|message| [MEND, MEND | BY_DEVICE].map(|flags| seed(flags, message)))
        .collect()
}
