//! One instance's side of a cluster: its session with the coordinator and the links to its peers.
//!
//! This crate owns what happens around an instance's loop: registering, heartbeats, following the
//! topology, the one place to sleep, signals, and the service manager. It never computes, and it
//! knows nothing of Python or of what a payload means.
//!
//! Reading order: [`node`] (the object that the binding wraps), [`session`] (control plane),
//! [`links`] (data plane), then the rest.

pub mod dialer;
pub mod error;
pub mod event;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
pub mod host;
pub mod links;
pub mod node;
pub mod options;
pub mod pulse;
pub mod session;
pub mod signals;
pub mod supervisor;
pub mod topology;
