//! A point in time as people read it. Knows UTC only.

use std::fmt;

use rustls::pki_types::UnixTime;

const SECONDS_PER_DAY: u64 = 86_400;

/// A second in UTC.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Date(u64);

impl Date {
    /// The second of `time`.
    pub(crate) fn of(time: UnixTime) -> Self {
        Self(time.as_secs())
    }

    /// Whole days from `now` to this date; 0 when it has passed.
    pub fn days_after(self, now: UnixTime) -> u64 {
        self.0.saturating_sub(now.as_secs()) / SECONDS_PER_DAY
    }
}

impl fmt::Display for Date {
    /// `2026-11-22 16:30:00 UTC`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (days, seconds) = (self.0 / SECONDS_PER_DAY, self.0 % SECONDS_PER_DAY);
        let (year, month, day) = civil(days);
        let (hour, minute, second) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
        write!(
            f,
            "{year:04}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02} UTC"
        )
    }
}

/// Year, month and day of a day counted from 1970-01-01. Years begin in March here, so that the leap
/// day is the last of its year; an era is the 400 years after which the calendar repeats.
fn civil(days_since_1970: u64) -> (u64, u64, u64) {
    const DAYS_TO_1970: u64 = 719_468; // from 0000-03-01
    const DAYS_PER_ERA: u64 = 146_097;
    let days = days_since_1970 + DAYS_TO_1970;
    let (era, day_of_era) = (days / DAYS_PER_ERA, days % DAYS_PER_ERA);
    let leap_days = day_of_era / 1460 - day_of_era / 36_524 + day_of_era / 146_096;
    let year_of_era = (day_of_era - leap_days) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = (month_from_march + 2) % 12 + 1;
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    (year, month, day)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn dates_are_those_of_the_calendar() {
        for (seconds, text) in [
            (0, "1970-01-01 00:00:00 UTC"),
            (951_782_399, "2000-02-28 23:59:59 UTC"),
            (951_782_400, "2000-02-29 00:00:00 UTC"),
            (951_868_800, "2000-03-01 00:00:00 UTC"),
            (1_795_365_000, "2026-11-22 16:30:00 UTC"),
            (4_107_542_400, "2100-03-01 00:00:00 UTC"),
        ] {
            let time = UnixTime::since_unix_epoch(Duration::from_secs(seconds));
            assert_eq!(Date::of(time).to_string(), text);
        }
    }

    #[test]
    fn days_are_counted_whole_and_never_below_zero() {
        let time = |seconds| UnixTime::since_unix_epoch(Duration::from_secs(seconds));
        let date = Date::of(time(10 * SECONDS_PER_DAY));
        assert_eq!(date.days_after(time(1)), 9);
        assert_eq!(date.days_after(time(20 * SECONDS_PER_DAY)), 0);
    }
}
