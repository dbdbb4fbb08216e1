//! Certificates to test with, made for each test. Included by the tests of other crates, too.

#![allow(dead_code, reason = "each test binary uses its own part")]
#![allow(
    unreachable_pub,
    reason = "some include it in a module, some at their root"
)]
#![allow(clippy::unwrap_used, reason = "a test that cannot set up fails")]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa,
    KeyPair, KeyUsagePurpose, date_time_ymd,
};
use step3rt_tls::{Identity, TlsFiles};
use tempfile::TempDir;

/// A CA of its own, and the files of those it issued certificates to.
pub struct Authority {
    directory: TempDir,
    issuer: CertifiedIssuer<'static, KeyPair>,
}

/// What a certificate says.
#[derive(Clone, Copy, Debug)]
pub struct Wish {
    /// A name for its files.
    pub name: &'static str,
    /// The host that it is for.
    pub host: &'static str,
    /// First and last year.
    pub years: (i32, i32),
    /// Whether it may be shown to whom one connects to, and to who connects.
    pub purposes: (bool, bool),
}

/// A member that all others of its CA trust.
pub const GOOD: Wish = Wish {
    name: "good",
    host: "127.0.0.1",
    years: (2020, 2100),
    purposes: (true, true),
};

/// One whose time is over.
pub const EXPIRED: Wish = Wish {
    name: "expired",
    years: (2020, 2024),
    ..GOOD
};

impl Authority {
    /// A CA that nobody else trusts, even though all of them have one name.
    pub fn new() -> Self {
        let mut params = CertificateParams::default();
        params
            .distinguished_name
            .push(DnType::CommonName, "step3rt test CA");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        params.not_before = date_time_ymd(2020, 1, 1);
        params.not_after = date_time_ymd(2200, 1, 1);
        let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        let directory = TempDir::new().unwrap();
        fs::write(directory.path().join("ca.pem"), issuer.pem()).unwrap();
        Self { directory, issuer }
    }

    /// The files of a new member.
    pub fn issue(&self, wish: Wish) -> TlsFiles {
        let mut params = CertificateParams::new(vec![wish.host.to_owned()]).unwrap();
        params
            .distinguished_name
            .push(DnType::CommonName, wish.name);
        params.not_before = date_time_ymd(wish.years.0, 1, 1);
        params.not_after = date_time_ymd(wish.years.1, 1, 1);
        let (client, server) = wish.purposes;
        let purposes = [
            (server, ExtendedKeyUsagePurpose::ServerAuth),
            (client, ExtendedKeyUsagePurpose::ClientAuth),
        ];
        params.extended_key_usages = purposes
            .into_iter()
            .filter_map(|(has, purpose)| has.then_some(purpose))
            .collect();
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        let files = TlsFiles {
            cert: self.file(wish.name, "cert"),
            key: self.file(wish.name, "key"),
            ca: self.directory.path().join("ca.pem"),
        };
        fs::write(&files.cert, certificate.pem()).unwrap();
        fs::write(&files.key, key.serialize_pem()).unwrap();
        fs::set_permissions(&files.key, fs::Permissions::from_mode(0o600)).unwrap();
        files
    }

    /// A new member, ready to speak.
    pub fn member(&self, wish: Wish) -> Identity {
        Identity::load(self.issue(wish)).unwrap()
    }

    fn file(&self, name: &str, what: &str) -> PathBuf {
        self.directory.path().join(format!("{name}.{what}.pem"))
    }
}
