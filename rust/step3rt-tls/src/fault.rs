//! What can be wrong with a peer that speaks TLS, or with this end in its eyes.
//!
//! A closed list in our words, made of what rustls reports. It never decides what happens next.

use std::error::Error as StdError;
use std::io;

use rustls::{AlertDescription, CertificateError, Error as RustlsError, InvalidMessage};
use thiserror::Error;

use crate::date::Date;

/// Why two ends do not trust or understand each other.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum Fault {
    /// The peer's certificate is no longer valid.
    #[error(
        "its certificate expired{}. Issue it a new one from the cluster's CA, and check both hosts' \
         clocks", on(*.not_after)
    )]
    PeerExpired {
        /// When, as far as it is known.
        not_after: Option<Date>,
    },
    /// Not valid yet.
    #[error("its certificate is not valid yet. Check the clocks of both hosts")]
    PeerNotYetValid,
    /// Of another CA.
    #[error(
        "its certificate was not issued by the CA in `tls_ca`. It belongs to another cluster, or one \
         end has an outdated file: give both ends the same CA, and certificates that it issued"
    )]
    PeerOfAnotherCa,
    /// It is somebody, but not who was called.
    #[error(
        "its certificate is for {presented}, not for {expected}. Issue it one with that host in its \
         subjectAltName, or connect to it by a name that it has"
    )]
    PeerOfAnotherName {
        /// Whom this end connected to.
        expected: String,
        /// Who answered.
        presented: String,
    },
    /// It must not be used for this.
    #[error(
        "its certificate is not meant for this. An instance serves and connects: issue it one with \
         extendedKeyUsage = serverAuth, clientAuth"
    )]
    PeerOfAnotherPurpose,
    /// None was shown.
    #[error("it showed no certificate. Give it `tls_cert`, `tls_key` and `tls_ca` of the cluster")]
    PeerWithoutCertificate,
    /// Something rarer.
    #[error("its certificate cannot be trusted: {0}. Issue it a new one from the cluster's CA")]
    PeerOtherwise(String),
    /// The peer does not accept this end.
    #[error(
        "it does not accept this end's certificate ({0}). Its log says why; give this end a \
         certificate that its CA issued, with the host in its subjectAltName"
    )]
    Rejected(Objection),
    /// It speaks something else.
    #[error(
        "it does not speak TLS, and this end was given certificates. Give it `tls_cert`, `tls_key` \
         and `tls_ca`, too, or give them to neither"
    )]
    PeerSpeaksPlain,
    /// It hung up or fell silent before it was done.
    #[error(
        "it ended the connection in the middle of the TLS handshake. It may speak no TLS: give \
         `tls_cert`, `tls_key` and `tls_ca` to both ends, and see its log"
    )]
    PeerLeft,
    /// Neither end's certificate.
    #[error("the TLS handshake failed: {0}. Run one release everywhere, and see its log")]
    Protocol(String),
}

/// What a peer holds against this end's certificate: the alert that it sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum Objection {
    /// As it says.
    #[error("expired")]
    Expired,
    /// As it says.
    #[error("issued by a CA that it does not know")]
    UnknownCa,
    /// As it says.
    #[error("missing")]
    Missing,
    /// As it says.
    #[error("not meant for this use")]
    Purpose,
    /// As it says.
    #[error("not as it should be")]
    Other,
}

impl Fault {
    /// Whether nothing can change without somebody who changes settings or files of this end.
    pub fn is_for_this_end(&self) -> bool {
        matches!(
            self,
            Self::PeerOfAnotherCa
                | Self::PeerOfAnotherName { .. }
                | Self::PeerSpeaksPlain
                | Self::Rejected(_)
        )
    }

    /// What an error of a connection means, if it or one of its causes is about TLS.
    pub fn among_causes(error: &(dyn StdError + 'static)) -> Option<Self> {
        let mut cause = Some(error);
        while let Some(error) = cause {
            // An error of the operating system that carries another one does not call it its cause.
            let inner: &(dyn StdError + 'static) = match error.downcast_ref::<io::Error>() {
                Some(io) => match io.get_ref() {
                    Some(inner) => inner,
                    None => error,
                },
                None => error,
            };
            if let Some(fault) = inner.downcast_ref::<Self>() {
                return Some(fault.clone());
            }
            if let Some(error) = inner.downcast_ref::<RustlsError>() {
                return Some(error.clone().into());
            }
            cause = inner.source();
        }
        None
    }
}

fn on(date: Option<Date>) -> String {
    date.map_or_else(String::new, |date| format!(" on {date}"))
}

impl From<RustlsError> for Fault {
    fn from(error: RustlsError) -> Self {
        match error {
            RustlsError::InvalidCertificate(error) => certificate(error),
            RustlsError::InvalidMessage(InvalidMessage::InvalidContentType) => {
                Self::PeerSpeaksPlain
            }
            RustlsError::NoCertificatesPresented => Self::PeerWithoutCertificate,
            RustlsError::AlertReceived(alert) => match objection(alert) {
                Some(objection) => Self::Rejected(objection),
                None => Self::Protocol(format!("it sent the alert {alert:?}")),
            },
            error => Self::Protocol(error.to_string()),
        }
    }
}

fn certificate(error: CertificateError) -> Fault {
    match error {
        CertificateError::Expired => Fault::PeerExpired { not_after: None },
        CertificateError::ExpiredContext { not_after, .. } => Fault::PeerExpired {
            not_after: Some(Date::of(not_after)),
        },
        CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
            Fault::PeerNotYetValid
        }
        // A CA of the same name and another key: the signature is what does not fit.
        CertificateError::UnknownIssuer | CertificateError::BadSignature => Fault::PeerOfAnotherCa,
        CertificateError::NotValidForNameContext {
            expected,
            presented,
        } => Fault::PeerOfAnotherName {
            expected: expected.to_str().into_owned(),
            presented: match presented.as_slice() {
                [] => "no host".to_owned(),
                names => names.join(", "),
            },
        },
        CertificateError::InvalidPurpose | CertificateError::InvalidPurposeContext { .. } => {
            Fault::PeerOfAnotherPurpose
        }
        error => Fault::PeerOtherwise(error.to_string()),
    }
}

fn objection(alert: AlertDescription) -> Option<Objection> {
    match alert {
        AlertDescription::CertificateExpired => Some(Objection::Expired),
        // What is sent for a signature that does not fit the CA's key is a decrypt error.
        AlertDescription::UnknownCA | AlertDescription::DecryptError => Some(Objection::UnknownCa),
        AlertDescription::CertificateRequired | AlertDescription::NoCertificate => {
            Some(Objection::Missing)
        }
        AlertDescription::UnsupportedCertificate => Some(Objection::Purpose),
        AlertDescription::BadCertificate
        | AlertDescription::CertificateRevoked
        | AlertDescription::CertificateUnknown
        | AlertDescription::AccessDenied => Some(Objection::Other),
        _ => None,
    }
}
