//! Links through device memory: what each end learns of the other's offer, over either carrier, and
//! what happens where no such link is possible.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on stops there")]

mod common;

use std::io::{Read, Write};
use std::time::{Duration, Instant};

use common::{Fabric, Node, bind_with_device, frame, pattern};
use step3rt_core::ids::{InstanceId, LaneId};
use step3rt_fabric::address::DataAddress;
use step3rt_fabric::contract::{DownReason, PushError, Side};
use step3rt_fabric::device_offer::MAX_DEVICE_OFFER_BYTES;
use step3rt_fabric::endpoint::{BindError, ConnectError, Endpoint, LinkSummary};
use step3rt_fabric::{DeviceError, Refusal};

const ATTENTION: InstanceId = InstanceId(1);
const FFN: InstanceId = InstanceId(2);
const LANE: LaneId = LaneId(0);
const CARRIERS: [Fabric; 2] = [Fabric::Shm, Fabric::Tcp];

fn name(carrier: Fabric) -> String {
    format!("{carrier:?}").to_lowercase()
}

fn attention(carrier: Fabric, offer: Option<&[u8]>) -> Node {
    bind_with_device((carrier, "auto"), 1, Side::Initiator, offer)
}

fn ffn(carrier: Fabric, offer: Option<&[u8]>) -> Node {
    bind_with_device((carrier, "auto"), 2, Side::Responder, offer)
}

/// Links the two; returns what each of them is told.
fn link(attention: &mut Node, ffn: &mut Node) -> [LinkSummary; 2] {
    let ours = attention.endpoint.connect(&ffn.address()).unwrap();
    [ours, ffn.expect_up(attention.identity())]
}

fn offer(link: &LinkSummary) -> &[u8] {
    link.device_offer.as_ref().unwrap().as_bytes()
}

#[test]
fn both_ends_get_the_others_offer_whatever_its_length_and_agree_on_the_epoch() {
    for carrier in CARRIERS {
        let mut last_epoch = 0;
        for (len, other_len) in [(0, 4096), (1, 0), (64, 64), (4096, 1), (4096, 4096)] {
            let (ours, theirs) = (pattern(1, len), pattern(2, other_len));
            let mut attention = attention(carrier, Some(&ours));
            let mut ffn = ffn(carrier, Some(&theirs));
            let links = link(&mut attention, &mut ffn);
            assert_eq!(
                (offer(&links[0]), offer(&links[1])),
                (&theirs[..], &ours[..])
            );
            let carried_by = name(carrier);
            for link in &links {
                assert_eq!(link.fabric, "cuda_ipc");
                assert_eq!(
                    link.reason,
                    format!(
                        "both ends run on one host and offer device memory; carried by {carried_by}"
                    )
                );
            }
            assert_eq!(links[0].epoch, links[1].epoch);
            assert!(links[0].epoch.0 > last_epoch);
            last_epoch = links[0].epoch.0;
        }
    }
}

#[test]
fn its_slots_have_one_byte_and_its_lanes_those_of_the_cluster() {
    for carrier in CARRIERS {
        let (mut attention, mut ffn) = (attention(carrier, Some(b"a")), ffn(carrier, Some(b"f")));
        link(&mut attention, &mut ffn);
        assert_eq!(
            attention.endpoint.send_slot(FFN, LaneId(1)).unwrap().len(),
            1
        );
        assert!(attention.endpoint.send_slot(FFN, LaneId(2)).is_none());
        let refused = attention.endpoint.push(FFN, LANE, frame(0, 2));
        assert!(matches!(
            refused,
            Err(PushError::TooLarge { slot_bytes: 1, .. })
        ));
        attention.push((FFN, LANE), 0, b"x");
        assert_eq!(ffn.expect_arrival().1.sequence, 1);
        ffn.push((ATTENTION, LANE), 0, b"y");
        assert_eq!(attention.expect_arrival().1.sequence, 1);
    }
}

#[test]
fn an_end_without_an_offer_or_on_another_host_gets_the_next_fabric_and_the_reason() {
    let one_sided = "; no cuda_ipc, as only one end offers device memory";
    for carrier in CARRIERS {
        for (ours, theirs) in [
            (None, Some(&b"f"[..])),
            (Some(&b"a"[..]), None),
            (None, None),
        ] {
            let (mut attention, mut ffn) = (attention(carrier, ours), ffn(carrier, theirs));
            for link in link(&mut attention, &mut ffn) {
                assert_eq!(link.fabric, name(carrier));
                let has_note = ours.is_some() || theirs.is_some();
                assert_eq!(
                    link.reason.ends_with(one_sided),
                    has_note,
                    "{}",
                    link.reason
                );
                assert_eq!(link.device_offer, None);
            }
            attention.push((FFN, LANE), 0, &[7; 100]);
            assert_eq!(ffn.expect_arrival().1.frame.payload_bytes, 100);
        }
    }
    let (mut attention, mut ffn) = (
        attention(Fabric::Tcp, Some(b"a")),
        ffn(Fabric::Tcp, Some(b"f")),
    );
    let mut elsewhere = ffn.address();
    elsewhere.boot_id = "another".to_owned();
    let ours = attention.endpoint.connect(&elsewhere).unwrap();
    for link in [ours, ffn.expect_up(attention.identity())] {
        assert_ne!(link.fabric, "cuda_ipc");
        let why = "; no cuda_ipc, as device memory is not shared between hosts";
        assert!(link.reason.contains(why), "{}", link.reason);
    }
}

