//! Owns what the coordinator's drive loop does: it tells the scheduler what happened, carries out
//! what it decides, and checks both after every event.
//!
//! It never decides anything itself, except that an instance is lost.

use std::collections::BTreeSet;

use step3rt_core::error::{ErrorKind, RequestError};
use step3rt_core::ids::{Epoch, InstanceId, RequestId, TenantId, TimeNs, TokenId};
use step3rt_core::request::MAX_CONTINUATIONS;
use step3rt_core::scheduler::Event;
use step3rt_core::step::{StepKey, StepPlan};

use crate::fault::Fault;
use crate::instance::Answer;
use crate::node::name;
use crate::violation::{Violation, ensure};
use crate::world::{Happening, World};

impl World {
    pub(crate) fn registers(
        &mut self,
        instance: InstanceId,
        epoch: Epoch,
        num_kv_blocks: u32,
    ) -> Result<(), Violation> {
        self.note(|_| format!("coordinator: instance {instance}.{epoch} is ready"));
        let ready = Event::AttentionReady {
            instance,
            epoch,
            num_kv_blocks,
        };
        if self.ledger.is_stale(instance, epoch) {
            self.counts.note(Fault::StaleRegistration);
            return self.tell_nothing(ready, "a stale registration");
        }
        if self.ledger.epoch(instance).is_some() {
            self.counts.note(Fault::UnnoticedRestart);
        }
        let time = self.time();
        self.core.handle(time, ready);
        self.ledger.ready(instance, epoch, num_kv_blocks);
        self.check(time)?;
        self.plan_soon()
    }

    /// The lease of an incarnation has run out; nothing happens if another has taken its place.
    pub(crate) fn loss_noticed(&mut self, id: InstanceId, epoch: Epoch) -> Result<(), Violation> {
        if self.ledger.epoch(id) != Some(epoch) {
            return Ok(());
        }
        self.note(|_| format!("coordinator: instance {id}.{epoch} is lost"));
        let time = self.time();
        self.core.handle(time, Event::AttentionLost(id));
        self.ledger.lost(id);
        self.check(time)?;
        self.plan_soon()
    }

    pub(crate) fn experts_noticed(&mut self, are_here: bool) -> Result<(), Violation> {
        self.note(|_| format!("coordinator: all experts = {are_here}"));
        self.has_noticed_experts = are_here;
        self.tell(Event::ExpertsComplete(are_here))?;
        self.plan_soon()
    }

    /// A step was not answered in time: its session is closed, and its node starts again.
    pub(crate) fn step_timeout(&mut self, key: StepKey) -> Result<(), Violation> {
        if !self.ledger.is_unanswered(key) {
            return Ok(());
        }
        self.note(|_| format!("coordinator: {} is not answered in time", name(key)));
        self.num_disruptions += 1;
        if self.nodes[&key.instance].epoch == key.epoch {
            let down_us = self.rng.within(1_000, 20_000);
            self.stop_node(key.instance, down_us)?;
        }
        self.loss_noticed(key.instance, key.epoch)
    }

    pub(crate) fn answer_arrives(&mut self, key: StepKey, answer: Answer) -> Result<(), Violation> {
        let has_failed = matches!(answer, Answer::Failed(_));
        let is_awaited = self.ledger.is_awaited(key);
        self.note(|_| match &answer {
            Answer::Done(_) => format!("coordinator: {} is done", name(key)),
            Answer::Failed(reason) => format!("coordinator: {} failed: {reason}", name(key)),
        });
        let event = match answer {
            Answer::Done(output) => Event::StepDone(output),
            Answer::Failed(reason) => Event::StepFailed { key, reason },
        };
        if !is_awaited {
            return self.tell_stale(key, event);
        }
        let time = self.time();
        self.core.handle(time, event);
        let num_prefill_tokens = self.ledger.answered(key, has_failed);
        if !has_failed {
            self.judge.answered(key, num_prefill_tokens > 0);
        }
        self.check(time)?;
        self.plan_soon()
    }

    /// An answer that nobody waits for has no effect at all.
    fn tell_stale(&mut self, key: StepKey, event: Event) -> Result<(), Violation> {
        self.counts.note(if self.ledger.is_unanswered(key) {
            Fault::ReorderedAnswer
        } else if self.ledger.epoch(key.instance) == Some(key.epoch) {
            Fault::DuplicatedAnswer
        } else {
            Fault::StaleAnswer
        });
        self.tell_nothing(event, &format!("the stale answer to {}", name(key)))
    }

