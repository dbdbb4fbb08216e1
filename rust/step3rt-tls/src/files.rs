//! The three files of a member of a cluster, and what can be wrong with them.
//!
//! Reads them; never writes, and never says what is in the key.

use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use thiserror::Error;

use crate::condition::OwnFault;

/// Any process of the host may read a file with this bit.
const READ_BY_OTHERS: u32 = 0o004;

/// Where certificate, key and CA are; each in PEM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsFiles {
    /// This member's certificate, and those between it and the CA, if any.
    pub cert: PathBuf,
    /// Its key.
    pub key: PathBuf,
    /// The CA's certificate: whoever it has issued one to belongs to the cluster.
    pub ca: PathBuf,
}

/// Why this process cannot speak TLS.
#[derive(Debug, Error)]
pub enum SetupError {
    /// Some of the three settings, not all.
    #[error(
        "TLS is half set up: `{missing}` is missing. A member of a cluster shows a certificate, and \
         checks its peers'. Set `tls_cert`, `tls_key` and `tls_ca`, or none of them"
    )]
    Incomplete {
        /// The first that is not there.
        missing: &'static str,
    },
    /// A file cannot be read.
    #[error("{setting} = {path} cannot be read: {error}. Correct the path or its permissions")]
    Unreadable {
        /// Which of the three.
        setting: &'static str,
        /// As configured.
        path: PathBuf,
        /// Of the operating system.
        error: io::Error,
    },
    /// It holds something else.
    #[error(
        "{setting} = {path} has no {wanted} in PEM form: {found}. `openssl x509 -in FILE -text` and \
         `openssl pkey -in FILE -check` show what it is"
    )]
    Content {
        /// Which of the three.
        setting: &'static str,
        /// As configured.
        path: PathBuf,
        /// What it should hold.
        wanted: &'static str,
        /// What is wrong.
        found: String,
    },
    /// Key and certificate are two identities.
    #[error(
        "tls_key = {key} is not the key of tls_cert = {cert}. Nobody could prove to be its owner \
         with it. Give the key that the certificate was requested with"
    )]
    KeyOfAnother {
        /// As configured.
        cert: PathBuf,
        /// As configured.
        key: PathBuf,
    },
    /// Nobody would notice a renewal.
    #[error(
        "no thread can be started that looks for renewed certificates: {0}. Check the process's limits"
    )]
    NoThread(#[source] io::Error),
    /// No peer would trust it.
    #[error("tls_cert = {cert} is of no use: {fault}")]
    Own {
        /// As configured.
        cert: PathBuf,
        /// Why.
        fault: OwnFault,
    },
}

/// What the files hold.
#[derive(PartialEq, Eq)]
pub(crate) struct Contents {
    pub(crate) chain: Vec<CertificateDer<'static>>,
    pub(crate) key: PrivateKeyDer<'static>,
    pub(crate) ca: Vec<CertificateDer<'static>>,
}

impl TlsFiles {
    /// The files that three settings name: all of them or none.
    pub fn from_settings(
        cert: Option<PathBuf>,
        key: Option<PathBuf>,
        ca: Option<PathBuf>,
    ) -> Result<Option<Self>, SetupError> {
        let missing = match (cert, key, ca) {
            (None, None, None) => return Ok(None),
            (Some(cert), Some(key), Some(ca)) => return Ok(Some(Self { cert, key, ca })),
            (None, ..) => "tls_cert",
            (_, None, _) => "tls_key",
            (.., None) => "tls_ca",
        };
        Err(SetupError::Incomplete { missing })
    }

    /// Whether every user of this host may read the key.
    pub fn key_is_readable_by_all(&self) -> bool {
        std::fs::metadata(&self.key)
            .is_ok_and(|found| found.permissions().mode() & READ_BY_OTHERS != 0)
    }

    pub(crate) fn read(&self) -> Result<Contents, SetupError> {
        let key = PrivateKeyDer::from_pem_file(&self.key)
            .map_err(|error| wrong("tls_key", &self.key, "private key", error))?;
        Ok(Contents {
            chain: certificates("tls_cert", &self.cert)?,
            key,
            ca: certificates("tls_ca", &self.ca)?,
        })
    }
}

/// All certificates of a file, at least one.
fn certificates(
    setting: &'static str,
    path: &Path,
) -> Result<Vec<CertificateDer<'static>>, SetupError> {
    let wrong = |error| wrong(setting, path, "certificate", error);
    let found: Result<Vec<_>, _> = CertificateDer::pem_file_iter(path)
        .map_err(wrong)?
        .collect();
    let found = found.map_err(wrong)?;
    if found.is_empty() {
        return Err(wrong(pem::Error::NoItemsFound));
    }
    Ok(found)
}

fn wrong(
    setting: &'static str,
    path: &Path,
    wanted: &'static str,
    error: pem::Error,
) -> SetupError {
    let path = path.to_owned();
    match error {
        pem::Error::Io(error) => SetupError::Unreadable {
            setting,
            path,
            error,
        },
        error => SetupError::Content {
            setting,
            path,
            wanted,
            found: error.to_string(),
        },
    }
}
