//! Frames that lie, come out of turn or end early.

use std::io::Write;

use step3rt_core::ids::{Epoch, InstanceId, LaneId};

use super::*;
use crate::contract::DownReason;
use crate::frame::{Frame, FrameHeader, ProtocolError};

/// What a good peer would send first: 16 bytes of zeros.
fn good_header() -> FrameHeader {
    FrameHeader {
        source: HOSTILE.instance,
        epoch: HOSTILE.epoch,
        direction: Direction::A2f,
        lane: LaneId(0),
        sequence: 1,
        frame: Frame {
            step: 0,
            layer: 0,
            num_tokens: 1,
            payload_bytes: 16,
        },
        payload_checksum: None,
    }
}

/// Each way to lie in a header, with what it is called.
fn lies() -> Vec<([u8; HEADER_BYTES], ProtocolError)> {
    let mut damaged = good_header().encode();
    damaged[20] ^= 1;
    let damage = FrameHeader::decode(&damaged).unwrap_err();
    let nothing = ([0; HEADER_BYTES], ProtocolError::Magic(0));
    let mut lies = vec![nothing, (damaged, damage)];
    let mut add = |change: &dyn Fn(&mut FrameHeader), error| {
        let mut header = good_header();
        change(&mut header);
        lies.push((header.encode(), error));
    };
    let (found, expected) = (InstanceId(9), HOSTILE.instance);
    add(
        &|header| header.source = found,
        ProtocolError::Source { found, expected },
    );
    let (found, expected) = (Epoch(4), HOSTILE.epoch);
    add(
        &|header| header.epoch = found,
        ProtocolError::Epoch { found, expected },
    );
    let (found, expected) = (Direction::F2a, Direction::A2f);
    add(
        &|header| header.direction = found,
        ProtocolError::Direction { found, expected },
    );
    for found in [2, u64::MAX] {
        let error = ProtocolError::Sequence {
            lane: LaneId(0),
            found,
            expected: 1,
        };
        add(&|header| header.sequence = found, error);
    }
    let oversize = ProtocolError::Oversize {
        payload_bytes: 257,
        slot_bytes: 256,
    };
    add(&|header| header.frame.payload_bytes = 257, oversize);
    let computed = crc32fast::hash(&[0; 16]);
    let wrong_sum = ProtocolError::PayloadChecksum { found: 7, computed };
    add(&|header| header.payload_checksum = Some(7), wrong_sum);
    lies
}

#[test]
fn every_lie_in_a_header_ends_the_link_by_its_name_and_is_never_an_arrival() {
    let mut victim = victim(PATIENCE);
    for fabric in FABRICS {
        for (header, error) in lies() {
            let mut forger = Forger::link(&mut victim, fabric);
            // The flag agrees with the header, where it has one to read.
            let sequence = FrameHeader::decode(&header).map_or(1, |header| header.sequence);
            forger.send(&header, sequence);
            let reason = DownReason::Protocol(error);
            let down = FabricEvent::LinkDown {
                peer: HOSTILE,
                reason,
            };
            assert_eq!(next(&mut victim), [down], "{fabric}");
        }
        let mut honest = Forger::link(&mut victim, fabric);
        honest.send(&good_header().encode(), 1);
        let events = next(&mut victim);
        assert!(
            matches!(events[..], [FabricEvent::Arrived { .. }]),
            "{events:?}"
        );
        drop(honest);
        next(&mut victim);
    }
}

#[test]
fn a_frame_before_the_last_one_was_answered_ends_the_link() {
    let mut victim = victim(PATIENCE);
    for fabric in FABRICS {
        let mut forger = Forger::link(&mut victim, fabric);
        forger.send(&good_header().encode(), 1);
        let events = next(&mut victim);
        assert!(
            matches!(events[..], [FabricEvent::Arrived { .. }]),
            "{events:?}"
        );
        forger.send(
            &FrameHeader {
                sequence: 2,
                ..good_header()
            }
            .encode(),
            2,
        );
        let reason = DownReason::Protocol(ProtocolError::NoCredit {
            lane: LaneId(0),
            found: 2,
        });
        assert_eq!(
            next(&mut victim),
            [FabricEvent::LinkDown {
                peer: HOSTILE,
                reason
            }]
        );
    }
}

