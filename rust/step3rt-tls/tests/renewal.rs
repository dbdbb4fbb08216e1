//! Renewed files are taken as soon as they are usable, and not before; an operator hears of both.

#![allow(clippy::unwrap_used, reason = "a test that cannot set up fails")]

mod certs;

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustls::pki_types::UnixTime;

use certs::{Authority, EXPIRED, GOOD, Wish};
use step3rt_tls::renewal::{News, Renewal};
use step3rt_tls::{Identity, TlsFiles};

const OTHER: Wish = Wish {
    name: "other",
    years: (2020, 2090),
    ..GOOD
};

/// An identity by copies of `files` that may be replaced; and one that stays as it is at first.
fn copied(files: &TlsFiles, directory: &Path) -> (Identity, TlsFiles) {
    let at = |name| directory.join(name);
    let copies = TlsFiles {
        cert: at("cert.pem"),
        key: at("key.pem"),
        ca: at("ca.pem"),
    };
    replace(&copies, files);
    (Identity::load(copies.clone()).unwrap(), copies)
}

fn replace(copies: &TlsFiles, files: &TlsFiles) {
    for (to, from) in [
        (&copies.cert, &files.cert),
        (&copies.key, &files.key),
        (&copies.ca, &files.ca),
    ] {
        fs::copy(from, to).unwrap();
    }
}

fn look(renewal: &mut Renewal, identity: &Identity) -> Vec<News> {
    renewal.look(identity, UnixTime::now())
}

/// What a second look says, when the first has said nothing.
fn two_looks(renewal: &mut Renewal, identity: &Identity) -> Vec<News> {
    assert_eq!(look(renewal, identity), []);
    look(renewal, identity)
}

#[test]
fn renewed_files_are_taken_once() {
    let (authority, directory) = (Authority::new(), tempfile::tempdir().unwrap());
    let (identity, files) = copied(&authority.issue(GOOD), directory.path());
    let clone = identity.clone();
    let mut renewal = Renewal::default();
    assert_eq!(two_looks(&mut renewal, &identity), []);
    let before = identity.settings();
    replace(&files, &authority.issue(OTHER));
    let news = two_looks(&mut renewal, &identity);
    assert!(
        matches!(news.as_slice(), [News::Renewed { .. }]),
        "{news:?}"
    );
    assert!(
        news[0]
            .to_string()
            .ends_with("which is valid until 2090-01-01 00:00:00 UTC"),
        "{}",
        news[0]
    );
    assert!(!Arc::ptr_eq(&before, &identity.settings()));
    assert!(Arc::ptr_eq(&clone.settings(), &identity.settings()));
    assert_eq!(two_looks(&mut renewal, &identity), []);
}

#[test]
fn a_directory_that_a_link_leads_to_may_be_replaced_as_a_whole() {
    let (authority, directory) = (Authority::new(), tempfile::tempdir().unwrap());
    let (old, new) = (directory.path().join("old"), directory.path().join("new"));
    for (path, wish) in [(&old, GOOD), (&new, OTHER)] {
        fs::create_dir(path).unwrap();
        copied(&authority.issue(wish), path);
    }
    let present = directory.path().join("..data");
    symlink(&old, &present).unwrap();
    let files = TlsFiles {
        cert: present.join("cert.pem"),
        key: present.join("key.pem"),
        ca: present.join("ca.pem"),
    };
    let identity = Identity::load(files).unwrap();
    let mut renewal = Renewal::default();
    let next = directory.path().join("..data_tmp");
    symlink(&new, &next).unwrap();
    fs::rename(&next, &present).unwrap();
    let news = two_looks(&mut renewal, &identity);
    assert!(
        matches!(news.as_slice(), [News::Renewed { .. }]),
        "{news:?}"
    );
    assert_eq!(
        identity.expiry().unwrap().to_string(),
        "2090-01-01 00:00:00 UTC"
    );
}

