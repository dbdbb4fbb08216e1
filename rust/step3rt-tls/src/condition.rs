//! Whether the own certificate is one that peers will trust, and for how long.
//!
//! Asks the same verifiers that peers use. It never changes what is configured.

use std::time::Duration;

use rustls::CertificateError;
use rustls::Error as RustlsError;
use rustls::pki_types::{CertificateDer, UnixTime};
use rustls::server::danger::ClientCertVerifier;
use thiserror::Error;

use crate::date::Date;

/// Far enough for every certificate to have expired: the year 9999, which is the last that one can
/// name, has passed.
const END_OF_TIME: Duration = Duration::from_hours(24 * 2_932_897);

/// Why no peer would trust the own certificate.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum OwnFault {
    /// Too old.
    #[error("it expired{}. Issue a new one from the cluster's CA, and check this host's clock", on(*.0))]
    Expired(Option<Date>),
    /// Too young.
    #[error("it is not valid yet. Check this host's clock")]
    NotYetValid,
    /// Issued by somebody else.
    #[error(
        "the CA in `tls_ca` did not issue it. Give the cluster's CA, and a certificate that it issued"
    )]
    OtherCa,
    /// Anything else.
    #[error(
        "{0}. Issue a new one from the cluster's CA, with extendedKeyUsage = serverAuth, clientAuth"
    )]
    Other(String),
}

fn on(date: Option<Date>) -> String {
    date.map_or_else(String::new, |date| format!(" on {date}"))
}

/// Whether a peer would accept `chain` from an instance that connects to it.
pub(crate) fn judge(
    verifier: &dyn ClientCertVerifier,
    chain: &[CertificateDer<'_>],
    now: UnixTime,
) -> Result<(), OwnFault> {
    verify(verifier, chain, now).map_err(|error| match error {
        CertificateError::Expired => OwnFault::Expired(None),
        CertificateError::ExpiredContext { not_after, .. } => {
            OwnFault::Expired(Some(Date::of(not_after)))
        }
        CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
            OwnFault::NotYetValid
        }
        CertificateError::UnknownIssuer | CertificateError::BadSignature => OwnFault::OtherCa,
        error => OwnFault::Other(error.to_string()),
    })
}

/// When the first certificate of `chain`, or the CA, expires; `None` when that cannot be told.
pub(crate) fn expiry(
    verifier: &dyn ClientCertVerifier,
    chain: &[CertificateDer<'_>],
) -> Option<Date> {
    match verify(verifier, chain, UnixTime::since_unix_epoch(END_OF_TIME)) {
        Err(CertificateError::ExpiredContext { not_after, .. }) => Some(Date::of(not_after)),
        _ => None,
    }
}

fn verify(
    verifier: &dyn ClientCertVerifier,
    chain: &[CertificateDer<'_>],
    now: UnixTime,
) -> Result<(), CertificateError> {
    let (own, between) = chain.split_first().ok_or(CertificateError::BadEncoding)?;
    match verifier.verify_client_cert(own, between, now) {
        Ok(_) => Ok(()),
        Err(RustlsError::InvalidCertificate(error)) => Err(error),
        Err(_) => Err(CertificateError::ApplicationVerificationFailure),
    }
}
