//! A real coordinator on real sockets, and instances that answer its steps without a model.

mod clients;
mod cluster;
mod generate;
mod instances;
mod metadata;
mod node;
mod process;
mod refusals;
mod stopping;
mod texts;
