//! Owns one seed's simulation: the time, what happens next, and everything that it happens to.
//!
//! It never does anything in parallel and never reads a clock: two runs of a seed are the same,
//! event by event.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, VecDeque};
use std::fmt::Write as _;

use step3rt_core::ids::{Epoch, InstanceId, LaneId, RequestId, TimeNs};
use step3rt_core::request::Request;
use step3rt_core::step::{StepKey, StepPlan};

use crate::clients::Clients;
use crate::fault::{Fault, FaultCounts};
use crate::instance::{Answer, SimInstance};
use crate::ledger::Ledger;
use crate::node::Node;
use crate::pace::Judge;
use crate::profile::Profile;
use crate::rng::Rng;
use crate::sabotage::{Core, Sabotage};
use crate::violation::{Violation, ensure};

/// Everything ends this long after the faults have stopped, or never: thousands of times what the
/// largest load takes.
const MAX_CALM_NS: u64 = 300_000_000_000;
/// The same in events, for a world that turns without time going on.
const MAX_EVENTS: u64 = 400_000;

/// Something that happens at a time.
#[derive(Clone, Debug)]
pub(crate) enum Happening {
    /// The next client asks.
    Submit,
    Cancel(RequestId),
    Stop(RequestId, u32),
    /// At the coordinator: the drive loop comes round.
    Plan,
    Timer,
    PlanArrives(Box<StepPlan>),
    /// The oldest step of a lane ends on its instance.
    StepEnds(InstanceId, Epoch, LaneId),
    AnswerArrives(StepKey, Box<Answer>),
    StepTimeout(StepKey),
    /// A dead machine starts again.
    NodeStarts(InstanceId),
    Registers(InstanceId, Epoch, u32),
    LossNoticed(InstanceId, Epoch),
    ExpertsBack,
    ExpertsNoticed(bool),
    /// The fault clock ticks.
    Trouble,
    /// The faults stop.
    Calm,
}

/// See the module's documentation.
#[expect(
    clippy::struct_excessive_bools,
    reason = "each is a fact about the world, and all combinations of them occur"
)]
pub(crate) struct World {
    pub(crate) profile: Profile,
    pub(crate) sabotage: Option<Sabotage>,
    /// What traffic there is, whatever becomes of it.
    pub(crate) traffic: Rng,
    /// What goes wrong, and how long things take.
    pub(crate) rng: Rng,
    pub(crate) now_ns: u64,
    pub(crate) clock: Clock,
    queue: BinaryHeap<Reverse<Entry>>,
    num_entries: u64,
    pub(crate) core: Core,
    pub(crate) ledger: Ledger,
    pub(crate) judge: Judge,
    pub(crate) clients: Clients,
    pub(crate) nodes: BTreeMap<InstanceId, Node>,
    /// Whether the FFN instances hold every expert, and what the coordinator believes.
    pub(crate) has_experts: bool,
    pub(crate) has_noticed_experts: bool,
    pub(crate) is_calm: bool,
    pub(crate) is_drained: bool,
    /// Losses and failed steps, for which requests may fail.
    pub(crate) num_disruptions: u64,
    pub(crate) num_submitted: u32,
    /// Requests that were told before their deadline that they would end after it.
    pub(crate) num_told_early: u64,
    /// Failed requests that their clients make again.
    pub(crate) asked_again: VecDeque<Request>,
    pub(crate) plan_is_due: bool,
    pub(crate) timer_at_ns: Option<u64>,
    pub(crate) counts: FaultCounts,
    pub(crate) num_events: u64,
    trace: Option<String>,
}

/// What became of a seed.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// The first promise that was not kept, and when.
    pub violation: Option<Violation>,
    /// What went wrong on purpose.
    pub faults: FaultCounts,
    /// How continuations (`Finished`) and requests (an error's kind) ended;
    /// `DeadlineOutOfReach` are those of `DeadlineExceeded` that were told before their deadline.
    pub ends: BTreeMap<String, u64>,
    /// Steps with decodes and prompts, on instances whose steps are known; and those of them that
    /// the prompts pushed past the TPOT target.
    pub judged_steps: (u64, u64),
    /// How many things happened.
    pub num_events: u64,
    /// Every event in words, if it was asked for.
    pub trace: String,
}