#[test]
fn a_renewal_of_no_use_is_said_once_and_changes_nothing_until_it_is_put_right() {
    let (authority, stranger) = (Authority::new(), Authority::new());
    let directory = tempfile::tempdir().unwrap();
    let good = authority.issue(GOOD);
    let (identity, files) = copied(&good, directory.path());
    let fixed = authority.issue(OTHER);
    let before = identity.settings();
    let mut renewal = Renewal::default();
    let half = fs::read(&fixed.cert).unwrap();
    let half = &half[..half.len() / 2];
    let broken: [(&str, &dyn Fn()); 6] = [
        ("is not the key of tls_cert", &|| {
            fs::copy(&fixed.cert, &files.cert).unwrap();
        }),
        ("has no certificate in PEM form", &|| {
            fs::write(&files.cert, half).unwrap();
        }),
        ("cannot be read: No such file", &|| {
            fs::remove_file(&files.key).unwrap();
        }),
        ("it expired on 2024-01-01", &|| {
            replace(&files, &authority.issue(EXPIRED));
        }),
        ("the CA in `tls_ca` did not issue it", &|| {
            fs::copy(&stranger.issue(GOOD).ca, &files.ca).unwrap();
        }),
        ("tls_ca = ", &|| fs::write(&files.ca, "").unwrap()),
    ];
    for (text, spoil) in broken {
        replace(&files, &good);
        assert_eq!(look(&mut renewal, &identity), []);
        spoil();
        let news = two_looks(&mut renewal, &identity);
        assert!(
            matches!(news.as_slice(), [News::Unusable { .. }]),
            "{text}: {news:?}"
        );
        let said = news[0].to_string();
        assert!(said.contains(text), "{said}");
        assert!(
            said.contains("was read before, which is valid until 2100-01-01"),
            "{said}"
        );
        assert_eq!(two_looks(&mut renewal, &identity), [], "{text}");
        assert!(Arc::ptr_eq(&before, &identity.settings()), "{text}");
    }
    replace(&files, &fixed);
    let news = two_looks(&mut renewal, &identity);
    assert!(
        matches!(news.as_slice(), [News::Renewed { .. }]),
        "{news:?}"
    );
    // And the same again is said again.
    fs::write(&files.ca, "").unwrap();
    assert_eq!(two_looks(&mut renewal, &identity).len(), 1);
}

#[test]
fn a_renewal_under_way_is_no_fault() {
    let (authority, directory) = (Authority::new(), tempfile::tempdir().unwrap());
    let (identity, files) = copied(&authority.issue(GOOD), directory.path());
    let next = authority.issue(OTHER);
    let mut renewal = Renewal::default();
    fs::copy(&next.cert, &files.cert).unwrap();
    assert_eq!(look(&mut renewal, &identity), []);
    fs::copy(&next.key, &files.key).unwrap();
    let news = two_looks(&mut renewal, &identity);
    assert!(
        matches!(news.as_slice(), [News::Renewed { .. }]),
        "{news:?}"
    );
}

#[test]
fn a_bundle_of_which_only_some_cas_are_written_is_waited_for() {
    let (authority, next) = (Authority::new(), Authority::new());
    let directory = tempfile::tempdir().unwrap();
    let (identity, files) = copied(&authority.issue(GOOD), directory.path());
    let [old, new] = [&files.ca, &next.issue(GOOD).ca].map(|path| fs::read(path).unwrap());
    let before = identity.settings();
    let mut renewal = Renewal::default();
    fs::write(&files.ca, [&old[..], &old[..]].concat()).unwrap();
    assert_eq!(look(&mut renewal, &identity), []);
    fs::write(&files.ca, [&old[..], &old[..], &new[..]].concat()).unwrap();
    assert_eq!(look(&mut renewal, &identity), []);
    assert!(Arc::ptr_eq(&before, &identity.settings()));
    assert_eq!(look(&mut renewal, &identity).len(), 1);
    assert!(!Arc::ptr_eq(&before, &identity.settings()));
}

