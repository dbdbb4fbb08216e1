//! What `step3rt doctor` says about a member's files. Changes nothing.

use rustls::pki_types::UnixTime;

use crate::files::TlsFiles;
use crate::identity::Identity;
use crate::renewal::WARNED_DAYS;

/// How bad it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    /// As it should be.
    Ok,
    /// It works, and should be changed.
    Note,
    /// It does not work.
    Missing,
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// How bad it is.
    pub level: Level,
    /// What is there.
    pub found: String,
    /// What to do; empty when there is nothing to do, or when `found` says it.
    pub fix: String,
}

/// Looks at the files that a process would speak TLS with.
pub fn findings(files: TlsFiles) -> Vec<Finding> {
    let identity = match Identity::load(files) {
        Ok(identity) => identity,
        Err(error) => return vec![finding(Level::Missing, error.to_string(), "")],
    };
    if let Err(error) = identity.check() {
        return vec![finding(Level::Missing, error.to_string(), "")];
    }
    let cert = identity.files().cert.display();
    let mut findings = vec![match identity.expiry() {
        Some(expiry) if expiry.days_after(UnixTime::now()) < WARNED_DAYS => finding(
            Level::Note,
            format!("{cert} was issued by the CA, and expires on {expiry}"),
            "issue a new one from the cluster's CA; what uses it takes it by itself",
        ),
        Some(expiry) => finding(
            Level::Ok,
            format!("{cert} was issued by the CA, and is valid until {expiry}"),
            "",
        ),
        None => finding(Level::Ok, format!("{cert} was issued by the CA"), ""),
    }];
    let key = identity.files().key.display();
    findings.push(if identity.files().key_is_readable_by_all() {
        finding(
            Level::Note,
            format!("every user of this host may read {key}"),
            &format!("chmod o= {key}"),
        )
    } else {
        finding(
            Level::Ok,
            format!("{key} is its key, and not for everybody"),
            "",
        )
    });
    findings
}

fn finding(level: Level, found: String, fix: &str) -> Finding {
    Finding {
        level,
        found,
        fix: fix.to_owned(),
    }
}
