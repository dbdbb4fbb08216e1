//! How soon a peer that is gone is noticed, as numbers of the verbs.
//!
//! The goal is one `Down` within a second of a peer's death, whatever died:
//!
//! ```text
//!   the process      the kernel closes its control socket: milliseconds
//!   host or cable,   a device repeats a packet that is not acknowledged after 4.096 us * 2^12
//!   frame in flight  = 16.8 ms (the specification allows it up to four times that: 67 ms), and gives
//!                    up after the first try and 6 repetitions: 7 * 16.8 = 117 ms to 7 * 67 = 470 ms
//!   host or cable,   nothing is in flight, so each end writes nothing (0 bytes) to the other every
//!   idle             250 ms: at most 250 + 470 = 720 ms
//! ```
//! A count of 7 would be the largest, and is not used: Soft-RoCE takes it for "for ever".

use std::time::Duration;

/// Local acknowledgement timeout of a queue pair: 4.096 µs · 2^code.
pub(crate) const ACK_TIMEOUT_CODE: u8 = 12;

/// Repetitions of a packet that is not acknowledged.
pub(crate) const RETRY_COUNT: u8 = 6;

/// Repetitions when the receiver has no receive posted: none, because by the alternation of a lane
/// it always has one, so a peer without one has broken the protocol.
pub(crate) const RNR_RETRY_COUNT: u8 = 0;

/// Pause between two writes of nothing.
pub(crate) const PROBE_INTERVAL: Duration = Duration::from_millis(250);

/// How long a device may take to report what was flushed out of a failed queue pair, and how long a
/// link that is closed by its owner waits for its last frames: longer than every repetition takes.
pub(crate) const DRAIN_TIMEOUT: Duration = Duration::from_secs(1);

/// How long a failed write waits for the peer's control socket to say that the peer's process ended,
/// which is the better reason.
pub(crate) const CLOSING_GRACE: Duration = Duration::from_millis(20);

/// The slowest that a device is believed to be at work; a frame that takes longer is stuck. Of a
/// software device in an emulated processor, which does five times that.
pub(crate) const SLOWEST_BYTES_PER_S: usize = 16 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_silent_peer_is_noticed_within_a_second() {
        // The specification's worst case, four times the nominal timeout, for each try.
        let tries = u32::from(RETRY_COUNT) + 1;
        let worst_us = 4.096 * f64::from(1_u32 << ACK_TIMEOUT_CODE) * 4.0 * f64::from(tries);
        let worst = PROBE_INTERVAL + Duration::from_secs_f64(worst_us / 1e6);
        assert!(worst < Duration::from_millis(750), "{worst:?}");
        const { assert!(RETRY_COUNT < 7, "7 means for ever on Soft-RoCE") };
    }
}
