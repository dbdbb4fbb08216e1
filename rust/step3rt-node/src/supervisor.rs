//! Speaks to the service manager (`sd_notify`). Silent where there is none.
//!
//! It never feeds the watchdog by itself: only the thread of the instance's loop does, so that a stuck
//! loop is seen.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use sd_notify::NotifyState;

/// How much more time each sign of progress buys while weights are loading. Longer than reading
/// one shard takes on a slow disk.
const LOADING_EXTENSION: Duration = Duration::from_mins(2);

/// How often a start that waits for the coordinator asks for more time.
const WAITING_INTERVAL: Duration = Duration::from_secs(30);

/// Whether the service manager knows this process as started: its watchdog counts from then on,
/// through all later sessions.
static HAS_STARTED: AtomicBool = AtomicBool::new(false);

/// What the service manager was told, and how often it wants to hear.
#[derive(Debug)]
pub struct Supervisor {
    feed_interval: Option<Duration>,
    last_fed: Option<Instant>,
    last_extended: Option<Instant>,
    is_loading: bool,
}

impl Supervisor {
    /// Reads the service manager's wishes from the environment.
    pub fn from_environment() -> Self {
        Self {
            // Half of the limit is what sd_watchdog_enabled(3) recommends.
            feed_interval: sd_notify::watchdog_enabled().map(|limit| limit / 2),
            last_fed: None,
            last_extended: None,
            is_loading: true,
        }
    }

    /// Shows `text`; while loading it also extends the start time-out.
    pub fn status(&self, text: &str) {
        // A line break would end the assignment, and what follows would be read as another one.
        let line = text.replace(['\n', '\r'], " ");
        if self.is_loading {
            let extension_us = u32::try_from(LOADING_EXTENSION.as_micros()).unwrap_or(u32::MAX);
            tell(&[
                NotifyState::Status(&line),
                NotifyState::ExtendTimeoutUsec(extension_us),
            ]);
        } else {
            tell(&[NotifyState::Status(&line)]);
        }
    }

    /// At `now` the instance still looks for its coordinator, shown as `text`. That may take longer
    /// than a start has, and than the watchdog allows an instance that keeps its weights meanwhile.
    pub fn wait(&mut self, now: Instant, text: &str) {
        if self
            .last_extended
            .is_none_or(|last| now - last >= WAITING_INTERVAL)
        {
            self.last_extended = Some(now);
            self.status(text);
        }
        self.feed(now);
    }

    /// Start-up is over.
    pub fn ready(&mut self) {
        self.is_loading = false;
        HAS_STARTED.store(true, Ordering::Relaxed);
        tell(&[NotifyState::Ready, NotifyState::Status("ready")]);
    }

    /// The instance's loop came round at `now`, or what it waits for between two sessions did.
    pub fn feed(&mut self, now: Instant) {
        let Some(interval) = self.feed_interval else {
            return;
        };
        if !HAS_STARTED.load(Ordering::Relaxed) {
            return;
        }
        if self.last_fed.is_none_or(|last| now - last >= interval) {
            self.last_fed = Some(now);
            tell(&[NotifyState::Watchdog]);
        }
    }

    /// The instance finishes what is in flight and ends.
    pub fn stopping(&self) {
        tell(&[NotifyState::Stopping, NotifyState::Status("draining")]);
    }
}

/// A service manager that does not listen must not stop an instance.
fn tell(state: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        tracing::debug!(%error, "the service manager could not be told");
    }
}
