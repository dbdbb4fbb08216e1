//! The "model": the token that follows is a pure function of a seed and of all tokens before it.
//!
//! So the whole stream that a request must get is known before anything runs, and a token that was
//! lost, repeated, changed or computed on another sequence's past gives another stream.

use step3rt_core::ids::TokenId;

use crate::rng::mix;

/// Few, so that stop ids are met often.
pub(crate) const VOCAB_SIZE: u32 = 40;

/// Names a sequence of tokens; what a KV slot holds depends on exactly this.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Prefix(u64);

impl Prefix {
    /// Of no tokens.
    pub(crate) const EMPTY: Self = Self(0x51_7e_b3);

    pub(crate) fn of(tokens: &[TokenId]) -> Self {
        tokens.iter().fold(Self::EMPTY, |prefix, &t| prefix.then(t))
    }

    pub(crate) fn then(self, token: TokenId) -> Self {
        Self(mix(self.0.rotate_left(5) ^ u64::from(token.0)))
    }

    /// The token that the model samples after this with `seed`.
    pub(crate) fn next_token(self, seed: u64) -> TokenId {
        let drawn = mix(self.0 ^ mix(seed)) % u64::from(VOCAB_SIZE);
        TokenId(u32::try_from(drawn).expect("below VOCAB_SIZE"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_depends_on_the_seed_and_on_every_token_before_it() {
        let continuation = |seed, first| {
            let mut prefix = Prefix::of(&[TokenId(first), TokenId(2)]);
            let tokens = (0..16).map(|_| {
                let token = prefix.next_token(seed);
                prefix = prefix.then(token);
                token.0
            });
            tokens.collect::<Vec<_>>()
        };
        assert_eq!(continuation(1, 1), continuation(1, 1));
        assert_ne!(continuation(1, 1), continuation(2, 1));
        assert_ne!(continuation(1, 1), continuation(1, 3));
    }
}