impl World {
    pub(crate) fn new(seed: u64, sabotage: Option<Sabotage>, has_trace: bool) -> Self {
        let mut rng = Rng::new(seed);
        let profile = Profile::draw(&mut rng.fork());
        let config = profile.config.clone();
        let mut world = Self {
            core: Core::new(config.clone(), sabotage),
            clients: Clients::new(config.max_model_len),
            ledger: Ledger::new(config),
            judge: Judge::default(),
            profile,
            sabotage,
            traffic: rng.fork(),
            rng,
            now_ns: 0,
            clock: Clock::default(),
            queue: BinaryHeap::new(),
            num_entries: 0,
            nodes: BTreeMap::new(),
            has_experts: true,
            has_noticed_experts: false,
            is_calm: false,
            is_drained: false,
            num_disruptions: 0,
            num_submitted: 0,
            num_told_early: 0,
            asked_again: VecDeque::new(),
            plan_is_due: false,
            timer_at_ns: None,
            counts: FaultCounts::default(),
            num_events: 0,
            trace: has_trace.then(String::new),
        };
        world.note(|world| format!("{:?}", world.profile));
        world.begin();
        world
    }

    fn begin(&mut self) {
        for (id, &pool) in (0..).zip(&self.profile.pools) {
            self.nodes.insert(InstanceId(id), Node::down(pool));
        }
        for id in self.nodes.keys().copied().collect::<Vec<_>>() {
            let after_us = self.rng.within(0, 3_000);
            self.after_us(after_us, Happening::NodeStarts(id));
        }
        let after_us = self.rng.within(0, 3_000);
        self.after_us(after_us, Happening::ExpertsNoticed(true));
        self.after_us(1_000, Happening::Submit);
        self.after_us(5_000, Happening::Trouble);
        self.after_us(self.profile.calm_after_us, Happening::Calm);
    }

    /// Lets everything happen until all has ended or a promise is broken.
    pub(crate) fn run(mut self) -> Outcome {
        let violation = loop {
            match self.happen_next() {
                Ok(true) => {}
                Ok(false) => break None,
                Err(violation) => {
                    self.note(|_| format!("VIOLATION: {violation}"));
                    break Some(violation);
                }
            }
        };
        for _ in 0..self.ledger.num_preempted() {
            self.counts.note(Fault::KvExhaustion);
        }
        if self.num_told_early > 0 {
            let ends = &mut self.clients.ends;
            *ends.entry("DeadlineOutOfReach".to_owned()).or_default() += self.num_told_early;
        }
        Outcome {
            violation,
            faults: self.counts,
            ends: self.clients.ends,
            judged_steps: (self.judge.num_judged, self.judge.num_pushed),
            num_events: self.num_events,
            trace: self.trace.unwrap_or_default(),
        }
    }

    /// False when all is over.
    fn happen_next(&mut self) -> Result<bool, Violation> {
        let live = self.clients.first_live();
        let Some(Reverse(entry)) = self.queue.pop() else {
            return Err(Violation(format!(
                "nothing will ever happen again, and request {live:?} has not ended"
            )));
        };
        self.now_ns = entry.at_ns;
        self.num_events += 1;
        let calm_ns = u64::from(self.profile.calm_after_us) * 1_000;
        ensure!(
            self.now_ns < calm_ns + MAX_CALM_NS && self.num_events < MAX_EVENTS,
            "request {live:?} never ends: {} ms and {} events after the start",
            self.now_ns / 1_000_000,
            self.num_events
        );
        match entry.happening {
            Happening::Submit => self.submit_next()?,
            Happening::Cancel(id) => self.cancel(id)?,
            Happening::Stop(id, index) => self.stop(id, index)?,
            Happening::Plan => {
                self.plan_is_due = false;
                self.plan()?;
            }
            Happening::Timer => {
                self.timer_at_ns = None;
                self.plan()?;
            }
            Happening::PlanArrives(plan) => self.plan_arrives(*plan),
            Happening::StepEnds(id, epoch, lane) => self.step_ends(id, epoch, lane)?,
            Happening::AnswerArrives(key, answer) => self.answer_arrives(key, *answer)?,
            Happening::StepTimeout(key) => self.step_timeout(key)?,
            Happening::NodeStarts(id) => self.node_starts(id),
            Happening::Registers(id, epoch, pool) => self.registers(id, epoch, pool)?,
            Happening::LossNoticed(id, epoch) => self.loss_noticed(id, epoch)?,
            Happening::ExpertsBack => self.experts_back(),
            Happening::ExpertsNoticed(are_here) => self.experts_noticed(are_here)?,
            Happening::Trouble => self.trouble()?,
            Happening::Calm => self.calm_down(),
        }
        self.is_over()
    }