    /// Tells the scheduler what must have no effect.
    pub(crate) fn tell_nothing(&mut self, event: Event, what: &str) -> Result<(), Violation> {
        let before = self.core.stats();
        let time = self.time();
        self.core.handle(time, event);
        let events = self.core.take_events();
        ensure!(
            events.is_empty() && self.core.stats() == before,
            "{what} had an effect: {events:?}"
        );
        self.check(time)
    }

    pub(crate) fn tell(&mut self, event: Event) -> Result<(), Violation> {
        let time = self.time();
        self.core.handle(time, event);
        self.check(time)
    }

    /// Plans now or a moment later, as a drive loop does that has more to read first.
    pub(crate) fn plan_soon(&mut self) -> Result<(), Violation> {
        if self.plan_is_due {
            return Ok(());
        }
        if self.rng.chance(self.profile.plans_at_once_per_mille) {
            return self.plan().map(drop);
        }
        self.plan_is_due = true;
        let delay_us = self.rng.within(1, 2_000);
        self.after_us(delay_us, Happening::Plan);
        Ok(())
    }

    /// Returns how many steps were planned.
    pub(crate) fn plan(&mut self) -> Result<usize, Violation> {
        let time = self.time();
        let plans = self.core.plan(time);
        for plan in &plans {
            self.note(|_| describe(plan));
            ensure!(
                self.has_noticed_experts,
                "{} is planned without all experts",
                name(plan.key)
            );
            self.ledger.planned(plan)?;
            // From a clock that stands still nobody learns how long steps take.
            if self.counts.of(Fault::ClockStall) == 0 {
                let (config, pace) = (&self.profile.config, self.profile.pace);
                self.judge.planned(config, pace, plan)?;
            }
        }
        self.check(time)?;
        let num_plans = plans.len();
        for plan in plans {
            self.send_plan(plan)?;
        }
        self.set_timer(time)?;
        Ok(num_plans)
    }

    fn set_timer(&mut self, time: TimeNs) -> Result<(), Violation> {
        let Some(timer) = self.core.next_timer() else {
            return Ok(());
        };
        ensure!(
            timer > time,
            "a timer at {} ns is still there after planning at {} ns",
            timer.0,
            time.0
        );
        let at_ns = self.clock.when_ns(timer).max(self.now_ns);
        if self.timer_at_ns.is_none_or(|earlier| at_ns < earlier) {
            self.timer_at_ns = Some(at_ns);
            self.at_ns(at_ns, Happening::Timer);
        }
        Ok(())
    }

    /// Every promise that can be checked now.
    fn check(&mut self, time: TimeNs) -> Result<(), Violation> {
        self.core.audit().map_err(Violation)?;
        self.ledger.check_stats(&self.core.stats())?;
        let events = self.core.take_events();
        for (id, event) in &events {
            self.note(|_| format!("client {id}: {event:?}"));
        }
        for (id, error) in self.clients.take(events)? {
            let is_justified = self.is_justified(time, id, &error);
            ensure!(is_justified, "request {id} fails without cause: {error:?}");
            if error.kind == ErrorKind::DeadlineExceeded {
                self.counts.note(Fault::Deadline);
                let deadline = self.clients.streams[&id].request.deadline;
                self.num_told_early += u64::from(deadline.is_some_and(|d| d > time));
            }
            self.perhaps_ask_again(id, error.kind);
        }
        Ok(())
    }

    /// When a waiting request could end at the earliest: all that others have in common with it is
    /// cached, and whoever runs is gone by now.
    fn least_end(&self, time: TimeNs, id: RequestId) -> TimeNs {
        let (config, pace) = (&self.profile.config, self.profile.pace);
        let max_tokens = u64::from(config.max_tokens_per_micro_batch);
        let block_size_tokens = config.block_size_tokens as usize;
        let is_held = |beginning: &[TokenId]| {
            self.nodes.iter().any(|(&instance, node)| {
                let machine = node.machine.as_ref();
                let machine = machine.filter(|_| self.ledger.epoch(instance) == Some(node.epoch));
                let blocks = machine.map_or(Vec::new(), |m| m.blocks_with(beginning));
                // Whoever holds a block is alive, or is about to overwrite it.
                let mut idle = blocks.into_iter();
                idle.any(|block| !self.ledger.is_held(instance, block))
            })
        };
        let needs = self.clients.least_needs(id, block_size_tokens, is_held);
        let own_ns = needs
            .into_iter()
            .map(|(num_prompt_tokens, num_new_tokens)| {
                let num_steps = num_prompt_tokens.div_ceil(max_tokens);
                pace.least_ns(num_prompt_tokens, num_steps, num_new_tokens - 1)
            });
        let per_instance = u64::from(config.num_lanes) * u64::from(config.max_sequences_per_lane);
        let places = self
            .ledger
            .pools()
            .map(|pool| per_instance.min(pool.into()));
        let num_waiting = self.core.stats().num_waiting as u64 + 1;
        let num_rounds = num_waiting / places.sum::<u64>().max(1);
        let ns = own_ns.max().unwrap_or(0) + num_rounds * pace.least_ns(0, 1, 0);
        TimeNs(time.0 + ns)
    }

