//! Models of what is shared without taking turns, checked by loom: every interleaving of a few
//! threads, and every value that the memory model lets each load see.
//!
//! Built only under `cfg(loom)` (`make loom`). A model runs the crate's own code: `sync` gives loom's
//! atomics and a futex of loom's locks the names that the code takes from `crate::sync`, and `words`
//! puts such atomics where mapped memory would be. Two processes are two threads with a mapping each.
//!
//! Each model is checked twice: as the code is, and with one ingredient taken away
//! ([`sync::Weakness`]), where it must fail. A model that cannot fail says nothing.

#![allow(
    unsafe_code,
    reason = "the models' memory is reached by pointer, as the real memory is"
)]

pub(crate) mod sync;
pub(crate) mod words;

#[cfg(test)]
mod doorbell;
#[cfg(test)]
mod ending;
#[cfg(test)]
mod ends;
#[cfg(test)]
mod frames;
#[cfg(test)]
mod handing_over;
#[cfg(test)]
mod unmapping;

#[cfg(test)]
use self::sync::{Weakness, weaken};

/// Times that a thread may be stopped where it would have gone on. Races that take more are rare in
/// the wild, and each further one multiplies the interleavings; every file of models says what it uses.
#[cfg(test)]
const PREEMPTIONS: usize = 3;

/// Checks a model of the code as it is.
#[cfg(test)]
fn check(model: impl Fn() + Send + Sync + 'static) {
    check_up_to(PREEMPTIONS, model);
}

/// Checks a model with more or fewer preemptions, and says how many executions that took.
#[cfg(test)]
#[expect(
    clippy::print_stdout,
    reason = "a test's output, shown with --nocapture"
)]
fn check_up_to(preemptions: usize, model: impl Fn() + Send + Sync + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.max_branches = 20_000;
    let started = std::time::Instant::now();
    let num_executions = std::sync::Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let counted = std::sync::Arc::clone(&num_executions);
    builder.check(move || {
        counted.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        model();
    });
    println!(
        "{}: {} executions, {} ms",
        std::thread::current().name().unwrap_or("a model"),
        num_executions.load(std::sync::atomic::Ordering::Relaxed),
        started.elapsed().as_millis()
    );
}

/// Checks a model of the code without one of its ingredients; that it fails is for the test to say.
#[cfg(test)]
fn check_without(weakness: Weakness, model: impl Fn() + Send + Sync + 'static) {
    weaken(weakness);
    check(model);
}
