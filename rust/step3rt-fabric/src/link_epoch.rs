//! Numbers the incarnations of links, so that what memory keeps of an earlier one can be told apart.
//!
//! The connecting end proposes a number that it has not used, the accepting end answers with that
//! one or a higher one that it has not used either. So the number is the same at both ends, and above
//! those of all links that either process had before.

use std::fmt;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::handshake::RefusalCode;

/// Highest number. Flags in device memory keep 24 bits of it; a link a second lasts 194 days.
pub const MAX_LINK_EPOCH: u32 = (1 << 24) - 1;

/// A peer's number may use up one in so many of those that are left, so that a wrong one does not leave
/// this process, and all that it links to afterwards, without any. Who has made a link a second for 48
/// days can still be linked by a process that has just begun.
const LARGEST_SHARE: u32 = 4;

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
        let last = self.advance(|last| Some(last + 1).filter(|next| *next <= MAX_LINK_EPOCH));
        last.map(LinkEpoch)
    }

    /// The number of a link for which the peer proposed one, or why there is none.
    pub(crate) fn agree(&self, LinkEpoch(proposed): LinkEpoch) -> Result<LinkEpoch, RefusalCode> {
        if !self.is_near(proposed) {
            return Err(RefusalCode::FarEpoch);
        }
        // None below those used: there is no way back to them.
        let next = |last: u32| (last + 1).max(proposed);
        let agreed = self.advance(|last| Some(next(last)).filter(|next| *next <= MAX_LINK_EPOCH));
        agreed.map(LinkEpoch).ok_or(RefusalCode::NoEpoch)
    }

    /// Takes note of what the peer answered to a proposal; whether the link may have that number.
    pub(crate) fn note(&self, LinkEpoch(agreed): LinkEpoch) -> bool {
        let is_near = self.is_near(agreed);
        if is_near {
            self.0.fetch_max(agreed, Ordering::Relaxed);
        }
        is_near
    }

    /// Whether a peer's number leaves enough for other links.
    fn is_near(&self, number: u32) -> bool {
        let last = self.0.load(Ordering::Relaxed);
        number <= last + (MAX_LINK_EPOCH - last).div_ceil(LARGEST_SHARE)
    }

    /// Forgets all numbers: a fuzzer makes more links than there are numbers.
    #[cfg(fuzzing)]
    pub(crate) fn forget(&self) {
        self.0.store(0, Ordering::Relaxed);
    }

    /// The last number used, after `next` has made it of the one before; `None` if that cannot.
    fn advance(&self, next: impl Fn(u32) -> Option<u32>) -> Option<u32> {
        let before = self
            .0
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, &next);
        before.ok().and_then(next)
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
        assert_eq!(used.agree(LinkEpoch(9)), Ok(LinkEpoch(9)));
        assert_eq!(used.agree(LinkEpoch(9)), Ok(LinkEpoch(10)));
    }

    #[test]
    fn numbers_end_where_flags_end() {
        let used = UsedEpochs::up_to(MAX_LINK_EPOCH - 1);
        assert_eq!(used.propose(), Some(LinkEpoch(MAX_LINK_EPOCH)));
        for _ in 0..2 {
            assert_eq!(used.propose(), None);
            assert_eq!(used.agree(LinkEpoch(1)), Err(RefusalCode::NoEpoch));
            assert_eq!(
                used.agree(LinkEpoch(MAX_LINK_EPOCH)),
                Err(RefusalCode::NoEpoch)
            );
        }
    }

    #[test]
    fn what_the_peer_answered_is_not_proposed_again() {
        let used = UsedEpochs::up_to(3);
        assert!(used.note(LinkEpoch(103)));
        assert_eq!(used.propose(), Some(LinkEpoch(104)));
        assert!(used.note(LinkEpoch(7)));
        assert_eq!(used.propose(), Some(LinkEpoch(105)));
    }
    #[test]
    fn numbers_of_peers_do_not_use_up_those_of_others() {
        let used = UsedEpochs::up_to(0);
        for wrong in [MAX_LINK_EPOCH, MAX_LINK_EPOCH / 2, u32::MAX] {
            assert_eq!(used.agree(LinkEpoch(wrong)), Err(RefusalCode::FarEpoch));
            assert!(!used.note(LinkEpoch(wrong)));
        }
        assert_eq!(used.propose(), Some(LinkEpoch(1)));
        // The largest that is taken, time and again.
        for _ in 0..20 {
            let last = used.propose().unwrap().0;
            let largest = last + (MAX_LINK_EPOCH - last).div_ceil(LARGEST_SHARE);
            assert_eq!(used.agree(LinkEpoch(largest)), Ok(LinkEpoch(largest)));
        }
        assert!(used.propose().unwrap().0 < MAX_LINK_EPOCH - 10_000);
    }
}
