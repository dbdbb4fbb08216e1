use proptest::prelude::*;

use super::*;
use crate::link_epoch::MAX_LINK_EPOCH;

fn introduction(side: Side) -> Introduction {
    Introduction {
        identity: LinkIdentity {
            instance: InstanceId(3),
            epoch: Epoch(8),
        },
        side,
        geometry: Geometry {
            num_lanes: 3,
            a2f_slot_bytes: 1 << 20,
            f2a_slot_bytes: 1 << 21,
        },
    }
}

fn kinds() -> Vec<Kind> {
    let wanted = LinkIdentity {
        instance: InstanceId(1),
        epoch: Epoch(2),
    };
    let bys = [0, 1, 4096].map(|offer_bytes| By::Device { offer_bytes });
    let mut kinds = Vec::new();
    for by in [By::Carrier, By::Rdma].into_iter().chain(bys) {
        for (reason_bytes, epoch) in [(0, 1), (1, MAX_LINK_EPOCH), (255, 0x01_02_03)] {
            kinds.extend(Choice::all().map(|choice| Kind::Hello {
                wanted,
                choice,
                epoch: LinkEpoch(epoch),
                by,
                reason_bytes,
            }));
        }
    }
    let epoch = LinkEpoch(0x01_02_03);
    for by in [By::Carrier].into_iter().chain(bys) {
        kinds.push(Kind::Welcome { epoch, by });
    }
    let refusals = [
        RefusalCode::Version,
        RefusalCode::NotMe,
        RefusalCode::SameSide,
        RefusalCode::Geometry,
        RefusalCode::Stale(Epoch(9)),
        RefusalCode::Full,
        RefusalCode::Resources,
        RefusalCode::NoRdma,
        RefusalCode::NoDeviceOffer,
        RefusalCode::NoEpoch,
        RefusalCode::FarEpoch,
    ];
    kinds.extend(refusals.map(Kind::Refusal));
    kinds
}

fn welcome() -> Message {
    let (epoch, by) = (LinkEpoch(1), By::Carrier);
    Message {
        from: introduction(Side::Initiator),
        kind: Kind::Welcome { epoch, by },
    }
}

/// The field that is then wrong, and how it is made so.
type Damage<'a> = (&'a str, &'a dyn Fn(&mut [u8; MESSAGE_BYTES]));

#[test]
fn each_impossible_field_is_named_before_anything_is_made_for_it() {
    let offer_bytes = |bytes: &mut [u8; MESSAGE_BYTES], len: u16| {
        bytes[58..60].copy_from_slice(&len.to_le_bytes());
    };
    let damages: [Damage<'_>; 6] = [
        ("offer_bytes", &|bytes| {
            bytes[56] = 2;
            offer_bytes(bytes, 4097);
        }),
        ("offer_bytes", &|bytes| offer_bytes(bytes, 1)),
        ("by", &|bytes| bytes[56] = 3),
        ("by", &|bytes| bytes[56] = 1),
        ("reason_bytes", &|bytes| bytes[57] = 1),
        ("link_epoch", &|bytes| bytes[13] = 0),
    ];
    for (name, damage) in damages {
        let mut bytes = welcome().encode();
        damage(&mut bytes);
        let crc = crc32fast::hash(&bytes[..CRC_AT]);
        bytes[CRC_AT..].copy_from_slice(&crc.to_le_bytes());
        let error = Message::decode(&bytes).unwrap_err();
        assert!(
            matches!(error, HandshakeError::Field { field, .. } if field == name),
            "{error}"
        );
    }
}

#[test]
fn every_message_comes_back_as_it_went() {
    for kind in kinds() {
        for side in [Side::Initiator, Side::Responder] {
            let message = Message {
                from: introduction(side),
                kind,
            };
            assert_eq!(Message::decode(&message.encode()), Ok(message));
        }
    }
}

#[test]
fn a_message_of_another_size_or_version_is_refused() {
    let bytes = welcome().encode();
    assert_eq!(Message::decode(&bytes[..63]), Err(HandshakeError::Size(63)));
    assert_eq!(Message::decode(&[]), Err(HandshakeError::Size(0)));
    let mut newer = bytes;
    newer[4] = 7;
    assert_eq!(Message::decode(&newer), Err(HandshakeError::Version(7)));
}

#[test]
fn each_disagreement_has_its_own_refusal() {
    let ours = introduction(Side::Responder);
    let theirs = introduction(Side::Initiator);
    let stale = LinkIdentity {
        epoch: Epoch(7),
        ..ours.identity
    };
    let mut wide = theirs;
    wide.geometry.f2a_slot_bytes += 1;
    assert_eq!(ours.judge(&theirs, ours.identity), Ok(()));
    assert_eq!(ours.judge(&theirs, stale), Err(RefusalCode::NotMe));
    assert_eq!(ours.judge(&ours, ours.identity), Err(RefusalCode::SameSide));
    assert_eq!(ours.judge(&wide, ours.identity), Err(RefusalCode::Geometry));
}

proptest! {
    #[test]
    fn arbitrary_fields_with_a_right_checksum_never_panic(
        body in proptest::collection::vec(any::<u8>(), MESSAGE_BYTES - 10),
    ) {
        let mut bytes = [0; MESSAGE_BYTES];
        bytes[0..4].copy_from_slice(&MAGIC.to_le_bytes());
        bytes[4..6].copy_from_slice(&VERSION.to_le_bytes());
        bytes[6..CRC_AT].copy_from_slice(&body);
        bytes[6] %= 4;
        bytes[7] %= 3;
        bytes[46..48].fill(0);
        bytes[44] %= 12;
        bytes[45] %= 5;
        bytes[56] %= 4;
        bytes[59] %= 20;
        let crc = crc32fast::hash(&bytes[..CRC_AT]);
        bytes[CRC_AT..].copy_from_slice(&crc.to_le_bytes());
        if let Ok(message) = Message::decode(&bytes) {
            prop_assert_eq!(Message::decode(&message.encode()), Ok(message));
        }
    }

    #[test]
    fn arbitrary_bytes_are_no_message(bytes in proptest::collection::vec(any::<u8>(), 0..130)) {
        prop_assert!(Message::decode(&bytes).is_err());
    }
}
