//! Numbers the incarnations of links, so that what memory keeps of an earlier one can be told apart.
//!
//! The connecting end proposes a number that it has not used, the accepting end answers with that
//! one or a higher one that it has not used either. So the number is the same at both ends, and above
//! those of all links that either process had before.

use std::fmt;
use std::sync::atomic::{AtomicU32, Ordering};

/// Highest number. Flags in device memory keep 24 bits of it; a link a second lasts 194 days.
pub const MAX_LINK_EPOCH: u32 = (1 << 24) - 1;

/// One incarnation of a link, from 1; equal at both ends. 0 is a link that no handshake made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LinkEpoch(pub u32);

impl fmt::Display for LinkEpoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The highest number that this process has proposed or agreed on. Of the process and not of an
/// endpoint: device memory that peers write outlives endpoints, as when a session is lost.
static LAST: AtomicU32 = AtomicU32::new(0);

/// A number for a link that is to be made. `None` when there is none left.
pub(crate) fn propose() -> Option<LinkEpoch> {
    above(&LAST, 0)
}

/// The number of a link for which the peer proposed one. `None` when there is none left.
pub(crate) fn agree(proposed: LinkEpoch) -> Option<LinkEpoch> {
    above(&LAST, proposed.0)
}

/// Takes note of what the peer answered to a proposal.
pub(crate) fn note(agreed: LinkEpoch) {
    LAST.fetch_max(agreed.0, Ordering::Relaxed);
}

/// Forgets all numbers: a fuzzer makes more links than there are numbers.
#[cfg(fuzzing)]
pub(crate) fn forget() {
    LAST.store(0, Ordering::Relaxed);
}

/// Takes the lowest unused number that is not below `least`.
fn above(last: &AtomicU32, least: u32) -> Option<LinkEpoch> {
    let next = |last: u32| Some((last + 1).max(least)).filter(|next| *next <= MAX_LINK_EPOCH);
    let before = last.fetch_update(Ordering::Relaxed, Ordering::Relaxed, next);
    before.ok().and_then(next).map(LinkEpoch)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_is_used_once_and_not_below_what_was_proposed() {
        let last = AtomicU32::new(0);
        assert_eq!(above(&last, 0), Some(LinkEpoch(1)));
        assert_eq!(above(&last, 0), Some(LinkEpoch(2)));
        assert_eq!(above(&last, 9), Some(LinkEpoch(9)));
        assert_eq!(above(&last, 9), Some(LinkEpoch(10)));
    }

    #[test]
    fn numbers_end_where_flags_end() {
        let last = AtomicU32::new(MAX_LINK_EPOCH - 1);
        assert_eq!(above(&last, 0), Some(LinkEpoch(MAX_LINK_EPOCH)));
        assert_eq!(above(&last, 0), None);
        assert_eq!(above(&last, MAX_LINK_EPOCH), None);
    }

    #[test]
    fn what_the_peer_answered_is_not_proposed_again() {
        let proposed = propose().unwrap();
        let agreed = LinkEpoch(proposed.0 + 100);
        note(agreed);
        assert!(propose().unwrap() > agreed);
    }
}
