//! Decides what every micro-batch lane computes next, and nothing else.
//!
//! This crate owns the scheduling decisions of step3rt. It never reads a clock, opens a socket,
//! starts a thread or uses `unsafe`: events and a time go in, plans and token events come out, so
//! the same inputs always give the same plan.
//!
//! Reading order: [`step`] (what a decision looks like), [`request`] (what a client asks and is
//! told), [`scheduler`] (how a decision is made). Then, inwards:
//!
//! | module | noun |
//! | --- | --- |
//! | `admission`, `outlook` | the way in, and what would come too late |
//! | `queue`, `fair_share`, `drain_rate` | the lines, whose turn it is, and how fast they move |
//! | `places`, `cluster`, `growth` | who gets a place, on which lane, and how long it will need it |
//! | `instance`, `lane`, `draft` | who stays where, and one lane's next step |
//! | `step_time` | how long steps take |
//! | `sequence`, `generated`, `stay`, `sequence_table` | a continuation, its tokens, and its place |
//! | [`block_pool`], `prefix_cache` | KV blocks: free, shared, and what they hold |
//! | `recovery`, `ending` | losses and returns; ends |
//! | `audit` | the invariants, checked |

mod admission;
mod audit;
pub mod block_pool;
mod cluster;
pub mod config;
mod draft;
mod drain_rate;
mod ending;
pub mod error;
mod fair_share;
mod generated;
mod growth;
pub mod ids;
mod instance;
mod lane;
mod outlook;
mod places;
mod prefix_cache;
mod queue;
mod recovery;
pub mod request;
pub mod scheduler;
mod sequence;
mod sequence_table;
mod stay;
pub mod step;
mod step_time;
