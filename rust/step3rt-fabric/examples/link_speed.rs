//! Measures one-way times of shm and tcp links between two processes, beside what they are built
//! on, in the same run: a copy of the payload, and a plain socket. And of rdma links, where this host
//! has a device, through which it then writes to itself.
//!
//! `cargo run --release -p step3rt-fabric --example link_speed [payload bytes] [rounds] [spin us]`
//! prints one JSON object per line. A one-way time is half a round trip. Over shm the payload is
//! written into the slot by one side and read out of it by the other, as the copy baseline does.

#![allow(
    unsafe_code,
    reason = "copies into and out of slots as tensor code does"
)]
#![allow(clippy::print_stdout, reason = "printing is what it is for")]
#![allow(
    clippy::unwrap_used,
    reason = "a measurement that cannot go on stops there"
)]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use step3rt_core::ids::{Epoch, InstanceId, LaneId};
use step3rt_fabric::address::{DataAddress, PeerAddress};
use step3rt_fabric::contract::{Geometry, LinkIdentity, Side, SlotMemory};
use step3rt_fabric::endpoint::{Endpoint, EndpointConfig, FabricEvent, LinkSettings};
use step3rt_fabric::frame::Frame;
use step3rt_fabric::rdma_findings;

const LANE: LaneId = LaneId(0);
const WARM_UP_ROUNDS: usize = 50;

#[derive(Clone, Copy)]
struct Plan {
    num_bytes: usize,
    num_rounds: usize,
    spin_us: u32,
}

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let child = args
        .first()
        .is_some_and(|arg| arg == "--echo")
        .then(|| args[1].clone());
    let numbers = &args[if child.is_some() { 2 } else { 0 }..];
    let number = |at: usize, default| numbers.get(at).map_or(default, |arg| arg.parse().unwrap());
    let plan = Plan {
        num_bytes: number(0, 917_504),
        num_rounds: number(1, 2000),
        spin_us: u32::try_from(number(2, 50)).unwrap(),
    };
    match child.as_deref() {
        Some("socket") => echo_socket(plan),
        Some(fabric) => echo(fabric, plan),
        None => {
            let copy = measure_copy(plan);
            report("memcpy", plan, copy, None);
            report("shm", plan, measure(plan, "shm", true), Some(copy));
            report(
                "shm, payload not touched",
                plan,
                measure(plan, "shm", false),
                None,
            );
            let socket = measure_socket(plan);
            report("plain socket", plan, socket, None);
            report("tcp", plan, measure(plan, "tcp", false), Some(socket));
            if rdma_findings().iter().all(|finding| finding.is_good) {
                report("rdma", plan, measure(plan, "rdma", false), None);
            }
        }
    }
}

#[derive(Clone, Copy)]
struct Times {
    /// 50th percentile, 99th and maximum.
    one_way_us: [f64; 3],
}

fn times(mut rounds: Vec<Duration>, ways: f64) -> Times {
    rounds.drain(..WARM_UP_ROUNDS.min(rounds.len() - 1));
    rounds.sort();
    let at = |rank: usize| rounds[rank.min(rounds.len() - 1)].as_secs_f64() * 1e6 / ways;
    let len = rounds.len();
    Times {
        one_way_us: [len / 2, len * 99 / 100, len - 1].map(at),
    }
}

fn report(name: &str, plan: Plan, times: Times, baseline: Option<Times>) {
    let [p50_us, p99_us, max_us] = times.one_way_us;
    let ratio = baseline.map_or(String::new(), |baseline| {
        format!(
            r#", "baseline_over_this": {:.3}"#,
            baseline.one_way_us[0] / p50_us
        )
    });
    #[expect(
        clippy::cast_precision_loss,
        reason = "payloads are far below 2^52 bytes"
    )]
    let gb_per_s = plan.num_bytes as f64 / p50_us / 1e3;
    println!(
        r#"{{"what": "{name}", "bytes": {}, "one_way_us": {{"p50": {p50_us:.2}, "p99": {p99_us:.2}, "max": {max_us:.2}}}, "gb_per_s": {gb_per_s:.2}{ratio}}}"#,
        plan.num_bytes
    );
}

fn bind(plan: Plan, side: Side, fabric: &str) -> Endpoint {
    let is_responder = side == Side::Responder;
    Endpoint::bind(EndpointConfig {
        identity: LinkIdentity {
            instance: InstanceId(u32::from(side == Side::Responder)),
            epoch: Epoch(1),
        },
        side,
        geometry: Geometry {
            num_lanes: 1,
            a2f_slot_bytes: plan.num_bytes,
            f2a_slot_bytes: plan.num_bytes,
        },
        fabric: fabric.parse().unwrap(),
        listen_shm: is_responder && fabric == "shm",
        listen_tcp: (is_responder && fabric != "shm").then(|| "127.0.0.1:0".parse().unwrap()),
        advertise_host: None,
        settings: LinkSettings {
            spin_us: plan.spin_us,
            ..LinkSettings::default()
        },
    })
    .unwrap()
}

/// Waits for the next frame; false when the link has ended.
fn await_frame(endpoint: &mut Endpoint, events: &mut Vec<FabricEvent>) -> bool {
    let doorbell = endpoint.doorbell();
    loop {
        let seen = doorbell.current();
        endpoint.poll(events);
        for event in events.drain(..) {
            match event {
                FabricEvent::Arrived { .. } => return true,
                FabricEvent::LinkDown { .. } | FabricEvent::DialFailed { .. } => return false,
                FabricEvent::LinkUp(_) => {}
            }
        }
        doorbell.wait(seen, Duration::from_secs(10));
    }
}

