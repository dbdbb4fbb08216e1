//! A promise that was not kept.

use std::fmt;

/// Says what was found and what it should have been.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation(pub String);

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Returns from the enclosing function with a violation unless the condition holds.
macro_rules! ensure {
    ($condition:expr, $($message:tt)+) => {
        if !$condition {
            return Err($crate::violation::Violation(format!($($message)+)));
        }
    };
}
pub(crate) use ensure;
