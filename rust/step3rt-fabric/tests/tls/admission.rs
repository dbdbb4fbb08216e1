//! Who is let in, who is told what, and that nobody else notices.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use step3rt_fabric::contract::Side;
use step3rt_fabric::endpoint::ConnectError;
use step3rt_fabric::{Fault, Refusal, Tls};
use step3rt_tls::Identity;
use step3rt_tls::fault::Objection;

use crate::common::certs::{Authority, EXPIRED, GOOD, Wish};
use crate::common::{Fabric, PATIENCE, identity, pattern};
use crate::wiretap::Wiretap;
use crate::{ATTENTION, FFN, HANDSHAKE, LANE, bind};

/// Has an attention instance connect to an FFN instance that refuses it, or is refused; then sees
/// that a member with a good certificate (or none, if the FFN instance has none) is still linked.
fn refused(attention: Option<Tls>, ffn: Option<Tls>, good: Option<Tls>) -> ConnectError {
    let mut ffn = bind(Side::Responder, ffn);
    let mut attention = bind(Side::Initiator, attention);
    let started = Instant::now();
    let error = attention.endpoint.connect(&ffn.address()).unwrap_err();
    assert!(started.elapsed() < PATIENCE / 2, "{:?}", started.elapsed());
    ffn.expect_nothing();
    let mut good = bind(Side::Initiator, good);
    good.link(Fabric::Tls, &mut ffn);
    good.push((FFN, LANE), 0, b"still here");
    assert_eq!(ffn.expect_arrival().0, ATTENTION);
    error
}

fn fault(error: ConnectError) -> Fault {
    match error {
        ConnectError::Tls { fault, .. } => fault,
        error => panic!("{error}"),
    }
}

#[test]
fn a_member_of_another_cluster_is_not_let_in_and_lets_nobody_in() {
    let (ours, theirs) = (Authority::new(), Authority::new());
    let member = |authority: &Authority| Some(authority.member(GOOD));
    let error = refused(member(&ours), member(&theirs), member(&theirs));
    assert_eq!(fault(error), Fault::PeerOfAnotherCa);

    // Trusts the other CA, and was given a certificate by its own.
    let mut files = ours.issue(GOOD);
    files.ca = theirs.issue(GOOD).ca;
    let stranger = Identity::load(files).unwrap();
    let error = refused(Some(stranger), member(&theirs), member(&theirs));
    let text = error.to_string();
    assert_eq!(fault(error), Fault::Rejected(Objection::UnknownCa));
    assert!(
        text.starts_with(
            "instance 2 is not linked over tcp: it does not accept this end's certificate (issued by \
             a CA that it does not know). "
        ),
        "{text}"
    );
}

#[test]
fn an_expired_certificate_is_refused_at_either_end_with_its_date() {
    let authority = Authority::new();
    let [good, expired] = [GOOD, EXPIRED].map(|wish| Some(authority.member(wish)));
    let error = refused(expired.clone(), good.clone(), good.clone());
    assert_eq!(fault(error), Fault::Rejected(Objection::Expired));

    let ffn = bind(Side::Responder, expired);
    let mut attention = bind(Side::Initiator, good);
    let error = attention.endpoint.connect(&ffn.address()).unwrap_err();
    let text = error.to_string();
    assert!(
        text.contains("its certificate expired on 2024-01-01 00:00:00 UTC. Issue it a new one"),
        "{text}"
    );
}

#[test]
fn a_certificate_for_another_host_or_another_use_is_refused() {
    let authority = Authority::new();
    let refused_ffn = |wish| {
        let ffn = bind(Side::Responder, Some(authority.member(wish)));
        let mut attention = bind(Side::Initiator, Some(authority.member(GOOD)));
        fault(attention.endpoint.connect(&ffn.address()).unwrap_err())
    };
    let elsewhere = Wish {
        name: "elsewhere",
        host: "ffn7.cluster.internal",
        ..GOOD
    };
    let Fault::PeerOfAnotherName {
        expected,
        presented,
    } = refused_ffn(elsewhere)
    else {
        panic!("another fault");
    };
    assert_eq!(expected, "127.0.0.1");
    assert!(presented.contains("ffn7.cluster.internal"), "{presented}");
    let client_only = Wish {
        name: "client",
        purposes: (true, false),
        ..GOOD
    };
    assert_eq!(refused_ffn(client_only), Fault::PeerOfAnotherPurpose);
}

#[test]
fn an_end_without_certificates_is_told_that_the_other_has_them() {
    let authority = Authority::new();
    let good = || Some(authority.member(GOOD));
    let error = refused(None, good(), good());
    assert!(
        matches!(
            error,
            ConnectError::Refused {
                refusal: Refusal::NeedsTls,
                ..
            }
        ),
        "{error}"
    );
    let text = error.to_string();
    assert!(
        text.contains("it accepts only TLS, and this end has no certificate. Give"),
        "{text}"
    );
}

