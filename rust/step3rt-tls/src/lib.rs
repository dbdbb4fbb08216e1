//! Who a process is to its cluster: a certificate, its key, and the CA that all members share; and
//! the TLS settings that are made of them for every kind of connection.
//!
//! This crate reads three files, again when they are renewed, and makes settings. It never opens a
//! socket, and it has no way to trust a peer without a certificate of the cluster's CA.
//!
//! | connection | who shows a certificate | versions |
//! | --- | --- | --- |
//! | link between instances | both | 1.3 |
//! | instance to coordinator | both | 1.3 |
//! | client to coordinator | the coordinator | 1.2, 1.3 |
//!
//! Whoever connects also checks that the certificate is for the host name or address that it
//! connected to. Reading order: [`files`], [`settings`], [`identity`], [`renewal`], [`fault`] (what can be
//! wrong with a peer), [`condition`] (what can be wrong with the own certificate), [`findings`] (for
//! `step3rt doctor`).

pub mod condition;
pub mod fault;
pub mod files;
pub mod findings;
pub mod identity;
pub mod renewal;
pub mod settings;

mod date;

pub use fault::Fault;
pub use files::{SetupError, TlsFiles};
pub use identity::Identity;

/// First byte of a TLS connection: a handshake record. No protocol of this project starts with it.
pub const FIRST_BYTE: u8 = 0x16;
