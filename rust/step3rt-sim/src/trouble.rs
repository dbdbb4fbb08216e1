//! Owns the faults that come by themselves: machines, experts, the clock, the operator.
//!
//! It never breaks a message or a step; the ways that those take do.

use step3rt_core::ids::InstanceId;
use step3rt_core::scheduler::Event;

use crate::fault::Fault;
use crate::violation::Violation;
use crate::world::{Happening, World};

/// How often the fault clock ticks.
const TICK_US: u32 = 4_000;

impl World {
    /// One tick of the fault clock.
    pub(crate) fn trouble(&mut self) -> Result<(), Violation> {
        if self.is_calm {
            return Ok(());
        }
        self.after_us(TICK_US, Happening::Trouble);
        if self.strikes(Fault::Crash) {
            let down_us = self.rng.within(1_000, 200_000);
            self.crash(down_us)?;
        }
        if self.strikes(Fault::UnnoticedRestart) {
            let down_us = self.rng.within(0, self.profile.lease_us / 2);
            self.crash(down_us)?;
        }
        if self.strikes(Fault::SlowNode) {
            let (id, for_us) = (self.any_node(), self.rng.within(1_000, 60_000));
            self.counts.note(Fault::SlowNode);
            self.note(|_| format!("instance {id} is slow for {for_us} us"));
            let until_ns = self.now_ns + u64::from(for_us) * 1_000;
            let node = self.nodes.get_mut(&id).expect("any_node names one");
            node.slow_until_ns = until_ns;
        }
        if self.strikes(Fault::LostExperts) && self.has_experts {
            self.lose_experts();
        }
        if self.strikes(Fault::ClockJump) {
            let by_ms = self.rng.within(1, 400);
            self.set_clock(i64::from(by_ms), Fault::ClockJump)?;
        }
        if self.strikes(Fault::ClockStall) {
            let by_ms = self.rng.within(1, 50);
            self.set_clock(-i64::from(by_ms), Fault::ClockStall)?;
        }
        if self.strikes(Fault::Drain) && !self.is_drained {
            self.is_drained = true;
            self.counts.note(Fault::Drain);
            self.note(|_| "operator: drains".to_owned());
            self.tell(Event::Drain)?;
        }
        Ok(())
    }

    fn any_node(&mut self) -> InstanceId {
        let ids: Vec<InstanceId> = self.nodes.keys().copied().collect();
        self.rng.pick(&ids)
    }

    fn crash(&mut self, down_us: u32) -> Result<(), Violation> {
        let id = self.any_node();
        if self.nodes[&id].machine.is_none() {
            return Ok(());
        }
        self.counts.note(Fault::Crash);
        self.note(|_| format!("instance {id} dies for {down_us} us"));
        self.stop_node(id, down_us)
    }

    fn lose_experts(&mut self) {
        self.counts.note(Fault::LostExperts);
        self.note(|_| "an FFN instance dies".to_owned());
        self.has_experts = false;
        self.num_disruptions += 1;
        let (noticed_us, back_us) = (self.rng.within(100, 10_000), self.rng.within(1_000, 90_000));
        self.after_us(noticed_us, Happening::ExpertsNoticed(false));
        self.after_us(noticed_us + back_us, Happening::ExpertsBack);
    }

    pub(crate) fn experts_back(&mut self) {
        self.note(|_| "the FFN instance is back".to_owned());
        self.has_experts = true;
        let delay_us = self.rng.within(100, 2_000);
        self.after_us(delay_us, Happening::ExpertsNoticed(true));
    }

    /// Time that jumps makes timers due at once; time that stands still makes them late.
    fn set_clock(&mut self, by_ms: i64, fault: Fault) -> Result<(), Violation> {
        self.counts.note(fault);
        self.note(|_| format!("the clock is set by {by_ms} ms"));
        self.clock.set(by_ms * 1_000_000);
        self.plan().map(drop)
    }

    /// From now on nothing goes wrong any more; what is down comes back by itself.
    pub(crate) fn calm_down(&mut self) {
        self.note(|_| "the faults stop".to_owned());
        self.is_calm = true;
        for node in self.nodes.values_mut() {
            node.slow_until_ns = 0;
        }
    }
}