fn frame(plan: Plan) -> Frame {
    Frame {
        step: 0,
        layer: 0,
        num_tokens: 128,
        payload_bytes: plan.num_bytes,
    }
}

fn copy_in(slot: &dyn SlotMemory, bytes: &[u8]) {
    assert!(bytes.len() <= slot.len());
    // SAFETY: the slot has as many bytes, is mapped while `slot` lives, and is this side's to write
    // while the lane has credit.
    unsafe {
        slot.as_ptr()
            .copy_from_nonoverlapping(bytes.as_ptr(), bytes.len());
    }
}

fn copy_out(slot: &dyn SlotMemory, bytes: &mut [u8]) {
    assert!(bytes.len() <= slot.len());
    // SAFETY: as above; the peer does not write between the arrival and this side's push.
    unsafe {
        slot.as_ptr()
            .copy_to_nonoverlapping(bytes.as_mut_ptr(), bytes.len());
    }
}

/// Runs this program as the other end; returns it and the address it printed.
fn spawn_echo(plan: Plan, what: &str) -> (std::process::Child, String) {
    let args = [
        plan.num_bytes.to_string(),
        plan.num_rounds.to_string(),
        plan.spin_us.to_string(),
    ];
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--echo", what])
        .args(args)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut address = String::new();
    BufReader::new(child.stdout.take().unwrap())
        .read_line(&mut address)
        .unwrap();
    (child, address.trim().to_owned())
}

fn measure(plan: Plan, fabric: &str, touches: bool) -> Times {
    let what = if touches {
        format!("{fabric}+touch")
    } else {
        fabric.to_owned()
    };
    let (mut child, address) = spawn_echo(plan, &what);
    let mut endpoint = bind(plan, Side::Initiator, fabric);
    let peer = LinkIdentity {
        instance: InstanceId(1),
        epoch: Epoch(1),
    };
    let addresses = vec![DataAddress {
        fabric: fabric.to_owned(),
        address,
    }];
    let boot_id = String::new();
    endpoint
        .connect(&PeerAddress {
            identity: peer,
            boot_id,
            addresses,
        })
        .unwrap();
    let send = endpoint.send_slot(peer.instance, LANE).unwrap();
    let receive = endpoint.receive_slot(peer.instance, LANE).unwrap();
    let mut payload = vec![1; plan.num_bytes];
    let mut events = Vec::new();
    let mut rounds = Vec::with_capacity(plan.num_rounds);
    for _ in 0..plan.num_rounds {
        let started = Instant::now();
        if touches {
            copy_in(&*send, &payload);
        }
        endpoint.push(peer.instance, LANE, frame(plan)).unwrap();
        assert!(await_frame(&mut endpoint, &mut events), "the echo ended");
        if touches {
            copy_out(&*receive, &mut payload);
        }
        rounds.push(started.elapsed());
    }
    drop(endpoint);
    child.wait().unwrap();
    times(rounds, 2.0)
}

fn echo(what: &str, plan: Plan) {
    let (fabric, touches) = what
        .strip_suffix("+touch")
        .map_or((what, false), |f| (f, true));
    let mut endpoint = bind(plan, Side::Responder, fabric);
    println!("{}", endpoint.addresses()[0].address);
    let mut payload = vec![1; plan.num_bytes];
    let mut events = Vec::new();
    while await_frame(&mut endpoint, &mut events) {
        if touches {
            copy_out(
                &*endpoint.receive_slot(InstanceId(0), LANE).unwrap(),
                &mut payload,
            );
            copy_in(&*endpoint.send_slot(InstanceId(0), LANE).unwrap(), &payload);
        }
        endpoint.push(InstanceId(0), LANE, frame(plan)).unwrap();
    }
}

/// Copies in and out of a third buffer: what both sides of a link do with a payload.
fn measure_copy(plan: Plan) -> Times {
    let (mut from, mut slot) = (vec![1_u8; plan.num_bytes], vec![2_u8; plan.num_bytes]);
    let mut rounds = Vec::with_capacity(plan.num_rounds);
    for _ in 0..plan.num_rounds {
        let started = Instant::now();
        slot.copy_from_slice(std::hint::black_box(&from));
        from.copy_from_slice(std::hint::black_box(&slot));
        rounds.push(started.elapsed());
    }
    times(rounds, 1.0)
}

fn measure_socket(plan: Plan) -> Times {
    let (mut child, address) = spawn_echo(plan, "socket");
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_nodelay(true).unwrap();
    let mut payload = vec![1; plan.num_bytes];
    let mut rounds = Vec::with_capacity(plan.num_rounds);
    for _ in 0..plan.num_rounds {
        let started = Instant::now();
        stream.write_all(&payload).unwrap();
        stream.read_exact(&mut payload).unwrap();
        rounds.push(started.elapsed());
    }
    drop(stream);
    child.wait().unwrap();
    times(rounds, 2.0)
}

fn echo_socket(plan: Plan) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    println!("{}", listener.local_addr().unwrap());
    let (mut stream, _) = listener.accept().unwrap();
    stream.set_nodelay(true).unwrap();
    let mut payload = vec![0; plan.num_bytes];
    while stream.read_exact(&mut payload).is_ok() {
        stream.write_all(&payload).unwrap();
    }
}