    /// Whether a full queue may refuse this request: one that has come before, if it has not begun
    /// and gave its place to another tenant; a newcomer, if its tenant may have its share, or if
    /// no other may have more than that of requests that have not begun.
    fn is_fair_refusal(&self, id: RequestId, num_waiting: usize) -> bool {
        let max = self.profile.config.max_waiting_requests as usize;
        let stream = &self.clients.streams[&id];
        let is_newcomer = id.0 + 1 == u64::from(self.num_submitted);
        if !is_newcomer {
            return !stream.is_started;
        }
        let tenant = stream.request.tenant;
        let live = self.clients.streams.values().filter(|s| !s.has_ended());
        let of_others = live.clone().filter(|s| s.request.tenant != tenant);
        let others: BTreeSet<TenantId> = of_others.map(|s| s.request.tenant).collect();
        let num_own = live.clone().filter(|s| s.request.tenant == tenant).count();
        let share = |num_others: usize| (max / (num_others + 1)).max(1);
        if num_own >= share(others.len()) {
            return true;
        }
        let num_begun = live.filter(|s| s.is_started).count();
        let shares = (1..=others.len()).map(|num| share(num) * num);
        num_waiting.saturating_sub(num_begun + num_own) <= shares.max().unwrap_or(0)
    }

    /// Whether there is a reason for which a request may fail like this.
    fn is_justified(&self, time: TimeNs, id: RequestId, error: &RequestError) -> bool {
        let stream = &self.clients.streams[&id];
        let request = &stream.request;
        let config = &self.profile.config;
        match error.kind {
            ErrorKind::Cancelled => stream.is_cancelled,
            ErrorKind::DeadlineExceeded => request
                .deadline
                .is_some_and(|deadline| deadline <= time || self.least_end(time, id) > deadline),
            ErrorKind::Internal => stream.is_tainted,
            ErrorKind::Draining => self.is_drained,
            ErrorKind::NodeLost => self.num_disruptions > 0,
            ErrorKind::EngineNotReady => {
                self.ledger.num_instances() == 0 || !self.has_noticed_experts
            }
            ErrorKind::QueueFull => {
                let max = config.max_waiting_requests as usize;
                let num_waiting = self.core.stats().num_waiting;
                num_waiting >= max && self.is_fair_refusal(id, num_waiting)
            }
            ErrorKind::InvalidParameter => {
                let is_many = request.n > 1 && !request.resumed.is_empty();
                let has_any = (1..=MAX_CONTINUATIONS).contains(&request.n);
                request.prompt.is_empty() || request.max_tokens == 0 || !has_any || is_many
            }
            ErrorKind::PromptTooLong => {
                let max_len = config.max_model_len as usize;
                let prompt = request.prompt.len();
                let most = (prompt + request.max_tokens as usize).min(max_len) - 1;
                let needed = most.div_ceil(config.block_size_tokens as usize);
                prompt >= max_len
                    || prompt + request.resumed.len() > max_len
                    || needed > self.ledger.largest_pool_blocks() as usize
            }
            ErrorKind::UnsupportedFeature
            | ErrorKind::ModelNotFound
            | ErrorKind::DuplicateRequestId
            | ErrorKind::SlowConsumer => false,
        }
    }
}

/// A plan in words: `5+3@12` is three tokens of sequence 5 from position 12 on.
fn describe(plan: &StepPlan) -> String {
    let chunks = plan.chunks.iter().map(|chunk| {
        let blocks: Vec<_> = chunk.new_blocks.iter().map(|block| block.0).collect();
        let grant = match blocks.as_slice() {
            [] => String::new(),
            blocks => format!(" blocks {blocks:?}"),
        };
        format!(
            "{}+{}@{}{}{grant}",
            chunk.sequence,
            chunk.num_new_tokens,
            chunk.num_computed_tokens,
            if chunk.samples { " samples" } else { "" },
        )
    });
    let chunks: Vec<String> = chunks.collect();
    let joined: Vec<u64> = plan.joined.iter().map(|join| join.sequence.0).collect();
    let left: Vec<u64> = plan.left.iter().map(|id| id.0).collect();
    format!(
        "coordinator: {}: left {left:?}, joined {joined:?}, {}",
        name(plan.key),
        chunks.join("; ")
    )
}
