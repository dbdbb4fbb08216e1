//! The coordinator's end of every instance session: its command channel, the steps it was given,
//! and the plans that wait for its links.
//!
//! It never decides who may join or what is planned.

use std::collections::{BTreeMap, HashMap, VecDeque};

use step3rt_core::ids::{InstanceId, LaneId, TimeNs};
use step3rt_core::step::{StepKey, StepPlan};
use step3rt_proto::v1::session_response::Command;
use step3rt_proto::v1::{Drain, SessionResponse, Topology};
use tokio::sync::{mpsc, oneshot};
use tonic::Status;

/// Commands that may wait for an instance's socket: four steps for each of 8 lanes, the most that
/// can be in flight, and a topology for each of 96 membership changes.
pub const COMMAND_BOUND: usize = 128;

/// What flows to an instance.
pub type CommandSender = mpsc::Sender<Result<SessionResponse, Status>>;

#[derive(Debug)]
struct Session {
    commands: CommandSender,
    /// Dropped with the session, which ends the task that reads from the instance.
    _reader_stop: oneshot::Sender<()>,
    /// In order, for all lanes.
    held_plans: Vec<StepPlan>,
    steps_in_flight: HashMap<LaneId, StepsInFlight>,
}

/// The steps that a lane was given and has not answered; never none.
#[derive(Debug)]
struct StepsInFlight {
    /// Oldest first: that one runs, and the others wait for it.
    keys: VecDeque<StepKey>,
    /// Of the oldest, from when it could begin: a step that waits for another has not begun.
    deadline: TimeNs,
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

