//! What happens when a peer's process is killed or stopped, with real processes.

#![allow(unsafe_code, reason = "forks")]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on stops there")]
#![allow(clippy::print_stdout, reason = "figures for who runs it")]

mod common;

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use common::{Fabric, Node, geometry, identity, pattern};
use rustix::process::{Pid, Signal, kill_process};
use step3rt_core::ids::{InstanceId, LaneId};
use step3rt_fabric::address::{DataAddress, PeerAddress, boot_id};
use step3rt_fabric::contract::{DownReason, Geometry, LinkIdentity, Side};
use step3rt_fabric::endpoint::{ConnectError, FabricEvent};

const ATTENTION: LinkIdentity = identity(1, 1);
const FFN: LinkIdentity = identity(2, 1);
const LANE: LaneId = LaneId(0);

/// More than the kernel buffers of both ends of a TCP connection hold.
const SLOT_BYTES: usize = 16 << 20;

/// A step that the child's FFN answers; others it only receives.
const ANSWER_ME: u64 = 1;

/// Tells the child what to be: side, fabric, epoch, and an initiator where to connect.
const CHILD_VARIABLE: &str = "STEP3RT_TEST_CHILD";

fn sizes() -> Geometry {
    geometry(2, SLOT_BYTES)
}

/// An endpoint in a process of its own, which says on its standard output what it does.
struct Other {
    process: Child,
    lines: BufReader<ChildStdout>,
}

impl Other {
    fn spawn(role: &str) -> Self {
        let mut process = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "child_process", "--ignored", "--nocapture"])
            .env(CHILD_VARIABLE, role)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(process.stdout.take().unwrap());
        Self { process, lines }
    }

    fn ffn(fabric: Fabric) -> (Self, PeerAddress) {
        Self::ffn_with(fabric, "")
    }

    fn ffn_with(fabric: Fabric, habit: &str) -> (Self, PeerAddress) {
        let mut other = Self::spawn(&format!("ffn {fabric:?} 1 {habit}"));
        let address = DataAddress {
            fabric: format!("{fabric:?}").to_lowercase(),
            address: other.expect("listens"),
        };
        let boot_id = boot_id().unwrap();
        (
            other,
            PeerAddress {
                identity: FFN,
                boot_id,
                addresses: vec![address],
            },
        )
    }

    /// Reads up to the line that starts with `what`; returns the rest of it.
    fn expect(&mut self, what: &str) -> String {
        let mut line = String::new();
        loop {
            line.clear();
            assert!(
                self.lines.read_line(&mut line).unwrap() > 0,
                "the child ended before {what}"
            );
            if let Some(rest) = line
                .strip_prefix("child ")
                .and_then(|l| l.strip_prefix(what))
            {
                return rest.trim().to_owned();
            }
        }
    }

    fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(self.process.id().try_into().unwrap()).unwrap();
        kill_process(pid, signal).unwrap();
    }

    fn kill(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }
}

