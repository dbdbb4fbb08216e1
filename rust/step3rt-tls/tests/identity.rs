//! Files that are of no use are refused with what to do about them.

#![allow(clippy::unwrap_used, reason = "a test that cannot set up fails")]

mod certs;

use std::fs;
use std::os::unix::fs::PermissionsExt;

use certs::{Authority, EXPIRED, GOOD, Wish};
use step3rt_tls::condition::OwnFault;
use step3rt_tls::{Identity, SetupError, TlsFiles};

fn refused(files: TlsFiles) -> String {
    Identity::follow(files).unwrap_err().to_string()
}

#[test]
fn the_three_settings_come_together_or_not_at_all() {
    let path = || Some("x.pem".into());
    assert_eq!(TlsFiles::from_settings(None, None, None).unwrap(), None);
    let all = TlsFiles::from_settings(path(), path(), path()).unwrap();
    assert!(all.is_some());
    for ((cert, key, ca), wanted) in [
        ((None, path(), path()), "tls_cert"),
        ((path(), None, path()), "tls_key"),
        ((path(), path(), None), "tls_ca"),
        ((path(), None, None), "tls_key"),
    ] {
        let error = TlsFiles::from_settings(cert, key, ca).unwrap_err();
        assert!(matches!(error, SetupError::Incomplete { missing } if missing == wanted));
    }
}

#[test]
fn a_member_of_the_cluster_is_good_until_its_certificate_expires() {
    let authority = Authority::new();
    let identity = Identity::follow(authority.issue(GOOD)).unwrap();
    assert_eq!(
        identity.expiry().unwrap().to_string(),
        "2100-01-01 00:00:00 UTC"
    );
    assert!(!identity.files().key_is_readable_by_all());
    let key = &identity.files().key;
    fs::set_permissions(key, fs::Permissions::from_mode(0o644)).unwrap();
    assert!(identity.files().key_is_readable_by_all());
}

#[test]
fn a_certificate_that_no_peer_would_trust_is_refused_at_once() {
    let (authority, other) = (Authority::new(), Authority::new());
    let fault = |files| match Identity::follow(files).unwrap_err() {
        SetupError::Own { fault, .. } => fault,
        error => panic!("{error}"),
    };
    let text = fault(authority.issue(EXPIRED)).to_string();
    assert!(
        text.starts_with("it expired on 2024-01-01 00:00:00 UTC. "),
        "{text}"
    );
    let young = Wish {
        years: (2150, 2160),
        ..GOOD
    };
    assert_eq!(fault(authority.issue(young)), OwnFault::NotYetValid);
    let foreign = TlsFiles {
        ca: other.issue(GOOD).ca,
        ..authority.issue(GOOD)
    };
    assert_eq!(fault(foreign), OwnFault::OtherCa);
    let server_only = Wish {
        purposes: (false, true),
        ..GOOD
    };
    let text = fault(authority.issue(server_only)).to_string();
    assert!(text.contains("extendedKeyUsage"), "{text}");
}

#[test]
fn files_that_hold_something_else_are_named() {
    let authority = Authority::new();
    let files = authority.issue(GOOD);
    let absent = TlsFiles {
        key: "/nonexistent/key.pem".into(),
        ..files.clone()
    };
    let text = refused(absent);
    assert!(
        text.starts_with("tls_key = /nonexistent/key.pem cannot be read: "),
        "{text}"
    );
    let swapped = TlsFiles {
        cert: files.key.clone(),
        key: files.cert.clone(),
        ca: files.ca.clone(),
    };
    let text = refused(swapped);
    assert!(text.contains("has no private key in PEM form"), "{text}");
    let no_ca = TlsFiles {
        ca: files.key.clone(),
        ..files.clone()
    };
    let text = refused(no_ca);
    assert!(
        text.starts_with("tls_ca = ") && text.contains("has no certificate"),
        "{text}"
    );
    let other = Wish {
        name: "other",
        ..GOOD
    };
    let key_of_another = TlsFiles {
        key: authority.issue(other).key,
        ..files
    };
    let text = refused(key_of_another);
    assert!(text.contains("is not the key of tls_cert"), "{text}");
}
