//! `crate::sync` for models: loom's types, a futex of loom's locks, a clock that stands still.
//!
//! Loom takes a `SeqCst` access for an acquire or release, and a `SeqCst` fence for what it is. So a
//! `SeqCst` access is given a fence here: before a load, after a store or read-modify-write. That is
//! how processors without such accesses are made to do them, and so at least as strong as the
//! language promises; where code relies on more than that, on what an access does for its neighbours, a
//! model would not notice.

use std::cell::Cell;
use std::mem::ManuallyDrop;
use std::ops::Deref;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::event::EventfdFlags;

pub(crate) use loom::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
pub(crate) use loom::sync::{Mutex, MutexGuard};

use super::words;

/// What may be taken away from the code, to see a model fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Weakness {
    None,
    /// Release stores are relaxed.
    NoRelease,
    /// Acquire loads are relaxed.
    NoAcquire,
    /// `SeqCst` accesses and fences are acquire and release.
    NoSeqCst,
    /// The futex sleeps whatever the word says.
    NoCompare,
}

thread_local! {
    /// Of the models that this thread checks; a model's threads all run on it.
    static WEAKNESS: Cell<Weakness> = const { Cell::new(Weakness::None) };
}

#[cfg(test)]
pub(crate) fn weaken(weakness: Weakness) {
    WEAKNESS.set(weakness);
}

fn is_weakened(weakness: Weakness) -> bool {
    WEAKNESS.get() == weakness
}

fn for_load(ordering: Ordering) -> Ordering {
    match ordering {
        Ordering::Acquire if is_weakened(Weakness::NoAcquire) => Ordering::Relaxed,
        Ordering::SeqCst => Ordering::Acquire,
        ordering => ordering,
    }
}

fn for_store(ordering: Ordering) -> Ordering {
    match ordering {
        Ordering::Release if is_weakened(Weakness::NoRelease) => Ordering::Relaxed,
        Ordering::SeqCst => Ordering::Release,
        ordering => ordering,
    }
}

fn for_update(ordering: Ordering) -> Ordering {
    match ordering {
        Ordering::SeqCst => Ordering::AcqRel,
        ordering => ordering,
    }
}

fn fence_if_seq_cst(ordering: Ordering) {
    if ordering == Ordering::SeqCst && !is_weakened(Weakness::NoSeqCst) {
        loom::sync::atomic::fence(ordering);
    }
}

pub(crate) fn fence(ordering: Ordering) {
    match ordering {
        Ordering::SeqCst if is_weakened(Weakness::NoSeqCst) => {
            loom::sync::atomic::fence(Ordering::AcqRel);
        }
        ordering => loom::sync::atomic::fence(ordering),
    }
}

/// Loom's `Arc`, but not counted down once the model has failed: loom takes no more operations then.
#[derive(Debug)]
pub(crate) struct Arc<T>(ManuallyDrop<loom::sync::Arc<T>>);

impl<T> Arc<T> {
    pub(crate) fn new(value: T) -> Self {
        Self(ManuallyDrop::new(loom::sync::Arc::new(value)))
    }
}

impl<T> Clone for Arc<T> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<T> Deref for Arc<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.0
    }
}

impl<T> Drop for Arc<T> {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            // SAFETY: dropped here and nowhere else, and not used after.
            unsafe { ManuallyDrop::drop(&mut self.0) };
        }
    }
}

macro_rules! atomic {
    ($name:ident, $value:ty) => {
        /// A word of its own or, by `from_ptr`, of a mapping.
        #[derive(Debug, Default)]
        #[repr(transparent)]
        pub(crate) struct $name(loom::sync::atomic::AtomicU64);

        #[allow(dead_code, reason = "each width needs some of them")]
        #[allow(
            clippy::cast_possible_truncation,
            clippy::unnecessary_cast,
            reason = "a word of eight bytes stands for a narrower one, which wraps"
        )]
        impl $name {
            #[track_caller]
            pub(crate) fn new(value: $value) -> Self {
                Self(loom::sync::atomic::AtomicU64::new(value.into()))
            }

            /// # Safety
            ///
            /// None needed: what is not mapped is a panic. As for the type that it stands for.
            pub(crate) unsafe fn from_ptr<'a>(pointer: *mut $value) -> &'a Self {
                let word: *const loom::sync::atomic::AtomicU64 = words::at(pointer.cast());
                // SAFETY: a word is there until its mapping is gone, which the models' `words`
                // checks; `repr(transparent)` makes the two types one.
                unsafe { &*word.cast() }
            }

            #[track_caller]
            pub(crate) fn load(&self, ordering: Ordering) -> $value {
                fence_if_seq_cst(ordering);
                self.0.load(for_load(ordering)) as $value
            }

            #[track_caller]
            pub(crate) fn store(&self, value: $value, ordering: Ordering) {
                self.0.store(value.into(), for_store(ordering));
                fence_if_seq_cst(ordering);
            }

            #[track_caller]
            pub(crate) fn fetch_add(&self, value: $value, ordering: Ordering) -> $value {
                let before = self.0.fetch_add(value.into(), for_update(ordering));
                fence_if_seq_cst(ordering);
                before as $value
            }

            #[track_caller]
            pub(crate) fn fetch_sub(&self, value: $value, ordering: Ordering) -> $value {
                let before = self.0.fetch_sub(value.into(), for_update(ordering));
                fence_if_seq_cst(ordering);
                before as $value
            }
        }
    };
}

