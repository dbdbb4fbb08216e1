//! The coordinator's end of every instance session: its command channel, the steps it was given,
//! and the plans that wait for its links.
//!
//! It never decides who may join or what is planned.

use std::collections::{BTreeMap, HashMap};

use step3rt_core::ids::{InstanceId, LaneId, StepId, TimeNs};
use step3rt_core::step::StepPlan;
use step3rt_proto::v1::session_response::Command;
use step3rt_proto::v1::{Drain, SessionResponse, Topology};
use tokio::sync::{mpsc, oneshot};
use tonic::Status;

/// Commands that may wait for an instance's socket. A lane has one step in flight, so this holds
/// a step for each of 8 lanes and a topology for each of 120 membership changes.
pub const COMMAND_BOUND: usize = 128;

/// What flows to an instance.
pub type CommandSender = mpsc::Sender<Result<SessionResponse, Status>>;

#[derive(Debug)]
struct Session {
    commands: CommandSender,
    /// Dropped with the session, which ends the task that reads from the instance.
    _reader_stop: oneshot::Sender<()>,
    held_plans: Vec<StepPlan>,
    steps_in_flight: HashMap<LaneId, (StepId, TimeNs)>,
}

/// All sessions.
#[derive(Debug)]
pub struct Sessions {
    sessions: BTreeMap<InstanceId, Session>,
    step_timeout_ms: u64,
}

/// The session's channel is full or gone: the instance does not take what it is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NotTaken(pub InstanceId);

impl Sessions {
    /// No sessions; a step may take `step_timeout_ms`.
    pub fn new(step_timeout_ms: u64) -> Self {
        Self {
            sessions: BTreeMap::new(),
            step_timeout_ms,
        }
    }

    /// Adds the session of `instance`. The receiver resolves when the session is over.
    pub fn open(&mut self, instance: InstanceId, commands: CommandSender) -> oneshot::Receiver<()> {
        let (reader_stop, stopped) = oneshot::channel();
        self.sessions.insert(
            instance,
            Session {
                commands,
                _reader_stop: reader_stop,
                held_plans: Vec::new(),
                steps_in_flight: HashMap::new(),
            },
        );
        stopped
    }

    /// Forgets the session of `instance`; with a status, the instance is told.
    pub fn close(&mut self, instance: InstanceId, status: Option<Status>) {
        if let (Some(session), Some(status)) = (self.sessions.remove(&instance), status) {
            // A full channel means that it does not listen anyway.
            let _ = session.commands.try_send(Err(status));
        }
    }

    /// Sends `command` to `instance`, if it has a session.
    pub fn send(&mut self, instance: InstanceId, command: Command) -> Result<(), NotTaken> {
        let Some(session) = self.sessions.get(&instance) else {
            return Ok(());
        };
        let response = SessionResponse {
            command: Some(command),
        };
        session
            .commands
            .try_send(Ok(response))
            .map_err(|_| NotTaken(instance))
    }

    /// Sends `topology` to everybody; returns who does not take it.
    pub fn announce(&mut self, topology: &Topology) -> Vec<NotTaken> {
        self.broadcast(|| Command::Topology(topology.clone()))
    }

    /// Tells everybody to finish; returns who does not take it.
    pub fn drain(&mut self) -> Vec<NotTaken> {
        self.broadcast(|| Command::Drain(Drain {}))
    }

    fn broadcast(&mut self, command: impl Fn() -> Command) -> Vec<NotTaken> {
        let instances: Vec<_> = self.sessions.keys().copied().collect();
        instances
            .into_iter()
            .filter_map(|instance| self.send(instance, command()).err())
            .collect()
    }

    /// Gives `plan` to its instance at once, or keeps it until [`Self::release`].
    pub fn dispatch(
        &mut self,
        now: TimeNs,
        plan: StepPlan,
        is_linked: bool,
    ) -> Result<(), NotTaken> {
        let Some(session) = self.sessions.get_mut(&plan.key.instance) else {
            return Ok(());
        };
        if !is_linked {
            session.held_plans.push(plan);
            return Ok(());
        }
        let deadline = now.plus_ms(self.step_timeout_ms);
        session
            .steps_in_flight
            .insert(plan.key.lane, (plan.key.step, deadline));
        self.send(plan.key.instance, Command::StepPlan(plan.into()))
    }

    /// Gives `instance` the plans that waited for its links.
    pub fn release(&mut self, now: TimeNs, instance: InstanceId) -> Result<(), NotTaken> {
        let Some(session) = self.sessions.get_mut(&instance) else {
            return Ok(());
        };
        for plan in std::mem::take(&mut session.held_plans) {
            self.dispatch(now, plan, true)?;
        }
        Ok(())
    }

    /// The instance answered a step.
    pub fn step_answered(&mut self, instance: InstanceId, lane: LaneId, step: StepId) {
        if let Some(session) = self.sessions.get_mut(&instance)
            && session
                .steps_in_flight
                .get(&lane)
                .is_some_and(|(in_flight, _)| *in_flight == step)
        {
            session.steps_in_flight.remove(&lane);
        }
    }

    /// Who has not answered a step in time.
    pub fn overdue(&self, now: TimeNs) -> Vec<InstanceId> {
        self.sessions
            .iter()
            .filter(|(_, session)| {
                session
                    .steps_in_flight
                    .values()
                    .any(|(_, deadline)| *deadline <= now)
            })
            .map(|(instance, _)| *instance)
            .collect()
    }

    /// When [`Self::overdue`] must be called even if nothing happens.
    pub fn next_timer(&self) -> Option<TimeNs> {
        self.sessions
            .values()
            .flat_map(|session| session.steps_in_flight.values())
            .map(|(_, deadline)| *deadline)
            .min()
    }

    /// Whether nobody is connected.
    pub fn is_empty(&self) -> bool {
        self.sessions.is_empty()
    }
}
