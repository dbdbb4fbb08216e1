//! Measures frames that go to and fro between two processes, over a fabric or what it is built on.
//!
//! One process calls [`echo`], the other [`measure`] with the address that the first has written. It
//! makes figures only: it never judges them, and starts no process.

use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::str::FromStr;
use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};
use step3rt_core::ids::{Epoch, InstanceId, LaneId};
use thiserror::Error;

use crate::address::{DataAddress, PeerAddress};
use crate::contract::{Geometry, LinkIdentity, PushError, Side, SlotMemory};
use crate::endpoint::{
    BindError, ConnectError, Endpoint, EndpointConfig, FabricEvent, LinkSettings,
};
use crate::frame::Frame;
use crate::measure_flag::{echo_flag, measure_flag};
use crate::tcp_socket::send_unpaced_within_host;
use crate::tls::Tls;

/// Rounds before those that count, on both sides.
pub const WARM_UP_ROUNDS: usize = 50;

const LANE: LaneId = LaneId(0);
const ANY_PORT: &str = "127.0.0.1:0";
/// A peer that is silent this long, between rounds of milliseconds, is gone.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// What carries the payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Carrier {
    /// A link over shared memory; the payload is copied into its slot and out of it.
    Shm,
    /// A link over TCP; the payload lies in its slot.
    Tcp,
    /// A link over RDMA; the payload lies in its slot. This host's device writes to itself.
    Rdma,
    /// No link, the baseline of TCP: a socket that one thread of each process writes and reads.
    Socket,
    /// No link, the baseline of shared memory: the same copies, and one word that says whose turn it is.
    Flag,
}

impl Carrier {
    fn fabric(self) -> &'static str {
        match self {
            Self::Shm => "shm",
            Self::Tcp => "tcp",
            Self::Rdma => "rdma",
            Self::Socket => "socket",
            Self::Flag => "flag",
        }
    }
}

impl FromStr for Carrier {
    type Err = MeasureError;

    fn from_str(name: &str) -> Result<Self, MeasureError> {
        let all = [Self::Shm, Self::Tcp, Self::Rdma, Self::Socket, Self::Flag];
        let found = all.into_iter().find(|carrier| carrier.fabric() == name);
        found.ok_or_else(|| MeasureError::Carrier(name.to_owned()))
    }
}

/// What both processes must agree on.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// What carries the payload.
    pub carrier: Carrier,
    /// Payload of a frame; at least 1.
    pub num_bytes: usize,
    /// Rounds that count, there and back; at least 1.
    pub num_rounds: usize,
}

/// What one process has measured.
#[derive(Clone, Debug)]
pub struct Times {
    /// Of every round that counts, half of its time there and back, in microseconds.
    pub one_way_us: Vec<f64>,
    /// Of all threads of this process, per round, in microseconds.
    pub cpu_us_per_round: f64,
}