atomic!(AtomicU32, u32);
atomic!(AtomicU64, u64);

/// Nothing: busy waits are bounded, and loom would take a yield for a promise that all others run.
pub(crate) fn spin_loop() {}

/// A moment, always a second ago: a busy wait of microseconds is over at its first look at the clock,
/// and a sleep of more than a second never is.
#[derive(Clone, Copy)]
pub(crate) struct Instant;

impl Instant {
    pub(crate) fn now() -> Self {
        Self
    }

    #[expect(clippy::unused_self, reason = "the real one needs it")]
    pub(crate) fn elapsed(self) -> Duration {
        Duration::from_secs(1)
    }
}

/// A value that is set once. Like the real one it publishes with release, and who finds it set has
/// acquired it.
pub(crate) struct OnceLock<T> {
    value: std::sync::OnceLock<T>,
    is_set: AtomicBool,
    setting: Mutex<()>,
}

impl<T> OnceLock<T> {
    pub(crate) fn new() -> Self {
        Self {
            value: std::sync::OnceLock::new(),
            is_set: AtomicBool::new(false),
            setting: Mutex::new(()),
        }
    }

    pub(crate) fn get(&self) -> Option<&T> {
        let is_set = self.is_set.load(for_load(Ordering::Acquire));
        is_set.then(|| self.value.get().expect("set before it says so"))
    }

    pub(crate) fn set(&self, value: T) -> Result<(), T> {
        let _setting = self.setting.lock().expect("no panic while setting");
        self.value.set(value)?;
        self.is_set.store(true, for_store(Ordering::Release));
        Ok(())
    }
}

impl<T> Default for OnceLock<T> {
    fn default() -> Self {
        Self::new()
    }
}

/// The kernel's futex, of loom's lock and condition variable: sleepers and wakers of a word meet
/// under a lock, under which the sleeper compares the word; both pass a full barrier first, as
/// `kernel/futex/waitwake.c` says of `hb_waiters_inc` and `hb_waiters_pending`.
///
/// Timeouts never come: a model must make progress by wake-ups alone.
pub(crate) mod futex {
    use std::collections::BTreeMap;
    use std::time::Duration;

    use loom::sync::{Condvar, Mutex};

    use super::{AtomicU32, Ordering, Weakness, is_weakened};

    loom::lazy_static! {
        /// Wake-ups so far of each word. One lock for all words, as in the kernel two may share one;
        /// a wake-up of another word wakes nobody.
        static ref WAKE_UPS: Mutex<BTreeMap<usize, u64>> = Mutex::new(BTreeMap::new());
        static ref SLEEP: Condvar = Condvar::new();
    }

    pub(crate) fn wait(word: &AtomicU32, expected: u32, _timeout: Duration) {
        loom::sync::atomic::fence(Ordering::SeqCst);
        let of_word = |wake_ups: &BTreeMap<usize, u64>| {
            let at = std::ptr::from_ref(word).addr();
            wake_ups.get(&at).copied().unwrap_or(0)
        };
        let mut wake_ups = WAKE_UPS.lock().expect("no panic under the lock");
        if word.load(Ordering::Relaxed) != expected && !is_weakened(Weakness::NoCompare) {
            return;
        }
        let before = of_word(&wake_ups);
        while of_word(&wake_ups) == before {
            wake_ups = SLEEP.wait(wake_ups).expect("no panic under the lock");
        }
    }

    pub(crate) fn wake_all(word: &AtomicU32) {
        loom::sync::atomic::fence(Ordering::SeqCst);
        let mut wake_ups = WAKE_UPS.lock().expect("no panic under the lock");
        let at = std::ptr::from_ref(word).addr();
        *wake_ups.entry(at).or_default() += 1;
        SLEEP.notify_all();
    }
}

/// The kernel's eventfd: a flag under a lock.
pub(crate) struct Event {
    is_set: Mutex<bool>,
    changed: loom::sync::Condvar,
    /// For code that is compiled but not modelled.
    fd: OwnedFd,
}

impl Event {
    pub(crate) fn new() -> std::io::Result<Self> {
        Ok(Self {
            is_set: Mutex::new(false),
            changed: loom::sync::Condvar::new(),
            fd: rustix::event::eventfd(0, EventfdFlags::CLOEXEC)?,
        })
    }

    pub(crate) fn set(&self) {
        *self.is_set.lock().expect("no panic under the lock") = true;
        self.changed.notify_all();
    }

    pub(crate) fn clear(&self) {
        *self.is_set.lock().expect("no panic under the lock") = false;
    }

    /// What `poll` does with the descriptor: sleeps until it is readable.
    #[cfg(test)]
    pub(crate) fn wait(&self) {
        let mut is_set = self.is_set.lock().expect("no panic under the lock");
        while !*is_set {
            is_set = self.changed.wait(is_set).expect("no panic under the lock");
        }
    }
}

impl AsFd for Event {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
