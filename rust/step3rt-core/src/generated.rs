//! Owns the tokens that were generated for a sequence.
//!
//! It never forgets one and never changes one.

use std::ops::Range;

use crate::ids::TokenId;

/// Tokens in the order of their positions.
///
/// ```text
///   0 ............. settled.len() ......... len
///   | settled, on the heap | recent, in place |
/// ```
///
/// Every step appends a token to thousands of sequences, and the end of each one's heap memory is
/// far from that of the others. So tokens are gathered where the step is at work anyway, and go to
/// the heap many at a time.
#[derive(Clone, Debug)]
#[repr(C)]
pub(crate) struct Generated {
    settled: Vec<TokenId>,
    num_recent: u32,
    recent: [TokenId; NUM_RECENT],
}

/// With their number, a cache line.
const NUM_RECENT: usize = 15;

const NUM_RESERVED: usize = 64;

impl Generated {
    pub(crate) fn new(tokens: Vec<TokenId>) -> Self {
        Self {
            settled: tokens,
            num_recent: 0,
            recent: [TokenId(0); NUM_RECENT],
        }
    }

    pub(crate) fn push(&mut self, token: TokenId) {
        if self.num_recent as usize == NUM_RECENT {
            self.settled.reserve(NUM_RESERVED); // or a short life would grow it five times
            self.settled.extend_from_slice(&self.recent);
            self.num_recent = 0;
        }
        self.recent[self.num_recent as usize] = token;
        self.num_recent += 1;
    }

    pub(crate) fn len(&self) -> usize {
        self.settled.len() + self.num_recent as usize
    }

    pub(crate) fn last(&self) -> Option<TokenId> {
        self.recent().last().or(self.settled.last()).copied()
    }

    /// The tokens at `range`, in two parts.
    pub(crate) fn parts(&self, range: Range<usize>) -> [&[TokenId]; 2] {
        let num_settled = self.settled.len();
        let settled = range.start.min(num_settled)..range.end.min(num_settled);
        let recent =
            range.start.max(num_settled) - num_settled..range.end.max(num_settled) - num_settled;
        [&self.settled[settled], &self.recent()[recent]]
    }

    fn recent(&self) -> &[TokenId] {
        &self.recent[..self.num_recent as usize]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_range_has_its_tokens_wherever_they_are() {
        let ids = |range: Range<u32>| range.map(TokenId).collect::<Vec<_>>();
        let mut generated = Generated::new(ids(0..3));
        assert_eq!(generated.last(), Some(TokenId(2)));
        for len in 3..50_u32 {
            assert_eq!(generated.len(), len as usize);
            for start in 0..=len {
                for end in start..=len {
                    let parts = generated.parts(start as usize..end as usize);
                    assert_eq!(parts.concat(), ids(start..end));
                }
            }
            generated.push(TokenId(len));
            assert_eq!(generated.last(), Some(TokenId(len)));
        }
        assert_eq!(Generated::new(Vec::new()).last(), None);
    }
}
