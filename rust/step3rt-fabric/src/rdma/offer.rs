//! What two ends tell each other of their queue pairs, right behind a hello and a welcome.
//!
//! One message each way, of one fixed size, over the control connection and nowhere else.
//!
//! ```text
//!  0     4       5    6    8    12   16         24    40                        168   172
//!  │magic│network│mtu │lid │psn │rkey│first slot│ gid │ queue pair of each lane │ crc │
//! ```
//! Little-endian, but for the GID, which is bytes.

use crate::contract::MAX_LANES;
use crate::rdma::gid::Network;
use crate::refusal::HandshakeError;

/// Size of an offer.
pub(crate) const OFFER_BYTES: usize = QUEUE_PAIRS_AT + 4 * MAX_LANES as usize + 4;

const MAGIC: u32 = u32::from_le_bytes(*b"S3RO");
const QUEUE_PAIRS_AT: usize = 40;
const CRC_AT: usize = OFFER_BYTES - 4;

/// Numbers of queue pairs and packets have so many bits.
const NUMBER_MASK: u32 = 0xff_ffff;

/// One end's queue pairs and slots.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Offer {
    pub(crate) network: Network,
    /// As `ibv_mtu`: 1 is 256 bytes, 5 is 4096.
    pub(crate) mtu_code: u8,
    /// Of an InfiniBand port; 0 elsewhere.
    pub(crate) lid: u16,
    /// Number of the first packet that this end sends on each queue pair.
    pub(crate) psn: u32,
    /// Key of the slots that the other end writes.
    pub(crate) rkey: u32,
    /// Address of the first of them.
    pub(crate) slots_at: u64,
    pub(crate) gid: [u8; 16],
    /// Of each lane; 0 where there is no lane.
    pub(crate) queue_pairs: [u32; MAX_LANES as usize],
}

impl Offer {
    pub(crate) fn encode(&self) -> [u8; OFFER_BYTES] {
        let mut out = [0; OFFER_BYTES];
        out[0..4].copy_from_slice(&MAGIC.to_le_bytes());
        out[4] = self.network.code();
        out[5] = self.mtu_code;
        out[6..8].copy_from_slice(&self.lid.to_le_bytes());
        out[8..12].copy_from_slice(&self.psn.to_le_bytes());
        out[12..16].copy_from_slice(&self.rkey.to_le_bytes());
        out[16..24].copy_from_slice(&self.slots_at.to_le_bytes());
        out[24..40].copy_from_slice(&self.gid);
        for (place, number) in out[QUEUE_PAIRS_AT..CRC_AT]
            .chunks_exact_mut(4)
            .zip(self.queue_pairs)
        {
            place.copy_from_slice(&number.to_le_bytes());
        }
        let crc = crc32fast::hash(&out[..CRC_AT]);
        out[CRC_AT..].copy_from_slice(&crc.to_le_bytes());
        out
    }

    /// Checks everything that a stranger could have written.
    pub(crate) fn decode(bytes: &[u8], num_lanes: u8) -> Result<Self, HandshakeError> {
        let bytes: &[u8; OFFER_BYTES] = bytes
            .try_into()
            .map_err(|_| HandshakeError::Size(bytes.len()))?;
        let u32_at = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four"));
        if u32_at(0) != MAGIC {
            return Err(HandshakeError::Magic(u32_at(0)));
        }
        if u32_at(CRC_AT) != crc32fast::hash(&bytes[..CRC_AT]) {
            return Err(HandshakeError::Checksum);
        }
        let field = |field: &'static str, value: u32| HandshakeError::Field {
            field,
            value: value.into(),
        };
        let network =
            Network::from_code(bytes[4]).ok_or_else(|| field("network", bytes[4].into()))?;
        let (mtu_code, psn) = (bytes[5], u32_at(8));
        if !(1..=5).contains(&mtu_code) {
            return Err(field("mtu", mtu_code.into()));
        }
        if psn > NUMBER_MASK {
            return Err(field("psn", psn));
        }
        let queue_pairs = std::array::from_fn(|lane| u32_at(QUEUE_PAIRS_AT + 4 * lane));
        for (lane, number) in (0..MAX_LANES).zip(queue_pairs) {
            let allowed = if lane < num_lanes {
                1..=NUMBER_MASK
            } else {
                0..=0
            };
            if !allowed.contains(&number) {
                return Err(field("queue_pair", number));
            }
        }
        Ok(Self {
            network,
            mtu_code,
            lid: u16::from_le_bytes([bytes[6], bytes[7]]),
            psn,
            rkey: u32_at(12),
            slots_at: u64::from_le_bytes(bytes[16..24].try_into().expect("eight bytes")),
            gid: bytes[24..40].try_into().expect("sixteen bytes"),
            queue_pairs,
        })
    }
}

