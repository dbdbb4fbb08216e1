//! What the other end of an RDMA link says of its queue pairs, and what a completion says.

use step3rt_core::ids::LaneId;

use super::{MEND, byte, bytes, mend};
use crate::contract::MAX_LANES;
use crate::rdma::gid::Network;
use crate::rdma::layout::Completion;
use crate::rdma::offer::{OFFER_BYTES, Offer};
use crate::rdma::request::{Request, SEQUENCE_MASK, immediate};
use crate::rdma::route::Route;
use crate::refusal::HandshakeError;

pub(super) const SELECTOR: u8 = 4;
pub(super) const REQUEST_SELECTOR: u8 = 3;

/// Queue pairs and packets have 24-bit numbers.
const NUMBER_MASK: u32 = 0xff_ffff;

/// An offer that was taken says what its bytes say, and holds nothing that a device refuses.
pub(super) fn run(mut data: &[u8]) {
    let flags = byte(&mut data);
    let num_lanes = 1 + byte(&mut data) % MAX_LANES;
    let mut bytes = data[..data.len().min(2 * OFFER_BYTES)].to_vec();
    if flags & MEND != 0 && bytes.len() == OFFER_BYTES {
        mend(&mut bytes);
    }
    match Offer::decode(&bytes, num_lanes) {
        Ok(offer) => {
            assert_eq!(offer.encode()[..], bytes[..], "an offer has one form");
            check(&offer, num_lanes);
        }
        Err(HandshakeError::Size(found)) => {
            assert_eq!(found, bytes.len());
            assert_ne!(found, OFFER_BYTES);
        }
        Err(HandshakeError::Magic(_)) => assert_ne!(&bytes[..4], b"S3RO"),
        Err(HandshakeError::Checksum) => {
            let crc = crc32fast::hash(&bytes[..OFFER_BYTES - 4]);
            assert_ne!(bytes[OFFER_BYTES - 4..], crc.to_le_bytes());
        }
        Err(HandshakeError::Field { field, value }) => {
            let is_justified = match field {
                "network" => value > 3 && value == bytes[4].into(),
                "mtu" => !(1..=5).contains(&value) && value == bytes[5].into(),
                "psn" => value > NUMBER_MASK.into(),
                "queue_pair" => {
                    let places = bytes[40..OFFER_BYTES - 4].chunks_exact(4);
                    places.clone().any(|place| {
                        u64::from(u32::from_le_bytes(place.try_into().expect("four"))) == value
                    })
                }
                _ => false,
            };
            assert!(is_justified, "{field} = {value} in {bytes:?}");
        }
        Err(error) => panic!("{error} of an offer alone"),
    }
}

/// What is handed to the device on a peer's word.
fn check(offer: &Offer, num_lanes: u8) {
    for (lane, number) in (0..MAX_LANES).zip(offer.queue_pairs) {
        assert_eq!((1..=NUMBER_MASK).contains(&number), lane < num_lanes);
        assert!(lane < num_lanes || number == 0);
    }
    let route = Route {
        port: 1,
        gid_index: 1,
        mtu_code: offer.mtu_code,
        remote_gid: offer.gid,
        remote_lid: (offer.network == Network::Infiniband).then_some(offer.lid),
        local_psn: 0,
        remote_psn: offer.psn,
    };
    let attributes = route.to_receive(offer.queue_pairs[0]);
    assert!((1..=5).contains(&attributes.path_mtu));
    assert!(attributes.rq_psn <= NUMBER_MASK && attributes.dest_qp_num <= NUMBER_MASK);
    assert_eq!((route.to_init().port_num, route.to_send().sq_psn), (1, 0));
}

/// What a completion carries of ours and of the peer's: an id, and an immediate.
pub(super) fn run_request(mut data: &[u8]) {
    let wr_id = u64::from_le_bytes(bytes(&mut data));
    let completion = Completion {
        wr_id,
        ..Completion::default()
    };
    if let Some(request) = Request::of(&completion) {
        assert_eq!(request.id(), wr_id, "a request has one id");
    } else {
        assert!(wr_id >> 8 > 3);
    }
    let (lane, sequence) = (byte(&mut data), u64::from_le_bytes(bytes(&mut data)));
    let immediate = immediate(LaneId(lane), sequence);
    assert_eq!(immediate >> 24, lane.into());
    assert_eq!(
        u64::from(immediate) & SEQUENCE_MASK,
        sequence & SEQUENCE_MASK
    );
}

pub(super) fn seeds() -> Vec<Vec<u8>> {
    let mut queue_pairs = [0; MAX_LANES as usize];
    queue_pairs[..3].copy_from_slice(&[17, 18, NUMBER_MASK]);
    let offer = Offer {
        network: Network::RoceV2Ipv4,
        mtu_code: 5,
        lid: 0,
        psn: 0x12_3456,
        rkey: 0xdead_beef,
        slots_at: 0x7f00_0000_1000,
        gid: [7; 16],
        queue_pairs,
    };
    let infiniband = Offer {
        network: Network::Infiniband,
        lid: 9,
        ..offer
    };
    let seed = |head: &[u8], offer: &Offer| [&[SELECTOR], head, &offer.encode()].concat();
    let mut seeds = vec![
        seed(&[0, 2], &offer),
        seed(&[MEND, 2], &infiniband),
        seed(&[MEND, 1], &offer),
        seed(&[MEND, 3], &offer),
    ];
    for at in [4, 5, 11, 43] {
        let mut spoiled = seed(&[MEND, 2], &offer);
        spoiled[3 + at] = 99;
        seeds.push(spoiled);
    }
    seeds.push(seed(&[MEND, 2], &offer)[..100].to_vec());
    seeds
}

pub(super) fn request_seeds() -> Vec<Vec<u8>> {
    let requests = [
        Request::Frame(LaneId(3)),
        Request::Receive(LaneId(0)),
        Request::Probe(LaneId(1)),
        Request::Chunk(LaneId(255)),
    ];
    let seed = |request: Request| [&[REQUEST_SELECTOR][..], &request.id().to_le_bytes()].concat();
    requests.map(seed).to_vec()
}
