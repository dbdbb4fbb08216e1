//! The TCP sockets of an endpoint, and who moves their bytes: whoever waits for news does it itself,
//! and while nobody waits, one thread does.
//!
//! It knows nothing of frames, and no call but a wait blocks.
//!
//! A thread that only reads would have to wake the waiter for each frame, which costs as much as a
//! short frame takes. So the waiter sleeps where the sockets are, and the thread gets them while the
//! owner computes: frames of other lanes go on moving then, and a hang-up is seen.
//!
//! ```text
//!   sockets, wake ──▶ ready ◀── a waiter sleeps here           (epoll in epoll: giving all sockets to
//!                       │                                       the thread and taking them back is
//!              stop ──▶ unattended ◀── the thread sleeps here   one system call, however many)
//!                    (`ready` counts only while nobody waits)
//! ```
//! No end depends on the other's owner: bytes move in both directions at either end, whether its owner
//! waits or not, so two ends that send more than the sockets hold do not block each other.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use rustix::event::EventfdFlags;
use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};
use rustix::io::Errno;

use crate::sync::{self, AtomicBool, AtomicUsize, Mutex, MutexGuard, Ordering};
use crate::watcher::timespec;

/// The thread only makes system calls; the default of 2 MiB would be waste.
const THREAD_STACK_BYTES: usize = 256 * 1024;

/// Sockets that are looked at between two looks at the doorbell.
const MAX_READY: usize = 16;

/// What no place in the table has.
const WAKE: u64 = u64::MAX;

/// How long the thread rests after the kernel could not tell it what is ready.
const PAUSE_AFTER_ERROR: Duration = Duration::from_millis(100);

/// Moves the bytes of one socket.
pub(crate) trait Transfer: Send + Sync {
    /// Moves what can be moved at once, for a bounded time. By several threads at a time: then one
    /// does it, and the others return at once.
    fn advance(&self);
}

/// A socket's place among those of its endpoint.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place(usize);

pub(crate) struct Sockets {
    ready: OwnedFd,
    unattended: OwnedFd,
    /// Wakes who sleeps at `ready`.
    wake: sync::Event,
    /// Ends the thread.
    stop: OwnedFd,
    is_stopping: AtomicBool,
    has_thread: AtomicBool,
    transfers: Mutex<Vec<Option<Arc<dyn Transfer>>>>,
    num_transfers: AtomicUsize,
    is_attended: AtomicBool,
    is_asleep: AtomicBool,
}

impl Sockets {
    pub(crate) fn new() -> io::Result<Self> {
        let event = || rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        let sockets = Self {
            ready: epoll::create(CreateFlags::CLOEXEC)?,
            unattended: epoll::create(CreateFlags::CLOEXEC)?,
            wake: sync::Event::new()?,
            stop: event()?,
            is_stopping: AtomicBool::new(false),
            has_thread: AtomicBool::new(false),
            transfers: Mutex::default(),
            num_transfers: AtomicUsize::new(0),
            is_attended: AtomicBool::new(false),
            is_asleep: AtomicBool::new(false),
        };
        if cfg!(miri) {
            // Which has edge-triggered epolls only. No test that it runs sleeps at a socket.
            return Ok(sockets);
        }
        let (wake, any) = (EventData::new_u64(WAKE), EventData::new_u64(0));
        epoll::add(&sockets.ready, &sockets.wake, wake, EventFlags::IN)?;
        epoll::add(&sockets.unattended, &sockets.ready, any, EventFlags::IN)?;
        epoll::add(&sockets.unattended, &sockets.stop, any, EventFlags::IN)?;
        Ok(sockets)
    }

    /// Whether there is nothing to move.
    pub(crate) fn is_empty(&self) -> bool {
        self.num_transfers.load(Ordering::SeqCst) == 0
    }

