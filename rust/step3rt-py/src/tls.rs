//! Certificate, key and CA as Python names them: three paths. Opens nothing.

use std::path::PathBuf;

use pyo3::prelude::*;
use step3rt_tls::TlsFiles;

/// `(tls_cert, tls_key, tls_ca)`.
#[derive(FromPyObject)]
pub(crate) struct TlsPaths(PathBuf, PathBuf, PathBuf);

impl From<TlsPaths> for TlsFiles {
    fn from(TlsPaths(cert, key, ca): TlsPaths) -> Self {
        Self { cert, key, ca }
    }
}
