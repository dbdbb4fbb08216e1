//! A real coordinator on real sockets, and instances that answer its steps without a model.

#[path = "../../../step3rt-tls/tests/certs/mod.rs"]
mod certs;
mod clients;
mod cluster;
mod floods;
mod generate;
mod instances;
mod metadata;
mod metrics;
mod node;
mod process;
mod refusals;
mod renewals;
mod stopping;
mod texts;
