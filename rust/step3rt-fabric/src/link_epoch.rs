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

/// The numbers that a process has used: all up to the highest that it has proposed or agreed on.
pub(crate) struct UsedEpochs(AtomicU32);

/// Those of this process. Of the process and not of an endpoint: device memory that peers write outlives
/// endpoints, as when a session is lost.
pub(crate) static OF_PROCESS: UsedEpochs = UsedEpochs::up_to(0);

impl UsedEpochs {
    pub(crate) const fn up_to(last: u32) -> Self {
        Self(AtomicU32::new(last))
    }

    /// A number for a link that is to be made. `None` when there is none left.
    pub(crate) fn propose(&self) -> Option<LinkEpoch> {
        self.take_from(0)
    }

    /// The number of a link for which the peer proposed one. `None` when there is none left.
    pub(crate) fn agree(&self, proposed: LinkEpoch) -> Option<LinkEpoch> {
        self.take_from(proposed.0)
    }

    /// Takes note of what the peer answered to a proposal.
    pub(crate) fn note(&self, agreed: LinkEpoch) {
        self.0.fetch_max(agreed.0, Ordering::Relaxed);
    }

    /// Forgets all numbers: a fuzzer makes more links than there are numbers.
    #[cfg(fuzzing)]
    pub(crate) fn forget(&self) {
        self.0.store(0, Ordering::Relaxed);
    }

    /// Takes the lowest unused number that is not below `least`. There is no way back to those used.
    fn take_from(&self, least: u32) -> Option<LinkEpoch> {
        let next = |last: u32| Some((last + 1).max(least)).filter(|next| *next <= MAX_LINK_EPOCH);
        let before = self
            .0
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, next);
        before.ok().and_then(next).map(LinkEpoch)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_is_used_once_and_not_below_what_was_proposed() {
        let used = UsedEpochs::up_to(0);
        assert_eq!(used.propose(), Some(LinkEpoch(1)));
        assert_eq!(used.propose(), Some(LinkEpoch(2)));
        assert_eq!(used.agree(LinkEpoch(9)), Some(LinkEpoch(9)));
        assert_eq!(used.agree(LinkEpoch(9)), Some(LinkEpoch(10)));
    }

    #[test]
    fn numbers_end_where_flags_end() {
        let used = UsedEpochs::up_to(MAX_LINK_EPOCH - 1);
        assert_eq!(used.propose(), Some(LinkEpoch(MAX_LINK_EPOCH)));
        for _ in 0..2 {
            assert_eq!(used.propose(), None);
            assert_eq!(used.agree(LinkEpoch(1)), None);
            assert_eq!(used.agree(LinkEpoch(MAX_LINK_EPOCH)), None);
        }
    }

    #[test]
    fn what_the_peer_answered_is_not_proposed_again() {
        let used = UsedEpochs::up_to(3);
        used.note(LinkEpoch(103));
        assert_eq!(used.propose(), Some(LinkEpoch(104)));
        used.note(LinkEpoch(7));
        assert_eq!(used.propose(), Some(LinkEpoch(105)));
    }
}
