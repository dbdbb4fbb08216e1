//! A futex word in shared memory on which one process sleeps and that all its peers ring.
//!
//! Ringing costs one atomic increment when nobody sleeps; only a sleeper costs a system call.
//!
//! Spinning saves the wake-up where a core is free for it and costs the whole spin where none is:
//! with 11 runnable threads on the 2 cores of a virtual machine, 64 bytes one way over shm took 42 µs
//! when every wait spun for 50 µs, 2.4 µs when none did, and 2.4 µs with the back-off below
//! (2026-11-22, as `step3rt bench link --fabric shm --bytes 64` measures it).

use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use crate::contract::Doorbell;
use crate::memory::{MapError, Mapping, PAGE_BYTES, Sharing};
use crate::sync::{AtomicU32, Instant, Ordering, futex, spin_loop};

/// Longest busy wait. A futex wake-up costs about 20 µs, so spinning longer saves nothing.
pub(crate) const MAX_SPIN_US: u32 = 50;

/// Most waits that go straight to sleep after a busy wait in vain, before the next one is tried.
/// It makes the cost of trying 0.2 µs a wait where spinning never pays, as with more ranks than
/// cores, and still finds out within a few decode steps when it begins to.
const MAX_WAITS_WITHOUT_SPIN: u32 = 256;

/// Loads between two looks at the clock.
const SPINS_PER_CLOCK_READ: u32 = if cfg!(loom) { 2 } else { 64 };

// The words lie in lines of their own (128 bytes: x86 fetches lines in pairs), so that a ringing
// peer does not slow down the sleeper count's readers.
const COUNTER_AT: usize = 0;
const SLEEPERS_AT: usize = 128;

/// A [`Doorbell`] in a memfd. Its owner waits on it; peers map the same memory and ring it.
pub(crate) struct FutexDoorbell {
    memory: Mapping,
    spin: Duration,
    patience: SpinPatience,
}

/// Whether to spin before sleeping: as long as it pays, and after each time that it did not, not
/// again for twice as many waits as the last time.
#[derive(Default)]
pub(crate) struct SpinPatience {
    waits_until_spin: AtomicU32,
    last_pause_waits: AtomicU32,
}

impl SpinPatience {
    pub(crate) fn may_spin(&self) -> bool {
        // Several threads may wait on one doorbell; then each counts for all.
        let left = self.waits_until_spin.load(Ordering::Relaxed);
        self.waits_until_spin
            .store(left.saturating_sub(1), Ordering::Relaxed);
        left == 0
    }

    pub(crate) fn learn(&self, has_paid: bool) {
        let last = self.last_pause_waits.load(Ordering::Relaxed);
        let pause = if has_paid {
            0
        } else {
            (2 * last).clamp(1, MAX_WAITS_WITHOUT_SPIN)
        };
        self.last_pause_waits.store(pause, Ordering::Relaxed);
        self.waits_until_spin.store(pause, Ordering::Relaxed);
    }
}

impl FutexDoorbell {
    /// Makes a doorbell and the memfd that peers need for ringing it.
    pub(crate) fn create(max_spin_us: u32) -> io::Result<(Self, OwnedFd)> {
        let (memory, fd) = Mapping::share("step3rt-doorbell", PAGE_BYTES, Sharing::PeerWrites)?;
        let max_spin_us = max_spin_us.min(MAX_SPIN_US);
        let spin = Duration::from_micros(max_spin_us.into());
        Ok((
            Self {
                memory,
                spin,
                patience: SpinPatience::default(),
            },
            fd,
        ))
    }

    /// Maps a peer's doorbell, for ringing.
    pub(crate) fn open(fd: &OwnedFd) -> Result<Self, MapError> {
        let memory = Mapping::open(fd, PAGE_BYTES, Sharing::PeerWrites)?;
        Ok(Self {
            memory,
            spin: Duration::ZERO,
            patience: SpinPatience::default(),
        })
    }

    /// How long a wait that starts now may spin, if it may; then [`FutexDoorbell::learn`] follows.
    pub(crate) fn may_spin(&self) -> Option<Duration> {
        (!self.spin.is_zero() && self.patience.may_spin()).then_some(self.spin)
    }

    /// Says whether spinning has paid.
    pub(crate) fn learn(&self, has_paid: bool) {
        self.patience.learn(has_paid);
    }

    pub(crate) fn counter(&self) -> &AtomicU32 {
        self.memory.u32_at(COUNTER_AT)
    }

    pub(crate) fn sleepers(&self) -> &AtomicU32 {
        self.memory.u32_at(SLEEPERS_AT)
    }

