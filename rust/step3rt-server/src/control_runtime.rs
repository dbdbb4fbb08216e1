//! The thread on which instances' sessions are read and written.
//!
//! A step's report and the next step's plan pass through it. On the workers that serve streams
//! they would stand behind the hundreds that another lane's step has just given tokens: the
//! report of a step that ends then would be late by as much.

use std::future::Future;
use std::io;

use tokio::runtime::{Builder, Runtime};
use tokio::task::JoinHandle;

/// A runtime of one thread, beside the one that it is made on. Its tasks end with it.
pub(crate) struct ControlRuntime {
    runtime: Option<Runtime>,
}

impl ControlRuntime {
    /// Starts the thread.
    pub(crate) fn start() -> io::Result<Self> {
        let runtime = Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("step3rt-control")
            .enable_all()
            .build()?;
        Ok(Self {
            runtime: Some(runtime),
        })
    }

    /// Calls `make` where sockets and tasks become this runtime's, and runs the future there.
    pub(crate) fn spawn<F, E>(
        &self,
        make: impl FnOnce() -> Result<F, E>,
    ) -> Result<JoinHandle<F::Output>, E>
    where
        F: Future + Send + 'static,
        F::Output: Send + 'static,
    {
        let runtime = self.runtime.as_ref().expect("it is taken when dropped");
        let _entered = runtime.enter();
        Ok(runtime.spawn(make()?))
    }
}

impl Drop for ControlRuntime {
    /// Waits for nothing: it may be dropped on a thread that must not block.
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    #[tokio::test]
    async fn its_tasks_run_beside_a_runtime_that_is_busy() {
        let control = ControlRuntime::start().expect("a thread");
        let name = || thread::current().name().map(str::to_owned);
        let (done, is_done) = std::sync::mpsc::channel();
        let task = control.spawn(|| {
            Ok::<_, io::Error>(async move {
                let inner = tokio::spawn(async move { name() });
                let inner = inner.await.expect("no panic");
                done.send((name(), inner)).expect("somebody waits");
            })
        });
        // This runtime has one thread, and it is held up here.
        let (outer, inner) = is_done.recv().expect("it runs meanwhile");
        assert_eq!(outer.as_deref(), Some("step3rt-control"));
        assert_eq!(inner, outer);
        task.expect("made").await.expect("no panic");
    }
}
