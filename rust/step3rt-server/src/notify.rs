//! Tells the service manager how the coordinator is, over systemd's notification socket.
//!
//! The watchdog is fed by the drive loop and by nothing else: when the loop stands still, the
//! service manager must see it.

use std::time::{Duration, Instant};

use sd_notify::NotifyState;
use tracing::debug;

/// What the end takes once no request runs: instances are told, listeners close.
const AFTER_DRAINING: Duration = Duration::from_secs(15);

/// Speaks to the service manager; silent without one.
#[derive(Debug)]
pub struct Notifier {
    /// Half of what the unit allows, so that one late turn is forgiven.
    watchdog_interval: Option<Duration>,
    last_fed: Instant,
}

impl Notifier {
    /// A notifier for what the environment names (`NOTIFY_SOCKET`, `WATCHDOG_USEC`).
    pub fn from_env() -> Self {
        Self {
            watchdog_interval: sd_notify::watchdog_enabled().map(|period| period / 2),
            last_fed: Instant::now(),
        }
    }

    /// How often [`Self::feed_watchdog`] must be called.
    pub fn watchdog_interval(&self) -> Duration {
        self.watchdog_interval.unwrap_or(Duration::MAX)
    }

    /// Feeds the watchdog if it is due.
    pub fn feed_watchdog(&mut self) {
        if let Some(interval) = self.watchdog_interval
            && self.last_fed.elapsed() >= interval / 2
        {
            self.last_fed = Instant::now();
            send(&[NotifyState::Watchdog]);
        }
    }

    /// Shows `text` in the unit's status.
    pub fn status(&self, text: &str) {
        send(&[NotifyState::Status(text)]);
    }
}

/// Both listeners are bound.
pub fn ready() {
    send(&[NotifyState::Ready]);
}

/// Draining has begun and takes at most `drain_timeout`, which may be longer than the unit allows
/// for stopping.
pub fn stopping(drain_timeout: Duration) {
    let most = drain_timeout.saturating_add(AFTER_DRAINING);
    let extension_us = u32::try_from(most.as_micros()).unwrap_or(u32::MAX);
    send(&[
        NotifyState::Stopping,
        NotifyState::ExtendTimeoutUsec(extension_us),
    ]);
}

fn send(state: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        debug!(%error, "the service manager was not told");
    }
}
