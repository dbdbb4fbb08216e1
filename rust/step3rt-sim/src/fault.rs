//! What can go wrong, and how often it did.
//!
//! A kind is counted when it happens, not when it is drawn: a crash of a node that is down is none.

use std::collections::BTreeMap;

/// A kind of fault. Clients that leave count as one: to the scheduler they are as sudden.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fault {
    /// A client cancels.
    Cancel,
    /// A stop string matches, noticed by the detokenizer and so late.
    StopString,
    /// A request that no scheduler should take: no prompt, no tokens, no continuation.
    InvalidRequest,
    /// A request under the id of another one.
    RepeatedRequest,
    /// A deadline that passes.
    Deadline,
    /// An attention instance dies with all that it holds.
    Crash,
    /// It is back, as a new incarnation, before anybody missed it.
    UnnoticedRestart,
    /// A registration arrives again, perhaps when its incarnation is long dead.
    StaleRegistration,
    /// Its steps take many times as long.
    SlowNode,
    /// A plan does not arrive; with it the session ends.
    LostPlan,
    /// The answer to a step does not arrive.
    LostAnswer,
    /// A message takes far longer than others.
    DelayedMessage,
    /// An answer arrives twice.
    DuplicatedAnswer,
    /// An answer overtakes the one before it.
    ReorderedAnswer,
    /// An answer of a dead incarnation arrives.
    StaleAnswer,
    /// An answer lacks its last outputs.
    TornAnswer,
    /// Logits were not finite.
    CorruptLogits,
    /// A step fails half way.
    FailedStep,
    /// FFN instances are lost, so that not every expert is at hand.
    LostExperts,
    /// A sequence loses its place to others that grow.
    KvExhaustion,
    /// The clock jumps forward.
    ClockJump,
    /// The clock is set back, so that the shell holds the time until it has caught up.
    ClockStall,
    /// The server drains.
    Drain,
}

impl Fault {
    /// All of them, in the order of the report.
    pub const ALL: [Self; 23] = [
        Self::Cancel,
        Self::StopString,
        Self::InvalidRequest,
        Self::RepeatedRequest,
        Self::Deadline,
        Self::Crash,
        Self::UnnoticedRestart,
        Self::StaleRegistration,
        Self::SlowNode,
        Self::LostPlan,
        Self::LostAnswer,
        Self::DelayedMessage,
        Self::DuplicatedAnswer,
        Self::ReorderedAnswer,
        Self::StaleAnswer,
        Self::TornAnswer,
        Self::CorruptLogits,
        Self::FailedStep,
        Self::LostExperts,
        Self::KvExhaustion,
        Self::ClockJump,
        Self::ClockStall,
        Self::Drain,
    ];

    /// As the report calls it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Cancel => "cancel",
            Self::StopString => "stop_string",
            Self::InvalidRequest => "invalid_request",
            Self::RepeatedRequest => "repeated_request",
            Self::Deadline => "deadline",
            Self::Crash => "crash",
            Self::UnnoticedRestart => "unnoticed_restart",
            Self::StaleRegistration => "stale_registration",
            Self::SlowNode => "slow_node",
            Self::LostPlan => "lost_plan",
            Self::LostAnswer => "lost_answer",
            Self::DelayedMessage => "delayed_message",
            Self::DuplicatedAnswer => "duplicated_answer",
            Self::ReorderedAnswer => "reordered_answer",
            Self::StaleAnswer => "stale_answer",
            Self::TornAnswer => "torn_answer",
            Self::CorruptLogits => "corrupt_logits",
            Self::FailedStep => "failed_step",
            Self::LostExperts => "lost_experts",
            Self::KvExhaustion => "kv_exhaustion",
            Self::ClockJump => "clock_jump",
            Self::ClockStall => "clock_stall",
            Self::Drain => "drain",
        }
    }
}

/// How often each kind has happened.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FaultCounts(BTreeMap<Fault, u64>);

impl FaultCounts {
    pub(crate) fn note(&mut self, fault: Fault) {
        *self.0.entry(fault).or_default() += 1;
    }

    pub(crate) fn add(&mut self, other: &Self) {
        for (&fault, count) in &other.0 {
            *self.0.entry(fault).or_default() += count;
        }
    }

    /// How often `fault` has happened.
    pub fn of(&self, fault: Fault) -> u64 {
        self.0.get(&fault).copied().unwrap_or(0)
    }
}
