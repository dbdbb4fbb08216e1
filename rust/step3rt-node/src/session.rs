//! The session with the coordinator: one bidirectional gRPC stream on a thread of its own.
//!
//! Connecting, heartbeats and reading happen there; the instance's loop only takes commands from a
//! queue and puts reports into one. The loop's thread never waits for the coordinator here, except
//! in [`Session::connect`] and [`Session::close`].

use std::sync::Arc;
use std::sync::mpsc as std_mpsc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use step3rt_core::step::StepPlan;
use step3rt_fabric::contract::{Doorbell, LinkIdentity};
use step3rt_proto::v1::session_request::Event;
use step3rt_proto::v1::session_response;
use step3rt_proto::{step, v1};
use tokio::sync::{mpsc, oneshot};
use tokio::time::{MissedTickBehavior, interval, timeout};
use tonic::Streaming;

use crate::dialer::{Connection, Dialer, HEARTBEATS_PER_LEASE, Welcome, describe};
use crate::error::NodeError;
use crate::options::NodeOptions;
use crate::pulse::Pulse;
use crate::topology::Topology;

/// Most commands that wait for the loop: four plans for each of 8 lanes, and topologies. When it is
/// full the coordinator's flow control holds the rest back, and heartbeats tell it that the loop is
/// stuck.
const MAX_QUEUED_COMMANDS: usize = 64;

/// How often the wait for the first Welcome looks whether it is still wanted.
const INTERRUPT_CHECK: Duration = Duration::from_millis(50);

/// What the loop is told when the session's thread ends without a word.
const PANICKED: &str = "the session thread panicked, which its error output explains";

/// How long closing waits for the coordinator to take what is queued.
const CLOSE_GRACE: Duration = Duration::from_secs(2);

/// What the coordinator says later.
#[derive(Clone, Debug, PartialEq)]
pub enum Command {
    /// The set of ready instances changed.
    Topology(Topology),
    /// A lane's next step, of this incarnation.
    StepPlan(StepPlan),
    /// Finish and go.
    Drain,
    /// The session is over, with the reason; nothing follows.
    Lost(String),
}

