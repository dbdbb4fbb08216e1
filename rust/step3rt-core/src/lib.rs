//! Decides what every micro-batch lane computes next, and nothing else.
//!
//! This crate owns the scheduling decisions of step3rt. It never reads a clock, opens a socket,
//! starts a thread or uses `unsafe`: events and a time go in, plans and token events come out, so
//! the same inputs always give the same plan.
//!
//! Reading order: [`step`] (what a decision looks like), [`request`] (what a client asks and is
//! told), [`scheduler`] (how a decision is made); then, inwards, `cluster` (which instance and
//! lane), `instance` and `draft` (one lane's next step), `lane`, `sequence`, `stay`, and [`block_pool`].

mod admission;
mod audit;
pub mod block_pool;
mod cluster;
pub mod config;
mod draft;
mod ending;
pub mod error;
pub mod ids;
mod instance;
mod lane;
mod prefix_cache;
mod queue;
mod recovery;
pub mod request;
pub mod scheduler;
mod sequence;
mod sequence_table;
mod stay;
pub mod step;
