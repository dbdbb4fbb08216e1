//! The baseline of shared memory: the same copies by the same two processes, and the least that can
//! say that the other's turn has come, one word in a cache line of its own.
//!
//! No header, no check, no credit, no peer that may die, no other lane, and no sleep: what a link
//! costs above it is what those cost.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Duration;

use crate::contract::Side;
use crate::measure::{MeasureError, PATIENCE, Plan, Times, copy_in, copy_out, say};
use crate::memory::{Mapping, PAGE_BYTES, SharedMapping, Sharing, SlotBytes};
use crate::sync::{Instant, Ordering};

/// Two cache lines, because x86 fetches them in pairs.
const FLAG_STRIDE_BYTES: usize = 128;

/// Looks at the flag between two at the clock, far more than a turn takes where cores are free.
const LOOKS_PER_CLOCK_READ: u32 = 1 << 12;

/// How long it spins without giving up its core: where there are fewer cores than processes, spinning
/// would measure the scheduler's time slice.
const SPIN: Duration = Duration::from_micros(50);

/// ```text
/// 0                128              PAGE_BYTES             PAGE_BYTES + slot
/// │ flag, one way │ flag, other way │ slot, one way (bytes) │ slot, other way │
/// ```
struct SharedSlots {
    memory: SharedMapping,
    send: SlotBytes,
    receive: SlotBytes,
    send_flag_at: usize,
    receive_flag_at: usize,
}

impl SharedSlots {
    fn total_bytes(plan: Plan) -> usize {
        PAGE_BYTES + 2 * plan.num_bytes.next_multiple_of(PAGE_BYTES)
    }

    fn new(memory: Mapping, plan: Plan, side: Side) -> Self {
        let memory = SharedMapping::new(memory);
        let slot = |way: usize| {
            let start = PAGE_BYTES + way * plan.num_bytes.next_multiple_of(PAGE_BYTES);
            SlotBytes::new(memory.clone(), start..start + plan.num_bytes)
        };
        let (sends, receives) = match side {
            Side::Initiator => (0, 1),
            Side::Responder => (1, 0),
        };
        Self {
            send: slot(sends),
            receive: slot(receives),
            send_flag_at: sends * FLAG_STRIDE_BYTES,
            receive_flag_at: receives * FLAG_STRIDE_BYTES,
            memory,
        }
    }

    fn publish(&self, round: u64) {
        self.memory
            .store_u64(self.send_flag_at, round, Ordering::Release);
    }

    fn await_round(&self, round: u64) -> Result<(), MeasureError> {
        let is_due = || {
            self.memory
                .load_u64(self.receive_flag_at, Ordering::Acquire)
                == round
        };
        let started = Instant::now();
        loop {
            for _ in 0..LOOKS_PER_CLOCK_READ {
                if is_due() {
                    return Ok(());
                }
                std::hint::spin_loop();
            }
            let waited = started.elapsed();
            if waited >= PATIENCE {
                return Err(MeasureError::Ended);
            }
            if waited >= SPIN {
                std::thread::yield_now();
            }
        }
    }
}

/// Rounds with the process whose memory `address` names.
pub(crate) fn measure_flag(plan: Plan, address: &str) -> Result<Times, MeasureError> {
    let fd = OwnedFd::from(OpenOptions::new().read(true).write(true).open(address)?);
    let memory = Mapping::open(&fd, SharedSlots::total_bytes(plan), Sharing::PeerWrites);
    let slots = SharedSlots::new(
        memory.map_err(|_| MeasureError::Ended)?,
        plan,
        Side::Initiator,
    );
    let mut payload = vec![1; plan.num_bytes];
    let mut round = 0;
    let rounds = plan.time(|| {
        round += 1;
        copy_in(&slots.send, &payload);
        slots.publish(round);
        slots.await_round(round)?;
        copy_out(&slots.receive, &mut payload);
        Ok(())
    })?;
    Ok(Times::new(rounds))
}

/// The other process of [`measure_flag`]; returns microseconds of CPU per round.
pub(crate) fn echo_flag(plan: Plan, out: &mut dyn Write) -> Result<f64, MeasureError> {
    let len = SharedSlots::total_bytes(plan);
    let (memory, fd) = Mapping::share("step3rt-measure", len, Sharing::PeerWrites)?;
    // Opened by the other process, of the same user, through the file system of processes.
    let fd = File::from(fd);
    say(
        out,
        &format!("/proc/{}/fd/{}", std::process::id(), fd.as_raw_fd()),
    )?;
    let slots = SharedSlots::new(memory, plan, Side::Responder);
    let mut payload = vec![1; plan.num_bytes];
    let mut round = 0;
    let (_, cpu_us_per_round) = plan.time(|| {
        round += 1;
        slots.await_round(round)?;
        copy_out(&slots.receive, &mut payload);
        copy_in(&slots.send, &payload);
        slots.publish(round);
        Ok(())
    })?;
    Ok(cpu_us_per_round)
}
