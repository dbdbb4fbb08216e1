//! A futex word in shared memory on which one process sleeps and that all its peers ring.
//!
//! Ringing costs one atomic increment when nobody sleeps; only a sleeper costs a system call.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use rustix::thread::futex;

use crate::contract::Doorbell;
use crate::memory::{MapError, Mapping, PAGE_BYTES, Sharing};

/// Longest busy wait. A futex wake-up costs about 20 µs, so spinning longer saves nothing.
const MAX_SPIN_US: u32 = 50;

/// Shortest busy wait that is worth trying before the budget falls to nothing.
const MIN_SPIN_US: u32 = 2;

/// Loads between two looks at the clock.
const SPINS_PER_CLOCK_READ: u32 = 64;

// The words lie in lines of their own (128 bytes: x86 fetches lines in pairs), so that a ringing
// peer does not slow down the sleeper count's readers.
const COUNTER_AT: usize = 0;
const SLEEPERS_AT: usize = 128;

/// A [`Doorbell`] in a memfd. Its owner waits on it; peers map the same memory and ring it.
pub(crate) struct FutexDoorbell {
    memory: Mapping,
    max_spin_us: u32,
    /// What the next wait spins at most: halved when spinning was in vain, doubled when the news
    /// came so soon after that spinning would have caught it.
    spin_us: AtomicU32,
}

impl FutexDoorbell {
    /// Makes a doorbell and the memfd that peers need for ringing it.
    pub(crate) fn create(max_spin_us: u32) -> io::Result<(Self, OwnedFd)> {
        let (memory, fd) = Mapping::share("step3rt-doorbell", PAGE_BYTES, Sharing::PeerWrites)?;
        let max_spin_us = max_spin_us.min(MAX_SPIN_US);
        Ok((
            Self {
                memory,
                max_spin_us,
                spin_us: AtomicU32::new(max_spin_us),
            },
            fd,
        ))
    }

    /// Maps a peer's doorbell, for ringing.
    pub(crate) fn open(fd: &OwnedFd) -> Result<Self, MapError> {
        let memory = Mapping::open(fd, PAGE_BYTES, Sharing::PeerWrites)?;
        Ok(Self {
            memory,
            max_spin_us: 0,
            spin_us: AtomicU32::new(0),
        })
    }

    fn counter(&self) -> &AtomicU32 {
        self.memory.u32_at(COUNTER_AT)
    }

    fn sleepers(&self) -> &AtomicU32 {
        self.memory.u32_at(SLEEPERS_AT)
    }

    fn spin(&self, seen: u32, started: Instant, budget_us: u32) -> bool {
        let budget = Duration::from_micros(budget_us.into());
        loop {
            for _ in 0..SPINS_PER_CLOCK_READ {
                if self.current() != seen {
                    return true;
                }
                std::hint::spin_loop();
            }
            if started.elapsed() >= budget {
                return false;
            }
        }
    }

    fn sleep(&self, seen: u32, started: Instant, timeout: Duration) -> bool {
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
            // Every outcome is handled by looking again: rung, interrupted, timed out. A timeout too
            // long for the kernel is a year, which is as good.
            let left = left.min(Duration::from_hours(24 * 365));
            let left = futex::Timespec {
                tv_sec: i64::try_from(left.as_secs()).expect("a year of seconds fits"),
                tv_nsec: left.subsec_nanos().into(),
            };
            let _ = futex::wait(self.counter(), futex::Flags::empty(), seen, Some(&left));
        };
        self.sleepers().fetch_sub(1, Ordering::SeqCst);
        is_rung
    }

    fn learn(&self, budget_us: u32, waited: Duration, slept: bool) {
        let next_us = if slept && waited > Duration::from_micros((2 * self.max_spin_us).into()) {
            let half = budget_us / 2;
            if half < MIN_SPIN_US { 0 } else { half }
        } else {
            (budget_us * 2).clamp(MIN_SPIN_US.min(self.max_spin_us), self.max_spin_us)
        };
        self.spin_us.store(next_us, Ordering::Relaxed);
    }
}

impl Doorbell for FutexDoorbell {
    fn current(&self) -> u32 {
        self.counter().load(Ordering::SeqCst)
    }

    fn ring(&self) {
        self.counter().fetch_add(1, Ordering::SeqCst);
        if self.sleepers().load(Ordering::SeqCst) != 0 {
            // Fails only for an address that is not mapped, which this one is. Not PRIVATE: the
            // sleeper is another process.
            let _ = futex::wake(self.counter(), futex::Flags::empty(), u32::MAX >> 1);
        }
    }

    fn wait(&self, seen: u32, timeout: Duration) -> bool {
        if self.current() != seen {
            return true;
        }
        let started = Instant::now();
        let budget_us = self.spin_us.load(Ordering::Relaxed);
        let short_us = u32::try_from(timeout.as_micros()).unwrap_or(u32::MAX);
        let rung_early = budget_us > 0 && self.spin(seen, started, budget_us.min(short_us));
        let is_rung = rung_early || self.sleep(seen, started, timeout);
        if is_rung && self.max_spin_us > 0 {
            self.learn(budget_us, started.elapsed(), !rung_early);
        }
        is_rung
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::mpsc;

    use super::*;

    const LONG: Duration = Duration::from_secs(30);

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
                for round in 0..5_000 {
                    done.send(ping.wait(round, LONG)).unwrap();
                    pong.ring();
                }
            }
        });
        for round in 0..5_000 {
            ping.ring();
            assert!(pong.wait(round, LONG));
            assert!(finished.recv().unwrap());
        }
        other.join().unwrap();
    }

    #[test]
    fn spinning_stops_when_it_is_in_vain_and_resumes_when_it_would_pay() {
        let (bell, _fd) = FutexDoorbell::create(40).unwrap();
        let long = Duration::from_millis(1);
        for expected_us in [20, 10, 5, 2, 0, 0] {
            bell.learn(bell.spin_us.load(Ordering::Relaxed), long, true);
            assert_eq!(bell.spin_us.load(Ordering::Relaxed), expected_us);
        }
        for expected_us in [2, 4, 8, 16, 32, 40, 40] {
            bell.learn(
                bell.spin_us.load(Ordering::Relaxed),
                Duration::from_micros(60),
                true,
            );
            assert_eq!(bell.spin_us.load(Ordering::Relaxed), expected_us);
        }
    }
}