    /// Has the bytes of a socket moved from now on, until [`Sockets::remove`].
    pub(crate) fn add(
        self: &Arc<Self>,
        socket: impl AsFd,
        transfer: Arc<dyn Transfer>,
    ) -> io::Result<Place> {
        self.ensure_thread()?;
        let mut transfers = lock(&self.transfers);
        let free = transfers.iter().position(Option::is_none);
        let at = free.unwrap_or(transfers.len());
        let place = EventData::new_u64(at as u64);
        epoll::add(&self.ready, socket, place, EventFlags::IN)?;
        if free.is_none() {
            transfers.push(None);
        }
        transfers[at] = Some(transfer);
        drop(transfers);
        self.num_transfers.fetch_add(1, Ordering::SeqCst);
        Ok(Place(at))
    }

    /// Whether the transfer is called also when its socket takes bytes again.
    pub(crate) fn set_wants_room(
        &self,
        socket: impl AsFd,
        Place(at): Place,
        wants_room: bool,
    ) -> io::Result<()> {
        let mut flags = EventFlags::IN;
        flags.set(EventFlags::OUT, wants_room);
        epoll::modify(&self.ready, socket, EventData::new_u64(at as u64), flags)?;
        Ok(())
    }

    /// Has nothing called for a socket any more; its place stays taken. For one that has hung up,
    /// which is ready for ever.
    pub(crate) fn silence(&self, socket: impl AsFd) {
        // Fails when it was silenced before.
        let _ = epoll::delete(&self.ready, socket);
    }

    /// Forgets a socket. A thread that is moving its bytes may do so a moment longer.
    pub(crate) fn remove(&self, socket: impl AsFd, Place(at): Place) {
        self.silence(socket);
        // Dropped without the lock: it may be the last owner.
        let transfer = lock(&self.transfers)[at].take();
        self.num_transfers.fetch_sub(1, Ordering::SeqCst);
        drop(transfer);
    }

    /// Takes the sockets from the thread until the result is dropped. None when somebody else has
    /// done so.
    pub(crate) fn attend(&self) -> Option<Attendance<'_>> {
        if self.is_attended.swap(true, Ordering::SeqCst) {
            return None;
        }
        self.set_unattended(false);
        Some(Attendance { sockets: self })
    }

    /// Wakes who sleeps in [`Attendance::sleep`], if anybody does.
    pub(crate) fn wake_sleeper(&self) {
        if self.is_asleep.load(Ordering::SeqCst) {
            self.wake.set();
        }
    }

    /// Ends the thread. Bytes then move only while somebody waits.
    pub(crate) fn stop(&self) {
        self.is_stopping.store(true, Ordering::Release);
        signal(&self.stop);
    }

    /// What is ready, within `timeout`.
    #[cfg(not(loom))]
    fn wait_for_bytes_or_news<'a>(
        &self,
        events: &'a mut [MaybeUninit<Event>],
        timeout: Duration,
    ) -> &'a [Event] {
        wait_at(&self.ready, events, Some(timeout))
    }

    /// In models no bytes come, so that only news end a sleep.
    #[cfg(loom)]
    fn wait_for_bytes_or_news<'a>(
        &self,
        events: &'a mut [MaybeUninit<Event>],
        timeout: Duration,
    ) -> &'a [Event] {
        if timeout.is_zero() {
            return &[];
        }
        self.wake.wait();
        let data = EventData::new_u64(WAKE);
        let flags = EventFlags::IN;
        std::slice::from_ref(events[0].write(Event { flags, data }))
    }

    fn set_unattended(&self, is_unattended: bool) {
        let mut flags = EventFlags::empty();
        flags.set(EventFlags::IN, is_unattended);
        let any = EventData::new_u64(0);
        // Cannot fail: `ready` was added when this was made. If it did, both would move bytes.
        if let Err(error) = epoll::modify(&self.unattended, &self.ready, any, flags) {
            tracing::error!(%error, "the sockets' thread cannot be told of a wait");
        }
    }

    fn ensure_thread(self: &Arc<Self>) -> io::Result<()> {
        if self.has_thread.swap(true, Ordering::SeqCst) {
            return Ok(());
        }
        if cfg!(loom) {
            // A model has threads of its own.
            return Ok(());
        }
        let sockets = Arc::clone(self);
        let thread = std::thread::Builder::new()
            .name("fabric-sockets".to_owned())
            .stack_size(THREAD_STACK_BYTES);
        let spawned = thread.spawn(move || sockets.run());
        self.has_thread.store(spawned.is_ok(), Ordering::SeqCst);
        spawned.map(drop)
    }

    fn run(&self) {
        while !self.is_stopping.load(Ordering::Acquire) {
            wait_at(&self.unattended, &mut [MaybeUninit::uninit()], None);
            // Somebody who has come to wait in the meantime moves what is ready.
            let is_attended = || self.is_attended.load(Ordering::SeqCst);
            if !is_attended() {
                let mut events = [MaybeUninit::uninit(); MAX_READY];
                let ready = wait_at(&self.ready, &mut events, Some(Duration::ZERO));
                self.advance(ready, is_attended);
            }
        }
    }

    /// Moves the bytes of what is ready, until `is_enough`; whether there was anything to move.
    fn advance(&self, ready: &[Event], is_enough: impl Fn() -> bool) -> bool {
        let mut has_moved = false;
        for event in ready {
            let at = event.data.u64();
            if at == WAKE {
                // Says only "look at the counter".
                self.wake.clear();
                continue;
            }
            let at = usize::try_from(at).expect("a place in the table");
            // None when it was removed a moment ago.
            let transfer = lock(&self.transfers)[at].clone();
            if let Some(transfer) = transfer {
                transfer.advance();
                has_moved = true;
            }
            if is_enough() {
                break;
            }
        }
        has_moved
    }
}

