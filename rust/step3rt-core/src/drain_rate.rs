//! Owns how fast requests get places while others wait, and so when a refused client should ask
//! again.
//!
//! It never refuses anybody.

use crate::ids::TimeNs;

/// The least and the most that a client is told to wait when the queue is full.
const RETRY_MS: (u64, u64) = (100, 30_000);
/// Time with a line over which the rate is measured: past it, all that is known counts half.
const WINDOW_NS: f64 = 30e9;

/// See the module's documentation.
#[derive(Debug, Default)]
pub(crate) struct DrainRate {
    num_served: f64,
    /// While somebody waited.
    busy_ns: f64,
    /// Up to when `busy_ns` counts, if somebody waits.
    counted_to: Option<TimeNs>,
    /// When the client that was refused last was told to come back.
    last_turn: TimeNs,
}

impl DrainRate {
    /// Notes that `num_served` requests got all their places now, and whether others still wait.
    pub(crate) fn note(&mut self, now: TimeNs, num_served: usize, is_waiting: bool) {
        if let Some(counted_to) = self.counted_to {
            self.busy_ns += to_f64(now.since_ns(counted_to));
            self.num_served += to_f64(num_served as u64);
            if self.busy_ns > WINDOW_NS {
                self.busy_ns /= 2.0;
                self.num_served /= 2.0;
            }
        }
        self.counted_to = is_waiting.then_some(now);
    }

    /// After how many milliseconds a client that is refused now should ask again: every refused
    /// client one turn after the one before it, so that they come back as fast as places become
    /// free and not all at once; but none later than all that wait now need. Where nobody was
    /// served yet, the line is as slow as its head has found it.
    pub(crate) fn retry_after_ms(
        &mut self,
        now: TimeNs,
        num_waiting: usize,
        head_waited_ns: u64,
    ) -> u64 {
        let waiting = to_f64(num_waiting as u64);
        let after_ns = if self.num_served > 0.0 {
            let turn_ns = self.busy_ns / self.num_served;
            let queued_ns = to_f64(self.last_turn.since_ns(now));
            let after_ns = whole((queued_ns + turn_ns).min(turn_ns * waiting));
            self.last_turn = TimeNs(now.0.saturating_add(after_ns));
            after_ns
        } else {
            head_waited_ns
        };
        (after_ns / 1_000_000).clamp(RETRY_MS.0, RETRY_MS.1)
    }
}

#[expect(
    clippy::cast_precision_loss,
    reason = "a rate needs no more than 52 bits of precision"
)]
fn to_f64(count: u64) -> f64 {
    count as f64
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "positive, and a cast saturates"
)]
fn whole(value: f64) -> u64 {
    value as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(ms: u64) -> TimeNs {
        TimeNs(0).plus_ms(ms)
    }

    /// Four requests a second for ten seconds.
    fn measured() -> DrainRate {
        let mut rate = DrainRate::default();
        for turn in 0..=40 {
            rate.note(ms(turn * 250), 1, true);
        }
        rate
    }

    #[test]
    fn refused_clients_come_back_one_turn_after_another() {
        let mut rate = measured();
        let hints = [0; 3].map(|_| rate.retry_after_ms(ms(10_000), 100, 0));
        assert_eq!(hints, [250, 500, 750]);
        let later = rate.retry_after_ms(ms(10_500), 100, 0);
        assert_eq!(later, 500, "two turns have passed since");
        let much_later = rate.retry_after_ms(ms(60_000), 100, 0);
        assert_eq!(much_later, 250);
    }

    #[test]
    fn nobody_is_sent_away_for_longer_than_the_line_takes() {
        let mut rate = measured();
        let hints = [0; 6].map(|_| rate.retry_after_ms(ms(10_000), 4, 0));
        assert_eq!(hints, [250, 500, 750, 1_000, 1_000, 1_000]);
    }

    #[test]
    fn time_without_a_line_says_nothing() {
        let mut rate = measured();
        rate.note(ms(10_250), 1, false);
        rate.note(ms(90_000), 5, true); // got places at once
        rate.note(ms(90_250), 1, true);
        assert_eq!(rate.retry_after_ms(ms(90_250), 100, 0), 250);
    }

    #[test]
    fn a_change_of_the_rate_is_followed() {
        let mut rate = measured();
        for second in 11..120 {
            rate.note(ms(second * 1_000 + 7), 1, true);
        }
        let hint = rate.retry_after_ms(ms(119_000), 100, 0);
        assert!((850..=1_000).contains(&hint), "{hint} ms");
    }

    #[test]
    fn hints_are_bounded_and_the_heads_wait_stands_in_for_a_rate() {
        let mut rate = DrainRate::default();
        assert_eq!(rate.retry_after_ms(ms(0), 9, 0), 100);
        assert_eq!(rate.retry_after_ms(ms(0), 9, 700_000_000), 700);
        assert_eq!(rate.retry_after_ms(ms(0), 9, u64::MAX), 30_000);
        rate.note(ms(0), 0, true);
        rate.note(TimeNs(u64::MAX), 1, true);
        assert_eq!(rate.retry_after_ms(TimeNs(u64::MAX), 9, 0), 30_000);
    }
}