    /// Forgets the session of `instance`, and tells the instance `status` if there is one; false
    /// if there was no session.
    pub fn close(&mut self, instance: InstanceId, status: Option<Status>) -> bool {
        let Some(session) = self.sessions.remove(&instance) else {
            return false;
        };
        if let Some(status) = status {
            // A full channel means that it does not listen anyway.
            let _ = session.commands.try_send(Err(status));
        }
        true
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

    /// Gives `plan` to its instance at once, or keeps it until [`Self::release`], as it does when
    /// others wait already: the plans of a lane stay in their order.
    pub fn dispatch(
        &mut self,
        now: TimeNs,
        plan: StepPlan,
        is_linked: bool,
    ) -> Result<(), NotTaken> {
        let Some(session) = self.sessions.get_mut(&plan.key.instance) else {
            return Ok(());
        };
        if !is_linked || !session.held_plans.is_empty() {
            session.held_plans.push(plan);
            return Ok(());
        }
        self.give(now, plan)
    }

    fn give(&mut self, now: TimeNs, plan: StepPlan) -> Result<(), NotTaken> {
        let Some(session) = self.sessions.get_mut(&plan.key.instance) else {
            return Ok(());
        };
        let lane = session.steps_in_flight.entry(plan.key.lane);
        let lane = lane.or_insert_with(|| StepsInFlight {
            keys: VecDeque::new(),
            deadline: now.plus_ms(self.step_timeout_ms),
        });
        lane.keys.push_back(plan.key);
        self.send(plan.key.instance, Command::StepPlan(plan.into()))
    }

    /// Gives `instance` the plans that waited for its links.
    pub fn release(&mut self, now: TimeNs, instance: InstanceId) -> Result<(), NotTaken> {
        let Some(session) = self.sessions.get_mut(&instance) else {
            return Ok(());
        };
        for plan in std::mem::take(&mut session.held_plans) {
            self.give(now, plan)?;
        }
        Ok(())
    }

    /// The instance answered a step, and the next one of the lane may take its time from now on. An
    /// answer of another epoch, or out of turn, is none, as for the scheduler: the step stays due,
    /// or its lane would wait for ever.
    pub fn step_answered(&mut self, now: TimeNs, key: StepKey) {
        let Some(session) = self.sessions.get_mut(&key.instance) else {
            return;
        };
        let Some(lane) = session.steps_in_flight.get_mut(&key.lane) else {
            return;
        };
        if lane.keys.pop_front_if(|oldest| *oldest == key).is_none() {
            return;
        }
        lane.deadline = now.plus_ms(self.step_timeout_ms);
        if lane.keys.is_empty() {
            session.steps_in_flight.remove(&key.lane);
        }
    }

    /// Who has not answered a step in time.
    pub fn overdue(&self, now: TimeNs) -> Vec<InstanceId> {
        self.sessions
            .iter()
            .filter(|(_, session)| {
                let mut lanes = session.steps_in_flight.values();
                lanes.any(|lane| lane.deadline <= now)
            })
            .map(|(instance, _)| *instance)
            .collect()
    }

    /// When [`Self::overdue`] must be called even if nothing happens.
    pub fn next_timer(&self) -> Option<TimeNs> {
        self.sessions
            .values()
            .flat_map(|session| session.steps_in_flight.values())
            .map(|lane| lane.deadline)
            .min()
    }

    /// Whether nobody is connected.
    pub fn is_empty(&self) -> bool {
        self.sessions.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use step3rt_core::ids::{Epoch, SequenceId, StepId};

    use super::*;

    const INSTANCE: InstanceId = InstanceId(3);

    fn plan(lane: u8, step: u64) -> StepPlan {
        StepPlan {
            key: StepKey {
                instance: INSTANCE,
                epoch: Epoch(1),
                lane: LaneId(lane),
                step: StepId(step),
            },
            left: vec![SequenceId(1)],
            joined: vec![],
            chunks: vec![],
        }
    }

    fn opened(bound: usize) -> (Sessions, mpsc::Receiver<Result<SessionResponse, Status>>) {
        let mut sessions = Sessions::new(100);
        let (commands, receiver) = mpsc::channel(bound);
        drop(sessions.open(INSTANCE, commands));
        (sessions, receiver)
    }

    #[test]
    fn a_plan_waits_for_links_and_its_time_starts_when_it_is_sent() {
        let (mut sessions, mut receiver) = opened(8);
        sessions
            .dispatch(TimeNs(0), plan(0, 1), false)
            .expect("held");
        assert!(receiver.try_recv().is_err());
        assert_eq!(sessions.next_timer(), None);
        let later = TimeNs(0).plus_ms(1_000);
        sessions.release(later, INSTANCE).expect("sent");
        assert!(receiver.try_recv().is_ok());
        assert_eq!(sessions.next_timer(), Some(later.plus_ms(100)));
        sessions.release(later, INSTANCE).expect("nothing left");
        assert!(receiver.try_recv().is_err());
    }

    #[test]
    fn a_step_is_overdue_until_that_very_step_is_answered() {
        let (mut sessions, _receiver) = opened(8);
        sessions
            .dispatch(TimeNs(0), plan(1, 5), true)
            .expect("sent");
        let deadline = TimeNs(0).plus_ms(100);
        let asked = plan(1, 5).key;
        sessions.step_answered(TimeNs(1), plan(1, 4).key);
        sessions.step_answered(TimeNs(1), plan(0, 5).key);
        let epoch = Epoch(2);
        sessions.step_answered(TimeNs(1), StepKey { epoch, ..asked });
        assert_eq!(sessions.overdue(deadline), [INSTANCE]);
        assert!(sessions.overdue(TimeNs(deadline.0 - 1)).is_empty());
        sessions.step_answered(TimeNs(1), asked);
        assert!(sessions.overdue(deadline).is_empty());
        assert_eq!(sessions.next_timer(), None);
    }

    #[test]
    fn a_step_that_waits_for_another_has_its_time_from_that_ones_answer() {
        let (mut sessions, _receiver) = opened(8);
        for step in [5, 6] {
            let sent = sessions.dispatch(TimeNs(0), plan(1, step), true);
            sent.expect("sent");
        }
        let answered = TimeNs(0).plus_ms(90);
        sessions.step_answered(answered, plan(1, 6).key); // out of turn: no answer
        sessions.step_answered(answered, plan(1, 5).key);
        let deadline = answered.plus_ms(100);
        assert!(sessions.overdue(TimeNs(deadline.0 - 1)).is_empty());
        assert_eq!(sessions.next_timer(), Some(deadline));
        assert_eq!(sessions.overdue(deadline), [INSTANCE]);
        sessions.step_answered(deadline, plan(1, 6).key);
        assert_eq!(sessions.next_timer(), None);
    }

    #[test]
    fn a_plan_never_overtakes_one_that_waits_for_links() {
        let (mut sessions, mut receiver) = opened(8);
        for (step, is_linked) in [(1, false), (2, true)] {
            let held = sessions.dispatch(TimeNs(0), plan(0, step), is_linked);
            held.expect("held");
        }
        assert!(receiver.try_recv().is_err());
        sessions.release(TimeNs(0), INSTANCE).expect("sent");
        let steps = std::iter::from_fn(|| receiver.try_recv().ok()).map(|sent| {
            let Some(Command::StepPlan(plan)) = sent.expect("a command").command else {
                panic!("only plans were sent");
            };
            plan.step
        });
        assert_eq!(steps.collect::<Vec<_>>(), [1, 2]);
    }

    #[test]
    fn an_instance_that_does_not_take_its_commands_is_reported() {
        let (mut sessions, _receiver) = opened(1);
        sessions
            .dispatch(TimeNs(0), plan(0, 1), true)
            .expect("room");
        let full = sessions.dispatch(TimeNs(0), plan(1, 1), true);
        assert_eq!(full, Err(NotTaken(INSTANCE)));
        assert_eq!(sessions.drain(), [NotTaken(INSTANCE)]);
    }

    #[test]
    fn a_closed_session_tells_why_and_stops_its_reader() {
        let mut sessions = Sessions::new(100);
        let (commands, mut receiver) = mpsc::channel(8);
        let mut stopped = sessions.open(INSTANCE, commands);
        assert!(
            stopped
                .try_recv()
                .is_err_and(|e| e == oneshot::error::TryRecvError::Empty)
        );
        sessions.close(INSTANCE, Some(Status::aborted("why")));
        assert!(
            stopped
                .try_recv()
                .is_err_and(|e| e == oneshot::error::TryRecvError::Closed)
        );
        let told = receiver.try_recv().expect("told").expect_err("a status");
        assert_eq!(told.message(), "why");
        assert!(sessions.is_empty());
        sessions
            .dispatch(TimeNs(0), plan(0, 1), true)
            .expect("nobody to send to");
    }
}
