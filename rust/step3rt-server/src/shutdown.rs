//! Stop signals: the first drains, the second ends at once.
//!
//! It never stops anything itself; [`crate::coordinator`] does.

use std::io;

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

/// Signals that may wait; the second one already ends the process.
const SIGNAL_BOUND: usize = 4;

/// Who asks the coordinator to stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StopSignal {
    /// SIGTERM: the service manager.
    Terminate,
    /// SIGINT: a person.
    Interrupt,
}

impl StopSignal {
    /// The exit code of a process that this signal ended before it was done.
    pub fn exit_code(self) -> u8 {
        match self {
            Self::Terminate => 143,
            Self::Interrupt => 130,
        }
    }
}

/// The process's stop signals from now on. Must be called within a runtime.
pub fn stop_signals() -> io::Result<mpsc::Receiver<StopSignal>> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let (sender, receiver) = mpsc::channel(SIGNAL_BOUND);
    tokio::spawn(async move {
        loop {
            let stop = tokio::select! {
                _ = terminate.recv() => StopSignal::Terminate,
                _ = interrupt.recv() => StopSignal::Interrupt,
            };
            if sender.send(stop).await.is_err() {
                return;
            }
        }
    });
    Ok(receiver)
}
