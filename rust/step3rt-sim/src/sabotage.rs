//! Breaks the scheduler or an instance on purpose, to prove that the simulator sees it.
//!
//! A [`Core`] without sabotage passes everything through. It never repairs anything.

use std::collections::BTreeMap;
use std::str::FromStr;

use step3rt_core::config::SchedulerConfig;
use step3rt_core::ids::{BlockId, InstanceId, LaneId, RequestId, TimeNs, TokenId};
use step3rt_core::request::RequestEvent;
use step3rt_core::scheduler::{Event, Scheduler, SchedulerStats};
use step3rt_core::step::{StepKey, StepPlan};

/// A defect of a kind that schedulers and instances have had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sabotage {
    /// An instance takes the samples of a step over twice.
    DuplicateApply,
    /// A cancel has no effect.
    LostCancel,
    /// A block is never free again.
    LeakedBlock,
    /// A block is granted that another sequence has.
    BlockGrantedTwice,
    /// An answer of a dead incarnation is taken for one of the living.
    StaleAnswerAccepted,
    /// A step has more tokens than the slots hold.
    BudgetExceeded,
    /// Prompts get whole steps, however long those who decode wait.
    TargetIgnored,
    /// Requests are refused whose deadline could be met.
    DeadlineBroughtForward,
    /// An instance is never told to forget a sequence.
    ForgottenLeave,
    /// A plan is made and not sent.
    PlanNotSent,
    /// A token does not reach its client.
    TokenDropped,
    /// A token reaches its client twice.
    TokenRepeated,
    /// A token reaches its client changed.
    TokenChanged,
    /// A stream ends twice.
    EndRepeated,
    /// A stream never ends.
    EndDropped,
}

impl Sabotage {
    /// All of them.
    pub const ALL: [Self; 15] = [
        Self::DuplicateApply,
        Self::LostCancel,
        Self::LeakedBlock,
        Self::BlockGrantedTwice,
        Self::StaleAnswerAccepted,
        Self::BudgetExceeded,
        Self::TargetIgnored,
        Self::DeadlineBroughtForward,
        Self::ForgottenLeave,
        Self::PlanNotSent,
        Self::TokenDropped,
        Self::TokenRepeated,
        Self::TokenChanged,
        Self::EndRepeated,
        Self::EndDropped,
    ];

    /// As the command line calls it.
    pub fn name(self) -> &'static str {
        match self {
            Self::DuplicateApply => "duplicate-apply",
            Self::LostCancel => "lost-cancel",
            Self::LeakedBlock => "leaked-block",
            Self::BlockGrantedTwice => "block-granted-twice",
            Self::StaleAnswerAccepted => "stale-answer-accepted",
            Self::BudgetExceeded => "budget-exceeded",
            Self::TargetIgnored => "target-ignored",
            Self::DeadlineBroughtForward => "deadline-brought-forward",
            Self::ForgottenLeave => "forgotten-leave",
            Self::PlanNotSent => "plan-not-sent",
            Self::TokenDropped => "token-dropped",
            Self::TokenRepeated => "token-repeated",
            Self::TokenChanged => "token-changed",
            Self::EndRepeated => "end-repeated",
            Self::EndDropped => "end-dropped",
        }
    }
}

impl FromStr for Sabotage {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let mut all = Self::ALL.into_iter();
        all.find(|sabotage| sabotage.name() == name).ok_or_else(|| {
            let names: Vec<_> = Self::ALL.iter().map(|sabotage| sabotage.name()).collect();
            format!(
                "`sabotage` is {name:?}. The simulator can break only what it knows. Use one of {}",
                names.join(", ")
            )
        })
    }
}

/// The real scheduler, and what is broken about it.
#[derive(Debug)]
pub(crate) struct Core {
    scheduler: Scheduler,
    sabotage: Option<Sabotage>,
    /// Tampering is done a few times only: a defect that always shows is too easy to see.
    num_left: u32,
    last_plans: BTreeMap<(InstanceId, LaneId), StepKey>,
    granted: Option<(InstanceId, BlockId)>,
}

impl Core {
    pub(crate) fn new(mut config: SchedulerConfig, sabotage: Option<Sabotage>) -> Self {
        if sabotage == Some(Sabotage::BudgetExceeded) {
            config.max_tokens_per_micro_batch += 1;
        }
        if sabotage == Some(Sabotage::TargetIgnored) {
            config.target_tpot_ms = u32::MAX;
        }
        Self {
            scheduler: Scheduler::new(config),
            sabotage,
            num_left: 3,
            last_plans: BTreeMap::new(),
            granted: None,
        }
    }

