//! Moves slots between instances, once per layer and micro-batch lane.
//!
//! This crate owns the data plane: slots, flags, frames, and the fabrics that carry them. It never
//! knows what a payload means; models and requests are unknown here.
//!
//! A transfer is a *slot* (a fixed buffer for one lane, direction and peer) and a *flag* (a
//! monotonic sequence number). The producer writes the slot, then publishes the number; the
//! consumer waits for the number, then reads. A lane strictly alternates, and that is the credit:
//!
//! ```text
//!   attention (initiator)                    FFN (responder)
//!   writes send slot, push s   ── A2F s ──▶  Arrived s, reads receive slot
//!   Arrived s, reads           ◀─ F2A s ──   writes send slot, push s   (frees its receive slot)
//!   push s+1                   ── A2F ──▶    ...                        (frees A's receive slot)
//! ```
//!
//! Reading order: [`contract`], [`frame`], `endpoint`, then one fabric.

pub mod contract;
pub mod frame;