#[test]
fn a_slot_that_is_being_read_is_not_overwritten_by_an_early_frame() {
    let mut victim = victim(PATIENCE);
    let mut forger = Forger::link(&mut victim, FabricKind::Tcp);
    forger.send(&good_header().encode(), 1);
    next(&mut victim);
    let slot = victim.receive_slot(HOSTILE.instance, LaneId(0)).unwrap();
    let Forger::Tcp(stream) = &mut forger else {
        panic!("not tcp")
    };
    let early = FrameHeader {
        sequence: 2,
        ..good_header()
    };
    stream.write_all(&early.encode()).unwrap();
    // The victim may have hung up on seeing the header.
    let _ = stream.write_all(&[0xee; 16]);
    let events = next(&mut victim);
    assert!(
        matches!(events[..], [FabricEvent::LinkDown { .. }]),
        "{events:?}"
    );
    let mut bytes = [1; 16];
    slot.read(&mut bytes);
    assert_eq!(bytes, [0; 16]);
}

#[test]
fn a_right_payload_checksum_is_accepted() {
    let mut victim = victim(PATIENCE);
    for fabric in FABRICS {
        let mut forger = Forger::link(&mut victim, fabric);
        let payload_checksum = Some(crc32fast::hash(&[0; 16]));
        forger.send(
            &FrameHeader {
                payload_checksum,
                ..good_header()
            }
            .encode(),
            1,
        );
        let events = next(&mut victim);
        assert!(
            matches!(events[..], [FabricEvent::Arrived { .. }]),
            "{events:?}"
        );
        drop(forger);
        next(&mut victim);
    }
}

#[test]
fn a_lane_that_is_not_the_slots_or_does_not_exist_ends_the_link() {
    let mut victim = victim(PATIENCE);
    for (fabric, found, expected) in [(FabricKind::Shm, 1, 0), (FabricKind::Tcp, 2, 2)] {
        let mut forger = Forger::link(&mut victim, fabric);
        let header = FrameHeader {
            lane: LaneId(found),
            ..good_header()
        };
        forger.send(&header.encode(), 1);
        let (found, expected) = (LaneId(found), LaneId(expected));
        let reason = DownReason::Protocol(ProtocolError::Lane { found, expected });
        assert_eq!(
            next(&mut victim),
            [FabricEvent::LinkDown {
                peer: HOSTILE,
                reason
            }]
        );
    }
}

#[test]
fn a_flag_that_differs_from_its_header_ends_the_link() {
    let mut victim = victim(PATIENCE);
    let mut forger = Forger::link(&mut victim, FabricKind::Shm);
    forger.send(&good_header().encode(), 3);
    let sequence = ProtocolError::Sequence {
        lane: LaneId(0),
        found: 1,
        expected: 3,
    };
    let reason = DownReason::Protocol(sequence);
    assert_eq!(
        next(&mut victim),
        [FabricEvent::LinkDown {
            peer: HOSTILE,
            reason
        }]
    );
}

#[test]
fn a_connection_that_ends_within_a_frame_is_a_short_frame() {
    let mut victim = victim(PATIENCE);
    let whole = [good_header().encode().as_slice(), &[0; 16]].concat();
    for (len, expected) in [(10, HEADER_BYTES), (HEADER_BYTES, 80), (79, 80)] {
        let Forger::Tcp(mut stream) = Forger::link(&mut victim, FabricKind::Tcp) else {
            panic!("not tcp");
        };
        stream.write_all(&whole[..len]).unwrap();
        drop(stream);
        let reason = DownReason::Protocol(ProtocolError::ShortFrame {
            found: len,
            expected,
        });
        assert_eq!(
            next(&mut victim),
            [FabricEvent::LinkDown {
                peer: HOSTILE,
                reason
            }]
        );
    }
}

#[test]
fn bytes_on_the_socket_of_shared_memory_end_the_link() {
    let mut victim = victim(PATIENCE);
    let Forger::Shm { socket, .. } = &Forger::link(&mut victim, FabricKind::Shm) else {
        panic!("not shm");
    };
    shm::send(socket, &hello(), &[]).unwrap();
    let reason = DownReason::Protocol(ProtocolError::Chatter);
    assert_eq!(
        next(&mut victim),
        [FabricEvent::LinkDown {
            peer: HOSTILE,
            reason
        }]
    );
}
