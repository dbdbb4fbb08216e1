//! Two threads as the two sides of a link, over the code and memory that two processes have.

#[cfg(not(loom))]
mod exchange;
pub(crate) mod pair;