/// An open session. Owned by the instance's loop.
pub struct Session {
    welcome: Welcome,
    pulse: Arc<Pulse>,
    reports: Option<mpsc::Sender<v1::SessionRequest>>,
    commands: mpsc::Receiver<Command>,
    /// Whether the loop has been told that the session is over.
    is_lost: bool,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Session {
    /// Connects, retrying until the coordinator answers or the options' time is over.
    ///
    /// `is_interrupted` is asked every now and then on the calling thread; true gives up.
    pub fn connect(
        options: &NodeOptions,
        boot_id: String,
        is_interrupted: &mut dyn FnMut() -> bool,
    ) -> Result<Self, NodeError> {
        let pulse = Arc::new(Pulse::new());
        let (stop, stopped) = oneshot::channel();
        let (opened_tx, opened_rx) = std_mpsc::sync_channel(1);
        let dialer = Dialer::new(options, boot_id);
        let thread_pulse = Arc::clone(&pulse);
        let thread = thread::Builder::new()
            .name("step3rt-session".to_owned())
            .spawn(move || {
                let _last = RingAtEnd(&thread_pulse);
                run(&dialer, &thread_pulse, stopped, &opened_tx);
            })
            .map_err(|source| NodeError::System {
                action: "start the session thread",
                source,
            })?;
        let opened = loop {
            match opened_rx.recv_timeout(INTERRUPT_CHECK) {
                Ok(opened) => break opened?,
                Err(std_mpsc::RecvTimeoutError::Timeout) if !is_interrupted() => {}
                Err(std_mpsc::RecvTimeoutError::Disconnected) => {
                    return Err(NodeError::SessionOver(PANICKED.to_owned()));
                }
                // Dropping `stop` ends the thread, whatever it is waiting for.
                Err(std_mpsc::RecvTimeoutError::Timeout) => {
                    return Err(NodeError::Interrupted(
                        options.coordinator.as_str().to_owned(),
                    ));
                }
            }
        };
        Ok(Self {
            welcome: opened.welcome,
            pulse,
            reports: Some(opened.reports),
            commands: opened.commands,
            is_lost: false,
            stop: Some(stop),
            thread: Some(thread),
        })
    }

    /// What the coordinator said first.
    pub fn welcome(&self) -> &Welcome {
        &self.welcome
    }

    /// What heartbeats tell.
    pub fn pulse(&self) -> &Pulse {
        &self.pulse
    }

    /// Rings `doorbell` at every command from now on.
    pub fn ring(&self, doorbell: Arc<dyn Doorbell>) {
        self.pulse.set_doorbell(doorbell);
    }

    /// The next command, if one has come. Never waits.
    pub fn next_command(&mut self) -> Option<Command> {
        let command = match self.commands.try_recv() {
            Ok(command) => command,
            // The thread's last word is the reason why it ends; without one it panicked.
            Err(mpsc::error::TryRecvError::Disconnected) if !self.is_lost => {
                Command::Lost(PANICKED.to_owned())
            }
            Err(_) => return None,
        };
        self.is_lost |= matches!(command, Command::Lost(_));
        Some(command)
    }

    /// Queues a report. Never waits.
    pub fn send(&self, event: Event) -> Result<(), NodeError> {
        let over = |reason: &str| Err(NodeError::SessionOver(reason.to_owned()));
        let Some(reports) = &self.reports else {
            return over("this instance closed it");
        };
        match reports.try_send(v1::SessionRequest { event: Some(event) }) {
            Ok(()) => Ok(()),
            Err(mpsc::error::TrySendError::Full(_)) => {
                over("the coordinator does not read what this instance reports")
            }
            Err(mpsc::error::TrySendError::Closed(_)) => over("the connection is closed"),
        }
    }

    /// Sends what is queued and ends the session; idempotent. Waits for the coordinator to take it,
    /// but not long.
    pub fn close(&mut self) {
        self.hang_up();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the session thread panicked");
        }
    }

    fn hang_up(&mut self) {
        self.is_lost = true; // by this instance, which need not be told
        self.reports = None;
        self.stop = None;
        self.commands.close();
    }
}

impl Drop for Session {
    /// Ends the session as [`Session::close`] does, but waits for nobody: whoever drops a session
    /// may hold a lock that others need.
    fn drop(&mut self) {
        self.hang_up();
    }
}

/// Wakes the loop when the session's thread is over, so that it sees even a panic.
struct RingAtEnd<'a>(&'a Pulse);

impl Drop for RingAtEnd<'_> {
    fn drop(&mut self) {
        self.0.ring();
    }
}

/// What the thread hands back once the coordinator has answered.
struct Opened {
    welcome: Welcome,
    reports: mpsc::Sender<v1::SessionRequest>,
    commands: mpsc::Receiver<Command>,
}

/// The thread: connects, then serves the session until it is over or `stopped` resolves.
fn run(
    dialer: &Dialer,
    pulse: &Pulse,
    mut stopped: oneshot::Receiver<()>,
    opened: &std_mpsc::SyncSender<Result<Opened, NodeError>>,
) {
    // Nobody may wait for `opened` any more; then there is nothing left to do either.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let runtime = match runtime {
        Ok(runtime) => runtime,
        Err(source) => {
            let action = "start the session's runtime";
            let _ = opened.send(Err(NodeError::System { action, source }));
            return;
        }
    };
    runtime.block_on(async {
        let connection = tokio::select! {
            connection = dialer.dial() => connection,
            _ = &mut stopped => return,
        };
        let connection = match connection {
            Ok(connection) => connection,
            Err(error) => {
                let _ = opened.send(Err(error));
                return;
            }
        };
        let (commands_tx, commands) = mpsc::channel(MAX_QUEUED_COMMANDS);
        let heartbeat = Heartbeat::new(&connection);
        let reader = Reader::new(&connection.welcome, connection.inbound, commands_tx, pulse);
        let accepted = opened.send(Ok(Opened {
            welcome: connection.welcome,
            reports: connection.reports,
            commands,
        }));
        if accepted.is_ok() {
            serve(reader, heartbeat, stopped).await;
        }
    });
}