impl Drop for Other {
    fn drop(&mut self) {
        // Dead already in most tests; the others must not leave it behind when they fail.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

#[test]
#[ignore = "the other process of the tests in this file, not a test"]
fn child_process() {
    let Ok(role) = std::env::var(CHILD_VARIABLE) else {
        return;
    };
    let role: Vec<_> = role.split(' ').collect();
    let fabric = match role[1] {
        "Shm" => Fabric::Shm,
        "Tcp" => Fabric::Tcp,
        _ => Fabric::Rdma,
    };
    let epoch = role[2].parse().unwrap();
    if role[0] == "ffn" {
        ffn_child(fabric, role.contains(&"forks"));
    } else {
        attention_child(fabric, epoch, role[3]);
    }
}

fn say(what: &str) {
    let mut out = std::io::stdout();
    writeln!(out, "\nchild {what}").unwrap();
    out.flush().unwrap();
}

fn ffn_child(fabric: Fabric, forks: bool) {
    let mut ffn = Node::ffn(fabric, FFN.instance.0, sizes());
    say(&format!("listens {}", ffn.endpoint.addresses()[0].address));
    loop {
        match ffn.next() {
            FabricEvent::LinkUp(_) if forks => say(&format!("has a child {}", fork())),
            FabricEvent::LinkUp(_) => say("is linked"),
            FabricEvent::Arrived { peer, header } => {
                if header.frame.step == ANSWER_ME {
                    let payload = ffn.payload(&header);
                    ffn.push((peer, header.lane), ANSWER_ME, &payload);
                    say("answered");
                } else {
                    say("holds a frame");
                }
            }
            FabricEvent::LinkDown { .. } => say("lost its peer"),
            other @ (FabricEvent::DialFailed { .. } | FabricEvent::ResetAsked { .. }) => {
                panic!("{other:?} of one that dials nobody")
            }
        }
    }
}

/// Makes a child that has all descriptors of this process and does nothing; returns its pid.
fn fork() -> libc::pid_t {
    // SAFETY: the child of this process of several threads only pauses, which is allowed there.
    let pid = unsafe { libc::fork() };
    if pid == 0 {
        loop {
            // SAFETY: has no arguments and changes nothing.
            unsafe { libc::pause() };
        }
    }
    assert!(pid > 0);
    pid
}

fn attention_child(fabric: Fabric, epoch: u64, address: &str) {
    let this = LinkIdentity {
        epoch: step3rt_core::ids::Epoch(epoch),
        ..ATTENTION
    };
    let mut attention = Node::bind(fabric, this, Side::Initiator, sizes());
    let address = DataAddress {
        fabric: format!("{fabric:?}").to_lowercase(),
        address: address.to_owned(),
    };
    let boot_id = boot_id().unwrap();
    let peer = PeerAddress {
        identity: FFN,
        boot_id,
        addresses: vec![address],
    };
    attention.endpoint.connect(&peer).unwrap();
    say("is linked");
    attention.push((FFN.instance, LANE), epoch, b"from a process");
    say("has pushed");
    attention.expect_arrival();
    say("has its reply");
    attention.next();
}

macro_rules! on_every_process_fabric {
    ($(fn $name:ident($fabric:ident: Fabric) $body:block)*) => {
        $(fn $name($fabric: Fabric) $body)*
        mod shm { $(#[test] fn $name() { super::$name(super::Fabric::Shm) })* }
        mod tcp { $(#[test] fn $name() { super::$name(super::Fabric::Tcp) })* }
        #[cfg(feature = "rdma")]
        mod rdma { $(
            #[test]
            #[ignore = "needs an RDMA device: make test-rdma"]
            fn $name() { super::$name(super::Fabric::Rdma) }
        )* }
    };
}

on_every_process_fabric! {
    fn a_killed_ffn_instance_is_reported_whatever_it_was_doing(fabric: Fabric) {
        let mut fastest = Duration::MAX;
        for point in ["is linked", "holds a frame", "answered"] {
            let (mut other, address) = Other::ffn(fabric);
            let mut attention = Node::attention(fabric, 1, sizes());
            attention.endpoint.connect(&address).unwrap();
            match point {
                "holds a frame" => attention.push((FFN.instance, LANE), 0, b"keep it"),
                "answered" => attention.push((FFN.instance, LANE), ANSWER_ME, b"echo"),
                _ => {}
            }
            other.expect(point);
            let started = Instant::now();
            other.kill();
            if point == "answered" {
                // Published before the death, so it counts.
                let (_, header) = attention.expect_arrival();
                assert_eq!(attention.payload(&header), b"echo");
            }
            assert_eq!(
                attention.expect_down(),
                (FFN, DownReason::PeerClosed),
                "{point}"
            );
            let elapsed = started.elapsed();
            println!("{fabric:?}: a killed process that {point} was noticed after {elapsed:?}");
            fastest = fastest.min(elapsed);

            attention.expect_nothing();
            let error = attention.endpoint.connect(&address).unwrap_err();
            assert!(matches!(error, ConnectError::Unreachable { .. }), "{error}");
            let name = format!("step3rt-{}-", other.process.id());
            let sockets = std::fs::read_to_string("/proc/net/unix").unwrap();
            assert!(!sockets.contains(&name), "a socket outlived its process");
        }
        // Of three, so that one hiccup of a busy machine does not count.
        assert!(
            fastest < Duration::from_secs(1),
            "death was noticed after {fastest:?}"
        );
    }

    fn a_killed_attention_instance_is_reported_and_may_come_back(fabric: Fabric) {
        let mut ffn = Node::ffn(fabric, FFN.instance.0, sizes());
        let address = ffn.endpoint.addresses()[0].address.clone();
        for epoch in 1..4 {
            let mut other = Other::spawn(&format!("attention {fabric:?} {epoch} {address}"));
            let peer = identity(1, epoch);
            ffn.expect_up(peer);
            let (_, header) = ffn.expect_arrival();
            assert_eq!(ffn.payload(&header), b"from a process");
            if epoch == 3 {
                ffn.push((peer.instance, LANE), 0, b"answer");
                other.expect("has its reply");
            }
            other.kill();
            assert_eq!(ffn.expect_down(), (peer, DownReason::PeerClosed));
        }
    }

    fn a_push_to_a_stopped_peer_does_not_block_and_arrives_when_it_goes_on(fabric: Fabric) {
        let (mut other, address) = Other::ffn(fabric);
        let mut attention = Node::attention(fabric, 1, sizes());
        attention.endpoint.connect(&address).unwrap();
        other.expect("is linked");
        other.signal(Signal::STOP);
        let payloads = [pattern(1, SLOT_BYTES), pattern(2, SLOT_BYTES)];
        // Two lanes: the second waits behind the first.
        for (lane, payload) in [LaneId(0), LaneId(1)].into_iter().zip(&payloads) {
            attention.push((FFN.instance, lane), ANSWER_ME, payload);
        }
        attention.expect_nothing();
        other.signal(Signal::CONT);
        for _ in 0..2 {
            let (_, header) = attention.expect_arrival();
            let lane = usize::from(header.lane.0);
            assert!(
                attention.payload(&header) == payloads[lane],
                "lane {lane} was damaged"
            );
        }
    }

    fn an_endpoint_whose_peer_is_stopped_in_the_middle_of_a_frame_closes_at_once(fabric: Fabric) {
        let (mut other, address) = Other::ffn(fabric);
        let mut attention = Node::attention(fabric, 1, sizes());
        attention.endpoint.connect(&address).unwrap();
        other.expect("is linked");
        other.signal(Signal::STOP);
        attention.push((FFN.instance, LANE), 0, &pattern(1, SLOT_BYTES));
        // Ends the threads that are in the middle of sending; this test would hang if it did not.
        drop(attention);
        other.signal(Signal::CONT);
        other.expect("lost its peer");
    }

    fn a_peer_killed_in_the_middle_of_a_frame_is_reported(fabric: Fabric) {
        let (mut other, address) = Other::ffn(fabric);
        let mut attention = Node::attention(fabric, 1, sizes());
        attention.endpoint.connect(&address).unwrap();
        other.expect("is linked");
        other.signal(Signal::STOP);
        attention.push((FFN.instance, LANE), 0, &pattern(1, SLOT_BYTES));
        other.kill();
        assert_eq!(attention.expect_down(), (FFN, DownReason::PeerClosed));
        // A place is free again, and the endpoint is as good as new.
        let (_other, address) = Other::ffn(fabric);
        attention.endpoint.connect(&address).unwrap();
        attention.push((InstanceId(2), LANE), ANSWER_ME, b"again");
        assert_eq!(attention.expect_arrival().1.sequence, 1);
    }
}

#[test]
fn a_killed_peer_whose_sockets_live_on_in_its_child_is_reported_over_shm() {
    let (mut other, address) = Other::ffn_with(Fabric::Shm, "forks");
    let mut attention = Node::attention(Fabric::Shm, 1, sizes());
    attention.endpoint.connect(&address).unwrap();
    let grandchild = other.expect("has a child ").parse().unwrap();
    let _grandchild = KillOnDrop(Pid::from_raw(grandchild).unwrap());
    other.kill();
    assert_eq!(attention.expect_down(), (FFN, DownReason::PeerClosed));
}

struct KillOnDrop(Pid);

impl Drop for KillOnDrop {
    fn drop(&mut self) {
        kill_process(self.0, Signal::KILL).unwrap();
    }
}
