//! The coordinator's one clock: nanoseconds since it started.
//!
//! It never goes back, and it is read by the drive loop and the services only.

use std::time::{Duration, Instant};

use step3rt_core::ids::TimeNs;

/// Maps the machine's monotonic clock to [`TimeNs`].
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    origin: Instant,
}

impl Clock {
    /// A clock that starts now.
    pub fn start() -> Self {
        Self {
            origin: Instant::now(),
        }
    }

    /// The time.
    pub fn now(&self) -> TimeNs {
        let elapsed = self.origin.elapsed().as_nanos();
        TimeNs(u64::try_from(elapsed).unwrap_or(u64::MAX))
    }

    /// `time` as the runtime's timers want it.
    pub fn instant(&self, time: TimeNs) -> tokio::time::Instant {
        (self.origin + Duration::from_nanos(time.0)).into()
    }
}