    fn spin(&self, seen: u32, started: Instant, budget: Duration) -> bool {
        loop {
            for _ in 0..SPINS_PER_CLOCK_READ {
                if self.current() != seen {
                    return true;
                }
                spin_loop();
            }
            if started.elapsed() >= budget {
                return false;
            }
        }
    }

    /// The end of every wait: sleeps without spinning first.
    pub(crate) fn sleep(&self, seen: u32, started: Instant, timeout: Duration) -> bool {
        // Counted before the kernel compares the word: a ringer that increments after that compare
        // sees the sleeper, one that increments before it makes the compare fail.
        self.sleepers().fetch_add(1, Ordering::SeqCst);
        let is_rung = loop {
            if self.current() != seen {
                break true;
            }
            let left = timeout.saturating_sub(started.elapsed());
            if left.is_zero() {
                break false;
            }
            // Every outcome is handled by looking again: rung, interrupted, timed out.
            futex::wait(self.counter(), seen, left);
        };
        self.sleepers().fetch_sub(1, Ordering::SeqCst);
        is_rung
    }
}

impl Doorbell for FutexDoorbell {
    fn current(&self) -> u32 {
        self.counter().load(Ordering::SeqCst)
    }

    fn ring(&self) {
        self.counter().fetch_add(1, Ordering::SeqCst);
        if self.sleepers().load(Ordering::SeqCst) != 0 {
            futex::wake_all(self.counter());
        }
    }

    fn wait(&self, seen: u32, timeout: Duration) -> bool {
        if self.current() != seen {
            return true;
        }
        let started = Instant::now();
        if let Some(limit) = self.may_spin() {
            let is_rung = self.spin(seen, started, limit.min(timeout));
            self.learn(is_rung);
            if is_rung {
                return true;
            }
        }
        self.sleep(seen, started, timeout)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::mpsc;

    use super::*;

    const LONG: Duration = Duration::from_secs(30);
    const NUM_ROUNDS: u32 = if cfg!(miri) { 20 } else { 5_000 };

    #[test]
    fn a_wait_ends_at_its_timeout_when_nobody_rings() {
        let (bell, _fd) = FutexDoorbell::create(10).unwrap();
        let started = Instant::now();
        assert!(!bell.wait(bell.current(), Duration::from_millis(5)));
        assert!(started.elapsed() >= Duration::from_millis(5));
    }

    #[test]
    fn a_ring_between_reading_and_waiting_is_not_lost() {
        let (bell, _fd) = FutexDoorbell::create(0).unwrap();
        let seen = bell.current();
        bell.ring();
        assert!(bell.wait(seen, Duration::ZERO));
    }

    #[test]
    fn a_peer_that_only_has_the_fd_wakes_the_sleeper() {
        for spin_us in [0, MAX_SPIN_US] {
            let (bell, fd) = FutexDoorbell::create(spin_us).unwrap();
            let bell = Arc::new(bell);
            let seen = bell.current();
            let sleeper = std::thread::spawn({
                let bell = Arc::clone(&bell);
                move || bell.wait(seen, LONG)
            });
            while bell.sleepers().load(Ordering::SeqCst) == 0 {
                std::thread::yield_now();
            }
            FutexDoorbell::open(&fd).unwrap().ring();
            assert!(sleeper.join().unwrap());
            assert_eq!(bell.sleepers().load(Ordering::SeqCst), 0);
        }
    }

    #[test]
    fn no_ring_is_lost_in_a_ping_pong_of_two_threads() {
        let (ping, _ping_fd) = FutexDoorbell::create(1).unwrap();
        let (pong, _pong_fd) = FutexDoorbell::create(1).unwrap();
        let (ping, pong) = (Arc::new(ping), Arc::new(pong));
        let (done, finished) = mpsc::channel();
        let other = std::thread::spawn({
            let (ping, pong) = (Arc::clone(&ping), Arc::clone(&pong));
            move || {
                for round in 0..NUM_ROUNDS {
                    done.send(ping.wait(round, LONG)).unwrap();
                    pong.ring();
                }
            }
        });
        for round in 0..NUM_ROUNDS {
            ping.ring();
            assert!(pong.wait(round, LONG));
            assert!(finished.recv().unwrap());
        }
        other.join().unwrap();
    }

    #[test]
    fn spinning_gets_rarer_while_it_is_in_vain_and_resumes_when_it_pays() {
        let patience = SpinPatience::default();
        let waits_until_spin = || (0..1000).find(|_| patience.may_spin()).unwrap();
        for expected in [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 256] {
            assert_eq!(waits_until_spin(), expected);
            patience.learn(false);
        }
        waits_until_spin();
        patience.learn(true);
        assert_eq!(waits_until_spin(), 0);
        assert_eq!(waits_until_spin(), 0);
    }
}
