//! What can be wrong with a setting.

use std::net::SocketAddr;

use thiserror::Error;

/// A configuration that cannot be used.
#[derive(Debug, Error)]
pub enum ConfigError {
    /// Not JSON, an unknown key, or a value of the wrong type.
    #[error("the configuration cannot be read: {0}. Correct the key or value named")]
    Unreadable(#[from] serde_json::Error),
    /// A number out of its range.
    #[error("{key} = {found} is not usable: {allowed}. Change `{key}`")]
    OutOfRange {
        /// The key.
        key: &'static str,
        /// Its value.
        found: String,
        /// What is allowed, and why.
        allowed: &'static str,
    },
    /// An address that does not resolve.
    #[error(
        "{key} = {found:?} is not an address: {reason}. Write `host:port`, e.g. 127.0.0.1:50051"
    )]
    Address {
        /// The key.
        key: &'static str,
        /// Its value.
        found: String,
        /// The resolver's words.
        reason: String,
    },
    /// Metrics that others could read.
    #[error(
        "metrics_listen = {address} is reachable from other hosts, and metrics are plain HTTP that asks \
         nobody who they are. Listen on 127.0.0.1 and have a collector on this host fetch them, or set \
         `insecure_bind` if the network is trusted"
    )]
    PublicMetrics {
        /// Where it would listen.
        address: SocketAddr,
    },
    /// A listener that others could reach in clear text.
    #[error(
        "{key} = {address} is reachable from other hosts, and TLS is not set up: prompts and control \
         messages would travel in clear text. Set `tls_cert`, `tls_key` and `tls_ca`, listen on \
         127.0.0.1, or set `insecure_bind` if the network is trusted"
    )]
    InsecureBind {
        /// The key.
        key: &'static str,
        /// Where it would listen.
        address: SocketAddr,
    },
}
