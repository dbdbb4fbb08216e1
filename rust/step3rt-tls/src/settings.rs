//! TLS settings for each kind of connection, made of what the files of a member hold.
//!
//! They never change: other files make other settings.

use std::fmt;
use std::path::Path;
use std::sync::Arc;

use rustls::client::{Resumption, WebPkiServerVerifier};
use rustls::crypto::CryptoProvider;
use rustls::crypto::ring::cipher_suite::{
    TLS13_AES_128_GCM_SHA256, TLS13_AES_256_GCM_SHA384, TLS13_CHACHA20_POLY1305_SHA256,
};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, UnixTime};
use rustls::server::danger::ClientCertVerifier;
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::sign::CertifiedKey;
use rustls::{ClientConfig, RootCertStore, ServerConfig, version};

use crate::condition::{self, OwnFault};
use crate::date::Date;
use crate::files::{Contents, SetupError, TlsFiles};

/// Keeps a connection that was meant for one kind of listener from being taken by another.
const FABRIC_PROTOCOL: &[u8] = b"step3rt-fabric/1";
const GRPC_PROTOCOL: &[u8] = b"h2";

/// What a member's files were made into at one time.
pub struct Settings {
    /// For an attention instance that connects to an FFN instance.
    pub fabric_client: Arc<ClientConfig>,
    /// For the FFN instance.
    pub fabric_server: Arc<ServerConfig>,
    /// For an instance, or `step3rt doctor`, that connects to the coordinator.
    pub control_client: Arc<ClientConfig>,
    /// For the coordinator's listener for instances.
    pub control_server: Arc<ServerConfig>,
    /// For the coordinator's listener for clients, who show no certificate.
    pub public_server: Arc<ServerConfig>,
    /// When the certificate (or its CA) expires, as far as that can be told.
    pub expiry: Option<Date>,
    contents: Contents,
    verifier: Arc<dyn ClientCertVerifier>,
}

impl Settings {
    /// Makes them of what `files` held. Whether peers will trust the certificate is
    /// [`Settings::judge`]'s question.
    pub(crate) fn new(
        files: &TlsFiles,
        contents: Contents,
        provider: &Arc<CryptoProvider>,
    ) -> Result<Self, SetupError> {
        let Contents { chain, key, ca } = &contents;
        let mut roots = RootCertStore::empty();
        for certificate in ca {
            let added = roots.add(certificate.clone());
            added.map_err(|error| content("tls_ca", &files.ca, &error))?;
        }
        let roots = Arc::new(roots);
        let certified = CertifiedKey::from_der(chain.clone(), key.clone_key(), provider);
        certified.map_err(|error| match error {
            rustls::Error::InconsistentKeys(_) => SetupError::KeyOfAnother {
                cert: files.cert.clone(),
                key: files.key.clone(),
            },
            rustls::Error::InvalidCertificate(_) => content("tls_cert", &files.cert, &error),
            error => content("tls_key", &files.key, &error),
        })?;
        let verifier =
            WebPkiClientVerifier::builder_with_provider(Arc::clone(&roots), Arc::clone(provider))
                .build()
                .map_err(|error| content("tls_ca", &files.ca, &error))?;
        let member = Member {
            provider,
            roots: &roots,
            verifier: &verifier,
            chain,
            key,
        };
        let settings = |error| content("tls_cert", &files.cert, &error);
        Ok(Self {
            fabric_client: member.client(FABRIC_PROTOCOL).map_err(settings)?,
            fabric_server: member.mutual_server(FABRIC_PROTOCOL).map_err(settings)?,
            control_client: member.client(GRPC_PROTOCOL).map_err(settings)?,
            control_server: member.mutual_server(GRPC_PROTOCOL).map_err(settings)?,
            public_server: member.public_server().map_err(settings)?,
            expiry: condition::expiry(&*verifier, chain),
            verifier,
            contents,
        })
    }

    /// Whether peers will trust the certificate now.
    pub(crate) fn judge(&self) -> Result<(), OwnFault> {
        condition::judge(&*self.verifier, &self.contents.chain, UnixTime::now())
    }

    /// What they were made of.
    pub(crate) fn contents(&self) -> &Contents {
        &self.contents
    }
}

/// ring's ciphers. AES-128 comes first: it is as safe as the certificates' own keys, and every byte
/// of every layer goes through it.
pub fn provider() -> CryptoProvider {
    let mut provider = rustls::crypto::ring::default_provider();
    let is_tls13 = |suite: &rustls::SupportedCipherSuite| suite.tls13().is_some();
    provider.cipher_suites.retain(|suite| !is_tls13(suite));
    let tls13 = [
        TLS13_AES_128_GCM_SHA256,
        TLS13_AES_256_GCM_SHA384,
        TLS13_CHACHA20_POLY1305_SHA256,
    ];
    provider.cipher_suites.splice(0..0, tls13);
    provider
}

fn content(setting: &'static str, path: &Path, error: &dyn fmt::Display) -> SetupError {
    SetupError::Content {
        setting,
        path: path.to_owned(),
        wanted: if setting == "tls_key" {
            "private key"
        } else {
            "certificate"
        },
        found: error.to_string(),
    }
}

struct Member<'a> {
    provider: &'a Arc<CryptoProvider>,
    roots: &'a Arc<RootCertStore>,
    verifier: &'a Arc<dyn ClientCertVerifier>,
    chain: &'a [CertificateDer<'static>],
    key: &'a PrivateKeyDer<'static>,
}

impl Member<'_> {
    fn client(&self, protocol: &[u8]) -> Result<Arc<ClientConfig>, rustls::Error> {
        let verifier = WebPkiServerVerifier::builder_with_provider(
            Arc::clone(self.roots),
            Arc::clone(self.provider),
        );
        let verifier = verifier.build().map_err(general)?;
        let mut config = ClientConfig::builder_with_provider(Arc::clone(self.provider))
            .with_protocol_versions(&[&version::TLS13])?
            .with_webpki_verifier(verifier)
            .with_client_auth_cert(self.chain.to_vec(), self.key.clone_key())?;
        config.alpn_protocols = vec![protocol.to_vec()];
        // Every connection proves again who is at both ends: connections are few and long.
        config.resumption = Resumption::disabled();
        Ok(Arc::new(config))
    }

    fn mutual_server(&self, protocol: &[u8]) -> Result<Arc<ServerConfig>, rustls::Error> {
        let config = ServerConfig::builder_with_provider(Arc::clone(self.provider))
            .with_protocol_versions(&[&version::TLS13])?
            .with_client_cert_verifier(Arc::clone(self.verifier))
            .with_single_cert(self.chain.to_vec(), self.key.clone_key())?;
        Ok(finish(config, protocol))
    }

    fn public_server(&self) -> Result<Arc<ServerConfig>, rustls::Error> {
        let config = ServerConfig::builder_with_provider(Arc::clone(self.provider))
            .with_protocol_versions(&[&version::TLS13, &version::TLS12])?
            .with_no_client_auth()
            .with_single_cert(self.chain.to_vec(), self.key.clone_key())?;
        Ok(finish(config, GRPC_PROTOCOL))
    }
}

/// No tickets, for the same reason as at the client; and so that nothing but what this project sends
/// ever travels on a link after its handshake.
fn finish(mut config: ServerConfig, protocol: &[u8]) -> Arc<ServerConfig> {
    config.alpn_protocols = vec![protocol.to_vec()];
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Arc::new(config)
}

fn general(error: impl fmt::Display) -> rustls::Error {
    rustls::Error::General(error.to_string())
}