/// The sockets in the hands of somebody who waits.
pub(crate) struct Attendance<'a> {
    sockets: &'a Sockets,
}

impl Attendance<'_> {
    /// Moves the bytes of what is ready until there is news; whether there was anything to move.
    pub(crate) fn advance(&self, has_news: impl Fn() -> bool) -> bool {
        let mut events = [MaybeUninit::uninit(); MAX_READY];
        let ready = wait_at(&self.sockets.ready, &mut events, Some(Duration::ZERO));
        self.sockets.advance(ready, has_news)
    }

    /// The same after sleeping until there is something to move, or news, or `timeout` has passed.
    pub(crate) fn sleep(&self, timeout: Duration, has_news: impl Fn() -> bool) -> bool {
        let is_asleep = &self.sockets.is_asleep;
        // Said before looking for news: who makes some after that look sees the sleeper.
        is_asleep.store(true, Ordering::SeqCst);
        let timeout = if has_news() { Duration::ZERO } else { timeout };
        let mut events = [MaybeUninit::uninit(); MAX_READY];
        let ready = self.sockets.wait_for_bytes_or_news(&mut events, timeout);
        // Before a byte is moved: that makes news, and nobody need be woken for them.
        is_asleep.store(false, Ordering::SeqCst);
        self.sockets.advance(ready, has_news)
    }
}

impl Drop for Attendance<'_> {
    fn drop(&mut self) {
        self.sockets.set_unattended(true);
        // After that, so that who attends next takes the sockets from the thread again.
        self.sockets.is_attended.store(false, Ordering::SeqCst);
    }
}

/// What is ready at an epoll, or gets ready within `timeout`; nothing also after a signal.
fn wait_at<'a>(
    epoll: &OwnedFd,
    events: &'a mut [MaybeUninit<Event>],
    timeout: Option<Duration>,
) -> &'a [Event] {
    // In whole milliseconds, rounded up: finer times need a younger kernel. At most a day, so that
    // they fit; a waiter whose time has not passed sleeps on.
    let timeout = timeout.map(|timeout| {
        let whole = timeout
            .min(Duration::from_hours(24))
            .as_nanos()
            .div_ceil(1_000_000);
        timespec(Duration::from_millis(
            u64::try_from(whole).expect("a day of milliseconds fits"),
        ))
    });
    match epoll::wait(epoll, events, timeout.as_ref()) {
        Ok((ready, _)) => ready,
        Err(Errno::INTR) => &[],
        Err(error) => {
            tracing::error!(%error, "it cannot be known which sockets are ready");
            std::thread::sleep(PAUSE_AFTER_ERROR);
            &[]
        }
    }
}

fn signal(event: &OwnedFd) {
    // Fails only when the counter is full, which signals as well.
    let _ = rustix::io::write(event, &1_u64.to_ne_bytes());
}

/// A panic elsewhere does not make these values wrong: each is changed in one step.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
