//! Owns the machines of the attention instances and the way to them: steps take time, messages
//! take time, and either can be lost.
//!
//! It never knows what the scheduler thinks.

use std::collections::{BTreeMap, VecDeque};

use step3rt_core::ids::{Epoch, InstanceId, LaneId};
use step3rt_core::step::{StepKey, StepPlan};

use crate::clients::owner_of;
use crate::fault::Fault;
use crate::instance::{Answer, SimInstance};
use crate::pace::NOISE_PER_MILLE;
use crate::sabotage::Sabotage;
use crate::violation::Violation;
use crate::world::{Happening, World};

/// One machine, up or down.
#[derive(Debug)]
pub(crate) struct Node {
    /// Of the incarnation that runs, or ran last.
    pub(crate) epoch: Epoch,
    pub(crate) machine: Option<SimInstance>,
    pool_blocks: u32,
    /// Plans that have arrived, per lane; the first one runs.
    lanes: BTreeMap<LaneId, VecDeque<StepPlan>>,
    pub(crate) slow_until_ns: u64,
    /// Messages of one direction arrive in their order.
    last_plan_at_ns: u64,
    last_answer_at_ns: u64,
}

impl Node {
    pub(crate) fn down(pool_blocks: u32) -> Self {
        Self {
            epoch: Epoch(0),
            machine: None,
            pool_blocks,
            lanes: BTreeMap::new(),
            slow_until_ns: 0,
            last_plan_at_ns: 0,
            last_answer_at_ns: 0,
        }
    }
}

impl World {
    pub(crate) fn node_starts(&mut self, id: InstanceId) {
        let config = self.profile.config.clone();
        let applies_twice = self.sabotage == Some(Sabotage::DuplicateApply);
        let node = self.nodes.get_mut(&id).expect("nodes are never removed");
        if node.machine.is_some() {
            return;
        }
        let mut machine = SimInstance::new(config, node.pool_blocks);
        machine.applies_twice = applies_twice;
        node.machine = Some(machine);
        node.epoch = Epoch(node.epoch.0 + 1);
        let (epoch, pool) = (node.epoch, node.pool_blocks);
        self.note(|_| format!("instance {id} starts, epoch {epoch}, {pool} blocks"));
        let delay_us = self.latency_us();
        self.after_us(delay_us, Happening::Registers(id, epoch, pool));
        if self.strikes(Fault::StaleRegistration) {
            let again_us = delay_us + self.rng.within(0, 50_000);
            self.after_us(again_us, Happening::Registers(id, epoch, pool));
        }
    }

    /// Ends an incarnation, with all that it holds, and lets it start again later.
    pub(crate) fn stop_node(&mut self, id: InstanceId, down_us: u32) -> Result<(), Violation> {
        let node = self.nodes.get_mut(&id).expect("nodes are never removed");
        let Some(mut machine) = node.machine.take() else {
            return Ok(());
        };
        let epoch = node.epoch;
        let lanes = std::mem::take(&mut node.lanes);
        self.num_disruptions += 1;
        // Its last words may come when it is dead, or back as another incarnation.
        for mut plans in lanes.into_values() {
            let Some(plan) = plans.pop_front() else {
                continue;
            };
            if self.strikes(Fault::StaleAnswer) {
                let answer = machine.run(&plan)?;
                let delay_us = self.rng.within(0, 2 * down_us + self.profile.lease_us);
                let arrives = Happening::AnswerArrives(plan.key, Box::new(answer));
                self.after_us(delay_us, arrives);
            }
        }
        let lease_us = self.profile.lease_us;
        self.after_us(lease_us, Happening::LossNoticed(id, epoch));
        self.after_us(down_us, Happening::NodeStarts(id));
        Ok(())
    }

    /// Sends a plan on its way. If it is lost, so is the session, and all that comes after it.
    pub(crate) fn send_plan(&mut self, plan: StepPlan) -> Result<(), Violation> {
        let key = plan.key;
        let timeout_us = self.profile.step_timeout_us;
        self.after_us(timeout_us, Happening::StepTimeout(key));
        if self.strikes(Fault::LostPlan) {
            self.counts.note(Fault::LostPlan);
            self.note(|_| format!("the plan of {} is lost, and the session", name(key)));
            let down_us = self.rng.within(1_000, 50_000);
            return self.stop_node(key.instance, down_us);
        }
        let arrives_ns = self.arrival_ns();
        let node = self.nodes.get_mut(&key.instance);
        let node = node.expect("the ledger knows it");
        node.last_plan_at_ns = node.last_plan_at_ns.max(arrives_ns);
        let at_ns = node.last_plan_at_ns;
        self.at_ns(at_ns, Happening::PlanArrives(Box::new(plan)));
        Ok(())
    }

    pub(crate) fn plan_arrives(&mut self, plan: StepPlan) {
        let key = plan.key;
        let node = self.nodes.get_mut(&key.instance);
        let node = node.expect("nodes are never removed");
        if node.machine.is_none() || node.epoch != key.epoch {
            self.note(|_| format!("the plan of {} finds nobody", name(key)));
            return;
        }
        let lane = node.lanes.entry(key.lane).or_default();
        lane.push_back(plan);
        if lane.len() == 1 {
            self.start_step(key);
        }
    }