#[test]
fn an_end_with_certificates_is_told_that_the_other_has_none() {
    let authority = Authority::new();
    let error = refused(Some(authority.member(GOOD)), None, None);
    let text = error.to_string();
    assert_eq!(fault(error), Fault::PeerSpeaksPlain);
    assert!(
        text.contains("it does not speak TLS, and this end was given certificates"),
        "{text}"
    );
}

#[test]
fn what_is_told_in_clear_text_says_nothing_of_the_cluster() {
    let ffn = bind(Side::Responder, Some(Authority::new().member(GOOD)));
    let mut proxy = Wiretap::start(&ffn);
    let mut attention = bind(Side::Initiator, None);
    attention
        .endpoint
        .connect(&proxy.address(&ffn))
        .unwrap_err();
    let [_, answer] = proxy.heard();
    // Of a refusal, all but what it is and its checksum.
    assert_eq!(answer.len(), 64);
    assert!(answer[8..44].iter().all(|byte| *byte == 0), "{answer:?}");
}

#[test]
fn garbage_and_dawdlers_are_hung_up_on_in_time_and_keep_no_member_out() {
    let authority = Authority::new();
    let mut ffn = bind(Side::Responder, Some(authority.member(GOOD)));
    let address = ffn.address().addresses[0].address.clone();
    let connect = || {
        let stream = TcpStream::connect(&address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream
    };
    let mut handshake_like = vec![0x16, 3, 1, 2, 0];
    handshake_like.extend(pattern(3, 512));
    let garbage: [&[u8]; 4] = [
        b"GET / HTTP/1.1\r\nHost: here\r\n\r\n and so on, up to the size of a hello",
        &[0x16; 200],
        &handshake_like,
        &[0x16, 3, 1, 0xff, 0xff, 0, 0, 0, 0],
    ];
    for bytes in garbage {
        let mut stream = connect();
        stream.write_all(bytes).unwrap();
        let started = Instant::now();
        let mut answer = Vec::new();
        // An alert, or nothing; hung up on or reset.
        let _ = stream.read_to_end(&mut answer);
        assert!(answer.len() < 64, "{answer:?}");
        assert!(started.elapsed() < PATIENCE / 2, "{:?}", started.elapsed());
    }

    // One byte at a time, and more of them than are served at once; silence; half a handshake.
    let dawdlers: Vec<_> = (0..100).map(|_| connect()).collect();
    let mut hello = vec![0x16, 3, 1, 2, 0, 1, 0, 1, 0xfc, 3, 3];
    hello.resize(517, 7);
    let dripping = thread::spawn(move || {
        let started = Instant::now();
        for byte in hello {
            for mut stream in &dawdlers {
                // Refused once the deadline has come.
                if stream.write_all(&[byte]).is_err() && started.elapsed() > 3 * HANDSHAKE {
                    return;
                }
            }
            thread::sleep(Duration::from_millis(10));
        }
    });
    for _ in 0..3 {
        let started = Instant::now();
        let mut member = bind(Side::Initiator, Some(authority.member(GOOD)));
        // A member that found no place meanwhile is refused by its own deadline, and tries again.
        while let Err(error) = member.endpoint.connect(&ffn.address()) {
            assert!(started.elapsed() < PATIENCE, "{error}");
        }
        ffn.expect_up(identity(1, 1));
        member.push((FFN, LANE), 0, b"a member");
        assert_eq!(ffn.expect_arrival().0, ATTENTION);
        drop(member);
        ffn.expect_down();
    }
    dripping.join().unwrap();
}

#[test]
fn a_listener_that_never_answers_is_given_up_on_in_time() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let ffn = bind(Side::Responder, None);
    let mut address = ffn.address();
    address.addresses[0].address = listener.local_addr().unwrap().to_string();
    let mut attention = bind(Side::Initiator, Some(Authority::new().member(GOOD)));
    let started = Instant::now();
    let error = attention.endpoint.connect(&address).unwrap_err();
    assert!(started.elapsed() < 4 * HANDSHAKE, "{:?}", started.elapsed());
    assert!(matches!(error, ConnectError::Interrupted { .. }), "{error}");

    // One that hangs up says less than one that refuses, but what to look at.
    let hangs_up = thread::spawn(move || {
        for _ in 0..2 {
            let (mut stream, _) = listener.accept().unwrap();
            let _ = stream.read(&mut [0; 1024]);
        }
    });
    while let Err(error) = attention.endpoint.connect(&address) {
        if matches!(
            error,
            ConnectError::Tls {
                fault: Fault::PeerLeft,
                ..
            }
        ) {
            break;
        }
        assert!(started.elapsed() < PATIENCE, "{error}");
    }
    drop(TcpStream::connect(&address.addresses[0].address));
    hangs_up.join().unwrap();
}
