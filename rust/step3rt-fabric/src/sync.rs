//! Everything that threads, or processes, share without taking turns: atomics, locks, the futex.
//!
//! Code that is model-checked takes them from here and from nowhere else, so that `cfg(loom)` puts
//! the models' versions in their place and leaves the code as it is. It holds no algorithm.

#[cfg(loom)]
pub(crate) use crate::models::sync::{
    Arc, AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Event, Instant, Mutex, MutexGuard,
    OnceLock, Ordering, fence, futex, spin_loop,
};

#[cfg(not(loom))]
pub(crate) use self::event::Event;
#[cfg(not(loom))]
pub(crate) use std::{
    hint::spin_loop,
    sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering, fence},
    sync::{Arc, Mutex, MutexGuard, OnceLock},
    time::Instant,
};

/// Sleeping on a word of shared memory.
#[cfg(not(loom))]
pub(crate) mod futex {
    use std::sync::atomic::AtomicU32;
    use std::time::Duration;

    use rustix::thread::futex::{self, Flags, Timespec};

    /// Sleeps while `word` is `expected`, at most `timeout`. May return for no reason.
    pub(crate) fn wait(word: &AtomicU32, expected: u32, timeout: Duration) {
        // A timeout too long for the kernel is a year, which is as good.
        let timeout = timeout.min(Duration::from_hours(24 * 365));
        let timeout = Timespec {
            tv_sec: i64::try_from(timeout.as_secs()).expect("a year of seconds fits"),
            tv_nsec: timeout.subsec_nanos().into(),
        };
        // Not PRIVATE, here and below: the other side is another process.
        let _ = futex::wait(word, Flags::empty(), expected, Some(&timeout));
    }

    /// Wakes all that sleep on `word`.
    #[cfg(not(miri))]
    pub(crate) fn wake_all(word: &AtomicU32) {
        // Fails only for an address that is not mapped.
        let _ = futex::wake(word, Flags::empty(), u32::MAX >> 1);
    }

    /// As above. `rustix` makes a pointer of an argument that is a number, which Miri's strict
    /// provenance forbids.
    #[cfg(miri)]
    #[expect(
        unsafe_code,
        reason = "the system call, with no wrapper that Miri takes"
    )]
    pub(crate) fn wake_all(word: &AtomicU32) {
        // SAFETY: the call reads no memory; the address only names a queue of sleepers.
        unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAKE, i32::MAX) };
    }
}

#[cfg(not(loom))]
mod event {
    use std::io;
    use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

    use rustix::event::EventfdFlags;

    /// A descriptor that is readable from [`Event::set`] to [`Event::clear`].
    pub(crate) struct Event(OwnedFd);

    impl Event {
        pub(crate) fn new() -> io::Result<Self> {
            let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
            Ok(Self(rustix::event::eventfd(0, flags)?))
        }

        pub(crate) fn set(&self) {
            // Fails only when the counter is full, which is readable as well.
            let _ = rustix::io::write(&self.0, &1_u64.to_ne_bytes());
        }

        pub(crate) fn clear(&self) {
            // That it is clear already is no news.
            let _ = rustix::io::read(&self.0, &mut [0; 8]);
        }
    }

    impl AsFd for Event {
        fn as_fd(&self) -> BorrowedFd<'_> {
            self.0.as_fd()
        }
    }
}