/// Reads and beats until the session is over; once `stopped`, only until what is queued is taken.
async fn serve(reader: Reader<'_>, heartbeat: Heartbeat, stopped: oneshot::Receiver<()>) {
    let pulse = reader.pulse;
    let mut reading = std::pin::pin!(reader.read());
    tokio::select! {
        () = &mut reading => return,
        () = heartbeat.beat(pulse) => {}
        _ = stopped => {}
    }
    if timeout(CLOSE_GRACE, reading).await.is_err() {
        tracing::warn!("the coordinator did not end the session in time; leaving without it");
    }
}

/// Turns responses into commands.
struct Reader<'a> {
    identity: LinkIdentity,
    inbound: Streaming<v1::SessionResponse>,
    commands: mpsc::Sender<Command>,
    pulse: &'a Pulse,
}

impl<'a> Reader<'a> {
    fn new(
        welcome: &Welcome,
        inbound: Streaming<v1::SessionResponse>,
        commands: mpsc::Sender<Command>,
        pulse: &'a Pulse,
    ) -> Self {
        Self {
            identity: welcome.identity(),
            inbound,
            commands,
            pulse,
        }
    }

    /// Reads until the session is over.
    async fn read(mut self) {
        loop {
            let command = match self.inbound.message().await {
                Ok(Some(response)) => match command(self.identity, response) {
                    Ok(Some(command)) => command,
                    Ok(None) => continue,
                    Err(found) => Command::Lost(format!("the coordinator sent nonsense: {found}")),
                },
                Ok(None) => Command::Lost("the coordinator ended the session".to_owned()),
                Err(status) => Command::Lost(describe(&status)),
            };
            let is_last = matches!(command, Command::Lost(_));
            // Refused once the loop has closed its end; then only the end of the stream matters.
            let _ = self.commands.send(command).await;
            self.pulse.ring();
            if is_last {
                return;
            }
        }
    }
}

/// What a response means to the incarnation that it came to: nothing if it is for another one.
pub(crate) fn command(
    identity: LinkIdentity,
    response: v1::SessionResponse,
) -> Result<Option<Command>, String> {
    match response.command {
        Some(session_response::Command::Topology(topology)) => {
            Topology::from_wire(topology).map(|topology| Some(Command::Topology(topology)))
        }
        Some(session_response::Command::StepPlan(plan)) => {
            let plan = step::plan_from_wire(identity.instance, plan).map_err(|e| e.to_string())?;
            if plan.key.epoch == identity.epoch {
                return Ok(Some(Command::StepPlan(plan)));
            }
            tracing::warn!(
                epoch = plan.key.epoch.0,
                "a plan of another epoch is ignored"
            );
            Ok(None)
        }
        Some(session_response::Command::Drain(_)) => Ok(Some(Command::Drain)),
        Some(session_response::Command::Welcome(_)) => Err("a second Welcome".to_owned()),
        None => Err("an empty response".to_owned()),
    }
}

/// Keeps the lease.
struct Heartbeat {
    period: Duration,
    reports: mpsc::WeakSender<v1::SessionRequest>,
}

impl Heartbeat {
    fn new(connection: &Connection) -> Self {
        let lease = Duration::from_millis(connection.welcome.settings.lease_ms.into());
        Self {
            period: lease / HEARTBEATS_PER_LEASE,
            // Weak: when the loop drops its sender, the request stream must end.
            reports: connection.reports.downgrade(),
        }
    }

    /// Beats until the loop has closed the session.
    async fn beat(self, pulse: &Pulse) {
        let mut ticks = interval(self.period);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            let Some(reports) = self.reports.upgrade() else {
                return;
            };
            let event = Some(Event::Heartbeat(pulse.heartbeat()));
            // A full queue is on its way to the coordinator and keeps the lease as well.
            let _ = reports.try_send(v1::SessionRequest { event });
        }
    }
}
