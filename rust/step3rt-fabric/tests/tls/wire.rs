//! What travels over an encrypted link, and what does not.

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use rustls::crypto::ring::cipher_suite::TLS13_AES_128_GCM_SHA256;
use rustls::{CipherSuiteCommon, Tls13CipherSuite};
use step3rt_core::ids::LaneId;
use step3rt_fabric::contract::{DownReason, Side};
use step3rt_fabric::endpoint::FabricEvent;
use step3rt_tls::Identity;

use crate::common::certs::{Authority, GOOD};
use crate::common::{Fabric, Node, geometry, identity, linked, pattern};
use crate::wiretap::Wiretap;
use crate::{ATTENTION, FFN, LANE, bind_patiently};

#[test]
fn both_ends_say_that_a_link_is_encrypted_and_how() {
    let mut ffn = Node::ffn(Fabric::Tls, 2, geometry(1, 64));
    let mut attention = Node::attention(Fabric::Tls, 1, geometry(1, 64));
    let linked = attention.endpoint.connect(&ffn.address()).unwrap();
    let FabricEvent::LinkUp(accepted) = ffn.next() else {
        panic!("no link");
    };
    for summary in [linked, accepted] {
        assert_eq!(summary.fabric, "tcp");
        let how = "; encrypted by TLS 1.3, AES_128_GCM_SHA256";
        assert!(summary.reason.ends_with(how), "{}", summary.reason);
    }
}

#[test]
fn two_ends_that_both_write_28_mib_at_once_do_not_stop_each_other() {
    const BYTES: usize = 28 << 20;
    let (mut attention, mut ffn) = linked(Fabric::Tls, geometry(2, BYTES));
    let (small, large) = (LaneId(0), LaneId(1));
    let (there, back) = (pattern(1, BYTES), pattern(2, BYTES));
    attention.push((FFN, small), 0, b"go");
    ffn.expect_arrival();
    for step in 0..3 {
        // Nobody polls until both are on their way.
        attention.push((FFN, large), step, &there);
        ffn.push((ATTENTION, small), step, &back);
        let (_, header) = ffn.expect_arrival();
        assert!(ffn.payload(&header) == there, "A2F differs");
        let (_, header) = attention.expect_arrival();
        assert!(attention.payload(&header) == back, "F2A differs");
        ffn.push((ATTENTION, large), step, b"done");
        attention.expect_arrival();
        attention.push((FFN, small), step + 1, b"go");
        ffn.expect_arrival();
    }
}

#[test]
fn keys_are_renewed_under_way_in_both_directions() {
    let suite = TLS13_AES_128_GCM_SHA256.tls13().unwrap();
    let short_lived = Tls13CipherSuite {
        common: CipherSuiteCommon {
            confidentiality_limit: 100,
            ..suite.common
        },
        ..*suite
    };
    let mut provider = step3rt_tls::identity::provider();
    let short_lived: &'static Tls13CipherSuite = Box::leak(Box::new(short_lived));
    provider.cipher_suites = vec![short_lived.into()];
    let files = Authority::new();
    let files = files.issue(GOOD);
    let member = Identity::with_provider(files, &Arc::new(provider)).unwrap();

    let mut ffn = bind_patiently(Side::Responder, Some(member.clone()));
    let mut proxy = Wiretap::start(&ffn);
    let mut attention = bind_patiently(Side::Initiator, Some(member));
    attention.endpoint.connect(&proxy.address(&ffn)).unwrap();
    ffn.expect_up(identity(1, 1));
    // Of 1000 records each way; 100 may have the same key.
    for step in 0..200 {
        let payload = pattern(step, 1 << 16);
        attention.push((FFN, LANE), step, &payload);
        let (_, header) = ffn.expect_arrival();
        assert!(ffn.payload(&header) == payload);
        ffn.push((ATTENTION, LANE), step, &payload);
        let (_, header) = attention.expect_arrival();
        assert!(attention.payload(&header) == payload);
    }
    drop((attention, ffn));
    for heard in proxy.heard() {
        let num_renewals = records(&heard)
            .filter(|len| *len == KEY_UPDATE_BYTES)
            .count();
        assert!((9..20).contains(&num_renewals), "{num_renewals}");
    }
}