    /// Whether the faults have stopped, every request has ended and every step is answered. Then
    /// nothing may be left behind.
    fn is_over(&mut self) -> Result<bool, Violation> {
        let is_settled = self.is_calm
            && self.num_submitted == self.profile.num_requests
            && self.clients.num_live() == 0
            && self.has_noticed_experts
            && self.ledger.num_unanswered() == 0
            && self.nodes.iter().all(|(id, node)| {
                let epoch = self.ledger.epoch(*id);
                node.machine.is_some() && epoch == Some(node.epoch)
            });
        // A lane that pauses after failures still has sequences to let go.
        if !is_settled || self.plan()? > 0 || self.core.next_timer().is_some() {
            return Ok(true);
        }
        self.ledger.check_done(&self.core.stats())?;
        for (id, node) in &self.nodes {
            let num_known = node.machine.as_ref().map_or(0, SimInstance::num_known);
            ensure!(
                num_known == 0,
                "instance {id} still knows {num_known} sequences when all have ended"
            );
        }
        Ok(false)
    }

    pub(crate) fn after_us(&mut self, delay_us: u32, happening: Happening) {
        self.at_ns(self.now_ns + u64::from(delay_us) * 1_000, happening);
    }

    pub(crate) fn at_ns(&mut self, at_ns: u64, happening: Happening) {
        self.num_entries += 1;
        self.queue.push(Reverse(Entry {
            at_ns,
            number: self.num_entries,
            happening,
        }));
    }

    /// Whether `fault` takes this opportunity.
    pub(crate) fn strikes(&mut self, fault: Fault) -> bool {
        let rate = self.profile.rate(fault);
        let strikes = self.rng.chance(rate); // drawn always, so that calm changes nothing else
        strikes && !self.is_calm
    }

    /// What the coordinator's clock shows.
    pub(crate) fn time(&mut self) -> TimeNs {
        self.clock.read(self.now_ns)
    }

    /// Adds a line to the trace; the text is made only if there is one.
    pub(crate) fn note(&mut self, line: impl FnOnce(&Self) -> String) {
        let Some(mut trace) = self.trace.take() else {
            return;
        };
        let (ms, us) = (self.now_ns / 1_000_000, self.now_ns / 1_000 % 1_000);
        let line = line(self);
        writeln!(trace, "{ms:>6}.{us:03} ms  {line}").expect("a String takes everything");
        self.trace = Some(trace);
    }
}

/// The coordinator's clock, which can be set; the shell never lets the time run backwards.
#[derive(Debug, Default)]
pub(crate) struct Clock {
    skew_ns: i64,
    last: TimeNs,
}

impl Clock {
    fn read(&mut self, now_ns: u64) -> TimeNs {
        let shown = TimeNs(now_ns.saturating_add_signed(self.skew_ns));
        self.last = self.last.max(shown);
        self.last
    }

    /// What it has shown last, in milliseconds.
    pub(crate) fn last_ms(&self) -> u64 {
        self.last.0 / 1_000_000
    }

    pub(crate) fn set(&mut self, by_ns: i64) {
        self.skew_ns += by_ns;
    }

    /// When the clock shows `time`.
    pub(crate) fn when_ns(&self, time: TimeNs) -> u64 {
        time.0.saturating_add_signed(-self.skew_ns)
    }
}

/// Ordered by time, and at one time by the order in which it was decided.
struct Entry {
    at_ns: u64,
    number: u64,
    happening: Happening,
}

impl PartialEq for Entry {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Entry {}

impl PartialOrd for Entry {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Entry {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.at_ns, self.number).cmp(&(other.at_ns, other.number))
    }
}