#[test]
fn a_peer_that_has_no_offer_after_all_is_linked_without_and_both_say_why() {
    for carrier in CARRIERS {
        let whole = vec![7; MAX_DEVICE_OFFER_BYTES];
        let (mut attention, mut ffn) = (attention(carrier, Some(&whole)), ffn(carrier, None));
        let mut outdated = ffn.address();
        outdated.addresses.push(DataAddress {
            fabric: "cuda_ipc".to_owned(),
            address: String::new(),
        });
        let ours = attention.endpoint.connect(&outdated).unwrap();
        let theirs = ffn.expect_up(attention.identity());
        assert_eq!(
            (ours.fabric, theirs.fabric),
            (&*name(carrier), &*name(carrier))
        );
        let why = "; no cuda_ipc, although both ends offer device memory";
        assert!(theirs.reason.ends_with(why), "{}", theirs.reason);
        let error = "instance 2 refused the link: it offers no device memory";
        assert!(ours.reason.contains(error), "{}", ours.reason);

        let mut forced = bind_with_device((carrier, "cuda_ipc"), 3, Side::Initiator, Some(b"a"));
        let error = forced.endpoint.connect(&outdated).unwrap_err();
        assert!(
            matches!(
                error,
                ConnectError::Refused {
                    refusal: Refusal::NoDeviceOffer,
                    ..
                }
            ),
            "{error}"
        );
    }
}

#[test]
fn the_setting_cuda_ipc_links_by_it_or_says_what_is_missing() {
    for carrier in CARRIERS {
        let forced = |instance, side| {
            bind_with_device((carrier, "cuda_ipc"), instance, side, Some(b"offer"))
        };
        let (mut attention, mut ffn) = (forced(1, Side::Initiator), forced(2, Side::Responder));
        let links = link(&mut attention, &mut ffn);
        for link in links {
            assert_eq!(link.fabric, "cuda_ipc");
            assert!(
                link.reason
                    .starts_with("chosen by the `fabric` setting; carried by")
            );
        }
        let mut elsewhere = ffn.address();
        elsewhere.boot_id = "another".to_owned();
        let error = attention.endpoint.connect(&elsewhere).unwrap_err();
        assert_eq!(
            error.to_string(),
            "instance 2 cannot be linked by cuda_ipc: it runs on another host, and device memory is \
             shared within one. Run both on one host, or set `fabric` to \"auto\""
        );
        let mut plain = ffn.address();
        plain
            .addresses
            .retain(|address| address.fabric != "cuda_ipc");
        let error = attention.endpoint.connect(&plain).unwrap_err();
        let why = DeviceError::NotOffered;
        assert!(matches!(error, ConnectError::Device { error, .. } if error == why));

        let config = attention.endpoint.config().clone();
        let Err(error) = Endpoint::bind(config) else {
            panic!("bound without an offer");
        };
        assert!(
            matches!(error, BindError::Device(DeviceError::NoOffer)),
            "{error}"
        );
    }
}

#[test]
fn another_setting_links_by_it_without_offers() {
    for carrier in CARRIERS {
        let setting = name(carrier);
        let bind =
            |instance, side| bind_with_device((carrier, &setting), instance, side, Some(b"o"));
        let (mut attention, mut ffn) = (bind(1, Side::Initiator), bind(2, Side::Responder));
        for link in link(&mut attention, &mut ffn) {
            assert_eq!(link.fabric, setting);
            assert_eq!(link.reason, "chosen by the `fabric` setting");
            assert_eq!(link.device_offer, None);
        }
    }
}

#[test]
fn the_end_of_a_peer_is_seen_within_a_second_and_its_successor_has_a_later_epoch() {
    for carrier in CARRIERS {
        let (mut first, mut ffn) = (attention(carrier, Some(b"1")), ffn(carrier, Some(b"f")));
        let [_, before] = link(&mut first, &mut ffn);
        let started = Instant::now();
        drop(first);
        assert_eq!(ffn.expect_down().1, DownReason::PeerClosed);
        assert!(started.elapsed() < Duration::from_secs(1));
        let mut second = attention(carrier, Some(b"2"));
        let [_, after] = link(&mut second, &mut ffn);
        assert_eq!(offer(&after), b"2");
        assert!(after.epoch > before.epoch);
    }
}

#[test]
fn one_ffn_instance_has_one_offer_for_all_its_peers() {
    for carrier in CARRIERS {
        let mut ffn = ffn(carrier, Some(b"for all"));
        let mut peers: Vec<_> = (10..14)
            .map(|i| {
                let own = i.to_string();
                bind_with_device((carrier, "auto"), i, Side::Initiator, Some(own.as_bytes()))
            })
            .collect();
        for peer in &mut peers {
            let [ours, theirs] = link(peer, &mut ffn);
            assert_eq!(offer(&ours), b"for all");
            assert_eq!(offer(&theirs), peer.instance().to_string().as_bytes());
        }
    }
}

#[test]
fn an_accepting_end_of_another_version_is_refused_by_name() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let mut address = ffn(Fabric::Tcp, Some(b"f")).address();
    for place in &mut address.addresses {
        if place.fabric != "cuda_ipc" {
            place.address = listener.local_addr().unwrap().to_string();
        }
    }
    let old = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        // It reads what it takes for a hello, and leaves the offer behind it unread.
        stream.read_exact(&mut [0; 64]).unwrap();
        let mut refusal = [0; 64];
        refusal[..5].copy_from_slice(b"S3HS\x01");
        stream.write_all(&refusal).unwrap();
    });
    let whole = vec![7; MAX_DEVICE_OFFER_BYTES];
    let mut attention = bind_with_device((Fabric::Tcp, "auto"), 1, Side::Initiator, Some(&whole));
    let error = attention.endpoint.connect(&address).unwrap_err();
    assert!(
        matches!(
            error,
            ConnectError::Refused {
                refusal: Refusal::Version(1),
                ..
            }
        ),
        "{error}"
    );
    old.join().unwrap();
}
