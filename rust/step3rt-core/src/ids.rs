//! Identifiers. Bare integers never cross a module boundary.

use std::fmt;

macro_rules! id {
    ($(#[$doc:meta])* $name:ident($inner:ty)) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub $inner);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

id!(
    /// One process of either role. Never reused within one coordinator's life.
    InstanceId(u32)
);
id!(
    /// One incarnation of an instance: raised at every (re)registration, so that late messages of
    /// a dead incarnation can be told apart.
    Epoch(u64)
);
id!(
    /// A micro-batch lane of one attention instance, from 0.
    LaneId(u8)
);
id!(
    /// Counts the steps of one lane of one attention instance, from 0.
    StepId(u64)
);
id!(
    /// A sequence's stay on one lane. Never reused: a sequence that lost its place and got another
    /// comes back under a new id, so that instances never confuse its two stays.
    SequenceId(u64)
);
id!(
    /// A client's request, as numbered by the coordinator (not the client's string).
    RequestId(u64)
);
id!(
    /// Whose request it is, as far as shares and cached beginnings go.
    TenantId(u64)
);
id!(
    /// One KV block of `block_size_tokens` tokens in an attention instance's pool.
    BlockId(u32)
);
id!(
    /// A vocabulary entry.
    TokenId(u32)
);

/// A point in time, in nanoseconds since an arbitrary origin that the caller fixes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TimeNs(pub u64);

impl TimeNs {
    /// The time `ms` milliseconds later, saturating.
    #[must_use]
    pub fn plus_ms(self, ms: u64) -> Self {
        Self(self.0.saturating_add(ms.saturating_mul(1_000_000)))
    }

    /// Nanoseconds since `earlier`, zero if `earlier` is later.
    pub fn since_ns(self, earlier: Self) -> u64 {
        self.0.saturating_sub(earlier.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_millisecond_has_a_million_nanoseconds_and_time_has_an_end() {
        assert_eq!(TimeNs(5).plus_ms(3), TimeNs(3_000_005));
        assert_eq!(TimeNs(5).plus_ms(u64::MAX), TimeNs(u64::MAX));
        assert_eq!(TimeNs(3).since_ns(TimeNs(5)), 0);
    }
}