#[test]
fn a_key_that_everybody_may_read_is_said_at_the_start_and_of_a_renewed_one() {
    let (authority, directory) = (Authority::new(), tempfile::tempdir().unwrap());
    let (identity, files) = copied(&authority.issue(GOOD), directory.path());
    let mut renewal = Renewal::default();
    assert_eq!(renewal.begin(&identity, UnixTime::now()), []);
    replace(&files, &authority.issue(OTHER));
    fs::set_permissions(&files.key, fs::Permissions::from_mode(0o644)).unwrap();
    let news = two_looks(&mut renewal, &identity);
    assert!(
        matches!(
            news.as_slice(),
            [News::Renewed { .. }, News::OpenKey { .. }]
        ),
        "{news:?}"
    );
    assert_eq!(renewal.begin(&identity, UnixTime::now()), news[1..]);
}

#[test]
fn the_end_of_the_certificate_in_use_is_said_once_a_day() {
    let (authority, directory) = (Authority::new(), tempfile::tempdir().unwrap());
    let wish = Wish {
        years: (2020, 2050),
        ..GOOD
    };
    let (identity, files) = copied(&authority.issue(wish), directory.path());
    let mut renewal = Renewal::default();
    let hours_before = |hours: i64| {
        const END_S: i64 = 2_524_608_000; // 2050-01-01 00:00:00 UTC
        let now = u64::try_from(END_S - hours * 3_600).unwrap();
        UnixTime::since_unix_epoch(Duration::from_secs(now))
    };
    let said = |news: Vec<News>| news.iter().map(ToString::to_string).collect::<Vec<_>>();
    assert_eq!(renewal.begin(&identity, hours_before(24 * 14)), []);
    let soon = said(renewal.look(&identity, hours_before(24 * 14 - 1)));
    assert_eq!(soon.len(), 1);
    assert!(
        soon[0].contains(" expires on 2050-01-01 00:00:00 UTC. "),
        "{soon:?}"
    );
    let mut num_said = 1;
    for hours in (1..24 * 14 - 1).rev() {
        num_said += renewal.look(&identity, hours_before(hours)).len();
    }
    assert_eq!(num_said, 14);
    let over = said(renewal.look(&identity, hours_before(-1)));
    assert_eq!(over.len(), 1);
    assert!(
        over[0].contains(" is refused by peers: it expired on 2050-01-01 "),
        "{over:?}"
    );
    assert_eq!(renewal.look(&identity, hours_before(-100)), []);
    // It is of the certificate in use, whatever the files hold.
    fs::write(&files.cert, "").unwrap();
    assert_eq!(Renewal::default().look(&identity, hours_before(1)).len(), 1);
    replace(&files, &authority.issue(GOOD));
    assert_eq!(renewal.look(&identity, hours_before(1)).len(), 1);
    let news = renewal.look(&identity, hours_before(1));
    assert!(
        matches!(news.as_slice(), [News::Renewed { .. }]),
        "{news:?}"
    );
}

#[test]
fn an_identity_follows_its_files_until_nobody_uses_it() {
    let (authority, directory) = (Authority::new(), tempfile::tempdir().unwrap());
    let (fixed, files) = copied(&authority.issue(GOOD), directory.path());
    let identity = Identity::follow(files.clone()).unwrap();
    let is_running = || {
        let tasks = fs::read_dir("/proc/self/task").unwrap();
        tasks.flatten().any(|task| {
            let name = fs::read_to_string(task.path().join("comm"));
            name.is_ok_and(|name| name.trim() == "step3rt-certs")
        })
    };
    let eventually = |is_so: &dyn Fn() -> bool| {
        let begun = Instant::now();
        while !is_so() {
            assert!(begun.elapsed() < Duration::from_secs(20), "not in time");
            std::thread::sleep(Duration::from_millis(20));
        }
    };
    eventually(&is_running);
    let clone = identity.clone();
    drop(identity);
    replace(&files, &authority.issue(OTHER));
    eventually(&|| clone.expiry() != fixed.expiry());
    assert!(is_running());
    drop(clone);
    eventually(&|| !is_running());
}
