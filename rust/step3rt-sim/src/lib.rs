//! Drives the real scheduler through simulated faults by one seed, and measures it.
//!
//! The scheduler of `step3rt-core` runs unchanged. Instances, network, clients and clock are
//! simulated here, in one thread per seed and without a real clock, so a seed that fails replays
//! event by event.
//!
//! Reading order: `world` (what happens, and when all is over), `coordinator` (the drive loop and
//! every check), `node` and `instance` (machines), `traffic` and `clients` (what is asked and
//! told), `trouble` and [`fault`] (what goes wrong), `ledger` (the second book), `pace` (how long it takes).

pub mod bench;
mod clients;
mod coordinator;
pub mod fault;
#[cfg(test)]
mod hindsight;
mod instance;
mod ledger;
mod model;
mod node;
pub mod options;
mod pace;
mod policy;
mod profile;
pub mod replay;
mod rng;
pub mod sabotage;
mod stats;
pub mod sweep;
mod traces;
mod traffic;
mod trouble;
mod violation;
pub mod workload;
mod world;

pub use violation::Violation;
pub use world::Outcome;