/// An encrypted message that announces a new key; no frame is as short. RFC 8446, 4.6.3 and 5.2.
const KEY_UPDATE_BYTES: usize = 5 + 1 + 16;

/// The lengths of the records on a wire.
fn records(mut heard: &[u8]) -> impl Iterator<Item = usize> {
    std::iter::from_fn(move || {
        let len = usize::from(u16::from_be_bytes([*heard.get(3)?, *heard.get(4)?]));
        heard = heard.get(5 + len..)?;
        Some(len)
    })
}

#[test]
fn nothing_of_a_frame_can_be_read_on_the_way() {
    let member = Authority::new().member(GOOD);
    for (tls, is_readable) in [(None, true), (Some(member), false)] {
        let mut ffn = bind_patiently(Side::Responder, tls.clone());
        let mut proxy = Wiretap::start(&ffn);
        let mut attention = bind_patiently(Side::Initiator, tls);
        attention.endpoint.connect(&proxy.address(&ffn)).unwrap();
        ffn.expect_up(identity(1, 1));
        let secret = pattern(5, 5000);
        attention.push((FFN, LANE), 0, &secret);
        ffn.expect_arrival();
        drop((attention, ffn));
        let [heard, _] = proxy.heard();
        let found = heard.windows(32).any(|window| window == &secret[..32]);
        assert_eq!(found, is_readable);
        let frame_magic = heard
            .windows(32)
            .any(|window| window == &secret[4000..4032]);
        assert_eq!(frame_magic, is_readable);
    }
}

#[test]
fn a_byte_that_was_changed_on_the_way_ends_the_link_and_is_not_used() {
    let member = Authority::new().member(GOOD);
    let mut ffn = bind_patiently(Side::Responder, Some(member.clone()));
    let proxy = Wiretap::start(&ffn);
    let mut attention = bind_patiently(Side::Initiator, Some(member));
    attention.endpoint.connect(&proxy.address(&ffn)).unwrap();
    ffn.expect_up(identity(1, 1));
    attention.push((FFN, LANE), 0, b"whole");
    ffn.expect_arrival();
    ffn.push((ATTENTION, LANE), 0, b"whole");
    attention.expect_arrival();
    proxy.spoil();
    attention.push((FFN, LANE), 1, &pattern(1, 3000));
    let (_, reason) = ffn.expect_down();
    assert!(matches!(reason, DownReason::Encryption(_)), "{reason}");
    // The poll after the one that reports an end forgets the link, and closes it.
    ffn.expect_nothing();
    let (_, reason) = attention.expect_down();
    assert!(
        matches!(reason, DownReason::PeerClosed | DownReason::Encryption(_)),
        "{reason}"
    );
}

#[test]
fn what_comes_with_the_welcome_is_heard_although_no_socket_tells_of_it() {
    let member = Authority::new().member(GOOD);
    let mut ffn = bind_patiently(Side::Responder, Some(member.clone()));
    let mut attention = bind_patiently(Side::Initiator, Some(member));
    let wiretap = Wiretap::lingering(&ffn, Duration::from_millis(50));
    let address = wiretap.address(&ffn);
    let connecting = thread::spawn(move || {
        attention.endpoint.connect(&address).unwrap();
        attention
    });
    let event = ffn.next();
    assert!(matches!(event, FabricEvent::LinkUp(_)), "{event:?}");
    ffn.endpoint.ask_reset(ATTENTION, "another try").unwrap();
    let mut attention = connecting.join().unwrap();
    let event = attention.next();
    assert!(matches!(event, FabricEvent::ResetAsked { .. }), "{event:?}");
}