/// Why nothing was measured.
#[derive(Debug, Error)]
pub enum MeasureError {
    /// Not a [`Carrier`].
    #[error("{0:?} carries nothing that is measured. Use shm, tcp, rdma, socket or flag")]
    Carrier(String),
    /// No bytes or no rounds.
    #[error("{num_bytes} bytes in {num_rounds} rounds cannot be measured. Use 1 or more of each")]
    Nothing {
        /// As asked.
        num_bytes: usize,
        /// As asked.
        num_rounds: usize,
    },
    /// An end could not be made.
    #[error(transparent)]
    Bind(#[from] BindError),
    /// The ends did not link.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// The link did not take a frame.
    #[error(transparent)]
    Push(#[from] PushError),
    /// No frame came.
    #[error("the other end went away or was silent for 30 s. Its output says why; run it again")]
    Ended,
    /// Of the plain socket, or of the output.
    #[error("the measurement stopped: {0}. Run it again; `step3rt doctor` examines this host")]
    System(#[from] io::Error),
}

/// Measures rounds with the process that wrote `address`. With `tls`, a link over TCP is encrypted.
pub fn measure(plan: Plan, tls: Option<Tls>, address: &str) -> Result<Times, MeasureError> {
    plan.check()?;
    match plan.carrier {
        Carrier::Flag => measure_flag(plan, address),
        Carrier::Socket => measure_socket(plan, address),
        Carrier::Shm | Carrier::Tcp | Carrier::Rdma => measure_link(plan, tls, address),
    }
}

/// Sends back what comes, until all rounds are done. Writes two lines: the address at the start, and
/// at the end the microseconds of CPU per round that counts.
pub fn echo(plan: Plan, tls: Option<Tls>, out: &mut dyn Write) -> Result<(), MeasureError> {
    plan.check()?;
    let cpu_us_per_round = match plan.carrier {
        Carrier::Flag => echo_flag(plan, out)?,
        Carrier::Socket => echo_socket(plan, out)?,
        Carrier::Shm | Carrier::Tcp | Carrier::Rdma => echo_link(plan, tls, out)?,
    };
    say(out, &cpu_us_per_round.to_string())
}

impl Plan {
    fn check(self) -> Result<(), MeasureError> {
        let Self {
            num_bytes,
            num_rounds,
            ..
        } = self;
        if num_bytes == 0 || num_rounds == 0 {
            return Err(MeasureError::Nothing {
                num_bytes,
                num_rounds,
            });
        }
        Ok(())
    }

    fn frame(self) -> Frame {
        Frame {
            step: 0,
            layer: 0,
            num_tokens: 1,
            payload_bytes: self.num_bytes,
        }
    }

    /// Where a payload is made by the CPU, as tensors are in shared memory.
    fn copies(self) -> bool {
        self.carrier == Carrier::Shm
    }

    /// Calls `round` for each, and returns how long those that count took, there and back.
    pub(crate) fn time(
        self,
        mut round: impl FnMut() -> Result<(), MeasureError>,
    ) -> Result<(Vec<Duration>, f64), MeasureError> {
        for _ in 0..WARM_UP_ROUNDS {
            round()?;
        }
        let mut rounds = Vec::with_capacity(self.num_rounds);
        let cpu_before = cpu_us();
        for _ in 0..self.num_rounds {
            let started = Instant::now();
            round()?;
            rounds.push(started.elapsed());
        }
        Ok((rounds, self.per_round(cpu_us() - cpu_before)))
    }

    #[expect(clippy::cast_precision_loss, reason = "rounds are far below 2^52")]
    fn per_round(self, total: f64) -> f64 {
        total / self.num_rounds as f64
    }
}

impl Times {
    /// Of rounds there and back, and the CPU time of one.
    pub(crate) fn new((rounds, cpu_us_per_round): (Vec<Duration>, f64)) -> Self {
        let one_way_us = rounds.iter().map(|round| round.as_secs_f64() * 1e6 / 2.0);
        Self {
            one_way_us: one_way_us.collect(),
            cpu_us_per_round,
        }
    }
}

/// Of all threads of this process, so far.
#[expect(clippy::cast_precision_loss, reason = "uptimes are far below 2^52 s")]
fn cpu_us() -> f64 {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    time.tv_sec as f64 * 1e6 + time.tv_nsec as f64 / 1e3
}

pub(crate) fn say(out: &mut dyn Write, line: &str) -> Result<(), MeasureError> {
    writeln!(out, "{line}")?;
    Ok(out.flush()?)
}

fn identity(side: Side) -> LinkIdentity {
    LinkIdentity {
        instance: InstanceId(u32::from(side == Side::Responder)),
        epoch: Epoch(1),
    }
}

fn bind(plan: Plan, tls: Option<Tls>, side: Side) -> Result<Endpoint, MeasureError> {
    let fabric = plan.carrier.fabric();
    let listens = side == Side::Responder;
    let config = EndpointConfig {
        identity: identity(side),
        side,
        geometry: Geometry {
            num_lanes: 1,
            a2f_slot_bytes: plan.num_bytes,
            f2a_slot_bytes: plan.num_bytes,
        },
        fabric: fabric.parse().expect("a fabric's own name"),
        listen_shm: listens && plan.carrier == Carrier::Shm,
        listen_tcp: (listens && plan.carrier != Carrier::Shm)
            .then(|| ANY_PORT.parse().expect("an address")),
        advertise_host: None,
        settings: LinkSettings::default(),
    };
    Ok(Endpoint::bind_with(config, None, tls)?)
}

fn await_frame(endpoint: &mut Endpoint, events: &mut Vec<FabricEvent>) -> Result<(), MeasureError> {
    let doorbell = endpoint.doorbell();
    loop {
        let seen = doorbell.current();
        endpoint.poll(events);
        for event in events.drain(..) {
            match event {
                FabricEvent::Arrived { .. } => return Ok(()),
                FabricEvent::LinkDown { .. } | FabricEvent::DialFailed { .. } => {
                    return Err(MeasureError::Ended);
                }
                FabricEvent::LinkUp(_) | FabricEvent::ResetAsked { .. } => {}
            }
        }
        if !doorbell.wait(seen, PATIENCE) {
            return Err(MeasureError::Ended);
        }
    }
}

/// As tensor code does; [`SlotMemory::write`] is not made for speed.
#[expect(unsafe_code, reason = "copies into a slot at full speed")]
pub(crate) fn copy_in(slot: &dyn SlotMemory, bytes: &[u8]) {
    assert!(bytes.len() <= slot.len());
    // SAFETY: the slot has as many bytes, is mapped while `slot` lives, and is this side's to write
    // while the lane has credit.
    unsafe {
        slot.as_ptr()
            .copy_from_nonoverlapping(bytes.as_ptr(), bytes.len());
    }
}

/// The other way round.
#[expect(unsafe_code, reason = "copies out of a slot at full speed")]
pub(crate) fn copy_out(slot: &dyn SlotMemory, bytes: &mut [u8]) {
    assert!(bytes.len() <= slot.len());
    // SAFETY: as above; the peer does not write between the arrival and this side's push.
    unsafe {
        slot.as_ptr()
            .copy_to_nonoverlapping(bytes.as_mut_ptr(), bytes.len());
    }
}

fn measure_link(plan: Plan, tls: Option<Tls>, address: &str) -> Result<Times, MeasureError> {
    let mut endpoint = bind(plan, tls, Side::Initiator)?;
    let peer = identity(Side::Responder);
    endpoint.connect(&PeerAddress {
        identity: peer,
        boot_id: String::new(),
        addresses: vec![DataAddress {
            fabric: plan.carrier.fabric().to_owned(),
            address: address.to_owned(),
        }],
    })?;
    let not_linked = || MeasureError::Push(PushError::NotLinked(peer.instance));
    let send = endpoint.send_slot(peer.instance, LANE);
    let send = send.ok_or_else(not_linked)?;
    let receive = endpoint.receive_slot(peer.instance, LANE);
    let receive = receive.ok_or_else(not_linked)?;
    let mut payload = vec![1; plan.num_bytes];
    let mut events = Vec::new();
    let rounds = plan.time(|| {
        if plan.copies() {
            copy_in(&*send, &payload);
        }
        endpoint.push(peer.instance, LANE, plan.frame())?;
        await_frame(&mut endpoint, &mut events)?;
        if plan.copies() {
            copy_out(&*receive, &mut payload);
        }
        Ok(())
    })?;
    Ok(Times::new(rounds))
}

fn echo_link(plan: Plan, tls: Option<Tls>, out: &mut dyn Write) -> Result<f64, MeasureError> {
    let mut endpoint = bind(plan, tls, Side::Responder)?;
    say(out, &endpoint.addresses()[0].address)?;
    let peer = identity(Side::Initiator).instance;
    let mut payload = vec![1; plan.num_bytes];
    let mut events = Vec::new();
    let mut slots = None;
    let (_, cpu_us_per_round) = plan.time(|| {
        await_frame(&mut endpoint, &mut events)?;
        if plan.copies() {
            // Asked for once: they stay where they are.
            if slots.is_none() {
                let receive = endpoint.receive_slot(peer, LANE);
                slots = receive.zip(endpoint.send_slot(peer, LANE));
            }
            let not_linked = || MeasureError::Push(PushError::NotLinked(peer));
            let (receive, send) = slots.as_ref().ok_or_else(not_linked)?;
            copy_out(&**receive, &mut payload);
            copy_in(&**send, &payload);
        }
        Ok(endpoint.push(peer, LANE, plan.frame())?)
    })?;
    // What the socket has not taken yet would be lost with the endpoint.
    while await_frame(&mut endpoint, &mut events).is_ok() {}
    Ok(cpu_us_per_round)
}

fn prepared(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    // As the link's: what is measured is the link, not the system's congestion control.
    send_unpaced_within_host(stream)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))
}

fn measure_socket(plan: Plan, address: &str) -> Result<Times, MeasureError> {
    let mut stream = TcpStream::connect(address)?;
    prepared(&stream)?;
    let mut payload = vec![1; plan.num_bytes];
    let rounds = plan.time(|| {
        stream.write_all(&payload)?;
        Ok(stream.read_exact(&mut payload)?)
    })?;
    Ok(Times::new(rounds))
}

fn echo_socket(plan: Plan, out: &mut dyn Write) -> Result<f64, MeasureError> {
    let listener = TcpListener::bind(ANY_PORT)?;
    say(out, &listener.local_addr()?.to_string())?;
    let (mut stream, _) = listener.accept()?;
    prepared(&stream)?;
    let mut payload = vec![0; plan.num_bytes];
    let (_, cpu_us_per_round) = plan.time(|| {
        stream.read_exact(&mut payload)?;
        Ok(stream.write_all(&payload)?)
    })?;
    Ok(cpu_us_per_round)
}
