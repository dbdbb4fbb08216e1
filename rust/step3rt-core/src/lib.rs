//! Decides what every micro-batch lane computes next, and nothing else.
//!
//! This crate owns the scheduling decisions of step3rt. It never reads a clock, opens a socket,
//! starts a thread or uses `unsafe`: events and a time go in, plans and token events come out, so
//! the same inputs always give the same plan.
//!
//! Reading order: [`step`] (what a decision looks like), [`scheduler`] (how it is made),
//! [`sequence`], [`block_pool`].

pub mod config;
pub mod error;
pub mod ids;
pub mod scheduler;
pub mod step;