    fn start_step(&mut self, key: StepKey) {
        let node = &self.nodes[&key.instance];
        let is_slow = node.slow_until_ns > self.now_ns;
        let plan = node.lanes[&key.lane].front().expect("it starts");
        let step_ns = self.profile.pace.step_ns(plan) * if is_slow { 20 } else { 1 };
        let per_mille = self
            .rng
            .within(1_000 - NOISE_PER_MILLE, 1_000 + NOISE_PER_MILLE);
        let ends_ns = self.now_ns + step_ns * u64::from(per_mille) / 1_000;
        let ends = Happening::StepEnds(key.instance, key.epoch, key.lane);
        self.at_ns(ends_ns, ends);
    }

    pub(crate) fn step_ends(
        &mut self,
        id: InstanceId,
        epoch: Epoch,
        lane: LaneId,
    ) -> Result<(), Violation> {
        let has_experts = self.has_experts;
        let fails = self.strikes(Fault::FailedStep);
        let node = self.nodes.get_mut(&id).expect("nodes are never removed");
        if node.epoch != epoch {
            return Ok(());
        }
        let Some(machine) = &mut node.machine else {
            return Ok(());
        };
        let plans = node.lanes.get_mut(&lane).expect("a step of it ran");
        let plan = plans.pop_front().expect("a step of it ran");
        let next = plans.front().map(|plan| plan.key);
        let mut answer = if !has_experts {
            machine.fail(&plan, "an expert is missing")?
        } else if fails {
            self.counts.note(Fault::FailedStep);
            machine.fail(&plan, "a peer went away")?
        } else {
            machine.run(&plan)?
        };
        self.spoil(&plan, &mut answer);
        self.num_disruptions += u64::from(matches!(answer, Answer::Failed(_)));
        self.send_answer(plan.key, answer);
        if let Some(key) = next {
            self.start_step(key);
        }
        Ok(())
    }

    /// Makes an answer useless for one of its sequences, whose requests may then fail.
    fn spoil(&mut self, plan: &StepPlan, answer: &mut Answer) {
        let tears = self.strikes(Fault::TornAnswer);
        let corrupts = self.strikes(Fault::CorruptLogits);
        let Answer::Done(output) = answer else { return };
        let fault = match output.outputs.last_mut() {
            Some(last) if corrupts => {
                last.is_corrupt = true;
                Fault::CorruptLogits
            }
            Some(_) if tears => {
                output.outputs.pop();
                Fault::TornAnswer
            }
            _ => return,
        };
        let chunk = plan.chunks.last().expect("it had an output");
        let machine = self.nodes[&plan.key.instance].machine.as_ref();
        let machine = machine.expect("it has just answered");
        let (id, _) = owner_of(machine.seed(chunk.sequence));
        let stream = self.clients.streams.get_mut(&id);
        stream.expect("it runs").is_tainted = true;
        self.counts.note(fault);
        self.note(|_| format!("{} for request {id} on {}", fault.name(), name(plan.key)));
    }

    fn send_answer(&mut self, key: StepKey, answer: Answer) {
        if self.strikes(Fault::LostAnswer) {
            self.counts.note(Fault::LostAnswer);
            self.note(|_| format!("the answer to {} is lost", name(key)));
            return;
        }
        let mut arrives_ns = self.arrival_ns();
        if self.strikes(Fault::DuplicatedAnswer) {
            let delay_us = self.rng.within(0, 20_000);
            let at_ns = arrives_ns + u64::from(delay_us) * 1_000;
            let again = Happening::AnswerArrives(key, Box::new(answer.clone()));
            self.at_ns(at_ns, again);
        }
        if self.strikes(Fault::ReorderedAnswer) {
            arrives_ns += u64::from(self.rng.within(1_000, 10_000)) * 1_000;
        } else {
            let node = self.nodes.get_mut(&key.instance);
            let node = node.expect("nodes are never removed");
            node.last_answer_at_ns = node.last_answer_at_ns.max(arrives_ns);
            arrives_ns = node.last_answer_at_ns;
        }
        self.at_ns(arrives_ns, Happening::AnswerArrives(key, Box::new(answer)));
    }

    fn arrival_ns(&mut self) -> u64 {
        let mut delay_us = self.latency_us();
        if self.strikes(Fault::DelayedMessage) {
            self.counts.note(Fault::DelayedMessage);
            delay_us += self.rng.within(1_000, 100_000);
        }
        self.now_ns + u64::from(delay_us) * 1_000
    }

    fn latency_us(&mut self) -> u32 {
        self.rng.within(20, 400)
    }
}

/// A step in words.
pub(crate) fn name(key: StepKey) -> String {
    let StepKey {
        instance,
        epoch,
        lane,
        step,
    } = key;
    format!("step {step} of lane {lane} of instance {instance}.{epoch}")
}
