//! The scheduler as the drive loop sees it, against instances that keep KV memory.

mod admission;
mod ahead;
mod batching;
mod clients;
mod deadlines;
mod endings;
mod failures;
mod instance;
mod preemption;
mod prefix;
mod simulation;
mod step_times;
mod trace;
mod world;