/// A packet number to start from, random so that packets of an earlier link of the same numbers are
/// told apart.
pub(crate) fn first_packet_number() -> std::io::Result<u32> {
    let mut random = [0; 4];
    rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty())?;
    Ok(u32::from_ne_bytes(random) & NUMBER_MASK)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn offer() -> Offer {
        let mut queue_pairs = [0; MAX_LANES as usize];
        queue_pairs[..3].copy_from_slice(&[17, 18, NUMBER_MASK]);
        Offer {
            network: Network::RoceV2Ipv4,
            mtu_code: 5,
            lid: 0,
            psn: 0x12_3456,
            rkey: 0xdead_beef,
            slots_at: 0x7f00_0000_1000,
            gid: [7; 16],
            queue_pairs,
        }
    }

    fn with_crc(mut bytes: [u8; OFFER_BYTES]) -> [u8; OFFER_BYTES] {
        let crc = crc32fast::hash(&bytes[..CRC_AT]);
        bytes[CRC_AT..].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    #[test]
    fn an_offer_comes_back_as_it_went() {
        assert_eq!(Offer::decode(&offer().encode(), 3), Ok(offer()));
    }

    #[test]
    fn an_offer_for_another_number_of_lanes_is_refused() {
        for num_lanes in [2, 4] {
            let error = Offer::decode(&offer().encode(), num_lanes).unwrap_err();
            assert!(
                matches!(
                    error,
                    HandshakeError::Field {
                        field: "queue_pair",
                        ..
                    }
                ),
                "{error}"
            );
        }
    }

    #[test]
    fn a_lane_that_does_not_exist_has_no_queue_pair_of_whatever_number() {
        for number in [1, NUMBER_MASK, NUMBER_MASK + 1, u32::MAX] {
            let mut offer = offer();
            offer.queue_pairs[3] = number;
            let error = HandshakeError::Field {
                field: "queue_pair",
                value: number.into(),
            };
            assert_eq!(Offer::decode(&offer.encode(), 3), Err(error));
        }
    }

    #[test]
    fn each_impossible_field_is_named() {
        for (at, name) in [(4, "network"), (5, "mtu"), (11, "psn"), (43, "queue_pair")] {
            let mut bytes = offer().encode();
            bytes[at] = 99;
            let error = Offer::decode(&with_crc(bytes), 3).unwrap_err();
            assert!(
                matches!(error, HandshakeError::Field { field, .. } if field == name),
                "{error}"
            );
        }
        assert_eq!(Offer::decode(&[0; 7], 3), Err(HandshakeError::Size(7)));
    }

    proptest! {
        #[test]
        fn every_single_damaged_byte_is_noticed(at in 0..OFFER_BYTES, flip in 1..=255_u8) {
            let mut bytes = offer().encode();
            bytes[at] ^= flip;
            prop_assert!(Offer::decode(&bytes, 3).is_err());
        }

        #[test]
        fn arbitrary_bytes_with_a_right_checksum_never_panic(
            body in proptest::collection::vec(any::<u8>(), OFFER_BYTES - 4),
            num_lanes in 1..=MAX_LANES,
        ) {
            let mut bytes = [0; OFFER_BYTES];
            bytes[..4].copy_from_slice(&MAGIC.to_le_bytes());
            bytes[4..].copy_from_slice(&body);
            bytes[4] %= 5;
            bytes[5] %= 7;
            let _ = Offer::decode(&with_crc(bytes), num_lanes);
        }
    }
}
