//! Turns SIGTERM and SIGINT into a request to drain. Never ends the process at the first signal;
//! the second one does, at once, also when the instance's loop is stuck.
//!
//! Signals belong to the process, so this is the one piece of global state of the crate.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;

use crate::error::NodeError;

/// Set by the first signal, never cleared.
static ASKED_TO_STOP: OnceLock<Arc<AtomicBool>> = OnceLock::new();

/// A shell's convention: a process that a signal ended exits with this plus the signal's number.
const EXIT_CODE_BASE: i32 = 128;

/// Takes SIGTERM and SIGINT over for the rest of the process's life; idempotent.
pub fn take_over() -> Result<(), NodeError> {
    if ASKED_TO_STOP.get().is_some() {
        return Ok(());
    }
    let asked = Arc::new(AtomicBool::new(false));
    for signal in [SIGTERM, SIGINT] {
        // In this order: the first signal passes the shutdown, then raises the flag for the next.
        flag::register_conditional_shutdown(signal, EXIT_CODE_BASE + signal, Arc::clone(&asked))
            .and_then(|_| flag::register(signal, Arc::clone(&asked)))
            .map_err(|source| NodeError::System {
                action: "take over SIGTERM and SIGINT",
                source,
            })?;
    }
    // Two threads that come here at once both register, which does no harm: a signal sets both.
    let _ = ASKED_TO_STOP.set(asked);
    Ok(())
}

/// Whether a signal asked this process to stop since [`take_over`].
pub fn asked_to_stop() -> bool {
    ASKED_TO_STOP
        .get()
        .is_some_and(|asked| asked.load(Ordering::Relaxed))
}