    pub(crate) fn handle(&mut self, now: TimeNs, mut event: Event) {
        match (&mut event, self.sabotage) {
            (Event::Cancel(_), Some(Sabotage::LostCancel)) if self.take_one() => return,
            (Event::Submit(request), Some(Sabotage::DeadlineBroughtForward)) => {
                let brought = |TimeNs(ns): TimeNs| TimeNs(now.0 + ns.saturating_sub(now.0) / 2);
                request.deadline = request.deadline.map(brought);
            }
            (Event::StepDone(output), Some(Sabotage::StaleAnswerAccepted)) => {
                let lane = (output.key.instance, output.key.lane);
                output.key = self.last_plans.get(&lane).copied().unwrap_or(output.key);
            }
            _ => {}
        }
        self.scheduler.handle(now, event);
    }

    pub(crate) fn plan(&mut self, now: TimeNs) -> Vec<StepPlan> {
        let mut plans = self.scheduler.plan(now);
        for plan in &plans {
            let lane = (plan.key.instance, plan.key.lane);
            self.last_plans.insert(lane, plan.key);
        }
        match self.sabotage {
            Some(Sabotage::PlanNotSent) => {
                let is_one = plans.len() > 1 && self.take_one();
                plans.truncate(plans.len() - usize::from(is_one));
            }
            Some(Sabotage::ForgottenLeave) => {
                for plan in plans.iter_mut().filter(|plan| !plan.chunks.is_empty()) {
                    if !plan.left.is_empty() && self.take_one() {
                        plan.left.pop();
                    }
                }
            }
            Some(Sabotage::BlockGrantedTwice) => {
                for plan in &mut plans {
                    self.grant_twice(plan);
                }
            }
            _ => {}
        }
        plans
    }

    pub(crate) fn take_events(&mut self) -> Vec<(RequestId, RequestEvent)> {
        let events = self.scheduler.take_events();
        if self.sabotage.is_none() {
            return events;
        }
        let tampered = events.into_iter().flat_map(|event| self.tamper(event));
        tampered.collect()
    }

    pub(crate) fn next_timer(&self) -> Option<TimeNs> {
        self.scheduler.next_timer()
    }

    pub(crate) fn stats(&self) -> SchedulerStats {
        let mut stats = self.scheduler.stats();
        if self.sabotage == Some(Sabotage::LeakedBlock) {
            // The books agree with each other and not with the pool.
            for (_, free, _) in &mut stats.kv_blocks {
                *free = free.saturating_sub(1);
            }
        }
        stats
    }

    pub(crate) fn audit(&self) -> Result<(), String> {
        self.scheduler.audit()
    }

    fn take_one(&mut self) -> bool {
        let may = self.num_left > 0;
        self.num_left -= u32::from(may);
        may
    }

    fn grant_twice(&mut self, plan: &mut StepPlan) {
        let instance = plan.key.instance;
        for chunk in &mut plan.chunks {
            let is_fresh = chunk.num_computed_tokens == 0;
            let Some(block) = chunk.new_blocks.last_mut().filter(|_| is_fresh) else {
                continue;
            };
            match self.granted.replace((instance, *block)) {
                Some((other, granted)) if other == instance && self.num_left > 0 => {
                    self.num_left -= 1;
                    *block = granted;
                }
                _ => {}
            }
        }
    }

    fn tamper(&mut self, (id, event): (RequestId, RequestEvent)) -> Vec<(RequestId, RequestEvent)> {
        let is_target = match self.sabotage {
            Some(Sabotage::TokenDropped | Sabotage::TokenRepeated | Sabotage::TokenChanged) => {
                matches!(event, RequestEvent::Token { .. })
            }
            Some(Sabotage::EndRepeated | Sabotage::EndDropped) => {
                matches!(
                    event,
                    RequestEvent::Finished { .. } | RequestEvent::Failed(_)
                )
            }
            _ => false,
        };
        if !is_target || !self.take_one() {
            return vec![(id, event)];
        }
        match (self.sabotage, event) {
            (Some(Sabotage::TokenDropped | Sabotage::EndDropped), _) => Vec::new(),
            (
                Some(Sabotage::TokenChanged),
                RequestEvent::Token {
                    index,
                    position,
                    token,
                    logprob,
                },
            ) => {
                let changed = RequestEvent::Token {
                    index,
                    position,
                    token: TokenId(token.0 ^ 1),
                    logprob,
                };
                vec![(id, changed)]
            }
            (_, event) => vec![(id, event.clone()), (id, event)],
        }
    }
}
