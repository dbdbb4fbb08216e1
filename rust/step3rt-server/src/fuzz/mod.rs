//! What the fuzzers of `fuzz/` run on bytes that clients and instances could send, and what they begin
//! with.
//!
//! It is in the crate's tests, which replay the committed corpus, and in builds with
//! `--cfg fuzzing`; never in a release. A target panics when a promise is broken.

mod chat;
mod generate;
#[cfg(test)]
#[path = "../../../../fuzz/src/replay.rs"]
mod replay;
mod requests;
mod session;
mod text;

use std::path::PathBuf;

/// A target: its folder in `fuzz/corpus`, and what is run on its inputs.
pub type Target = (&'static str, fn(&[u8]));

/// The crate's targets.
pub const TARGETS: [Target; 4] = [
    ("session", session::run),
    ("generate", generate::run),
    ("chat", chat::run),
    ("text", text::run),
];

/// Inputs made of messages as this build writes them, each with its target's name.
pub fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let seeds = [
        ("session", session::seeds()),
        ("generate", generate::seeds()),
        ("chat", chat::seeds()),
        ("text", text::seeds()),
    ];
    seeds
        .into_iter()
        .flat_map(|(name, seeds)| seeds.into_iter().map(move |seed| (name, seed)))
        .collect()
}

/// The next byte; 0 where there is none.
fn byte(data: &mut &[u8]) -> u8 {
    let Some((first, rest)) = data.split_first() else {
        return 0;
    };
    *data = rest;
    *first
}

/// As many of the next bytes as the next byte says, and there are.
fn part<'a>(data: &mut &'a [u8]) -> &'a [u8] {
    let len = usize::from(byte(data)).min(data.len());
    let (part, rest) = data.split_at(len);
    *data = rest;
    part
}

/// A folder of the repository.
fn folder(name: &str) -> PathBuf {
    [env!("CARGO_MANIFEST_DIR"), "../..", name].iter().collect()
}
