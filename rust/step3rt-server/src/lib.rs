//! The coordinator: public gRPC, the registry of instances and their leases, and the one loop
//! that owns the scheduler.
//!
//! Nothing here computes a model or touches the data plane; Python is unknown.
//!
//! Reading order: [`config`], [`coordinator`] (how the parts are put together), [`drive`] (the
//! loop), [`registry`], [`inference_service`], [`response_stream`].

pub mod checkpoint;
pub mod clock;
pub mod config;
mod control_runtime;
pub mod coordinator;
pub mod deadline;
pub mod drive;
pub mod drive_handle;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
pub mod health;
mod incoming;
pub mod inference_service;
pub mod instance_list;
pub mod internal_error;
pub mod listeners;
pub mod live_requests;
pub mod metrics;
pub mod metrics_server;
pub mod node_service;
pub mod notify;
pub mod outbox;
pub mod random;
mod receiving;
pub mod registry;
pub mod request_echo;
pub mod response_stream;
pub mod sessions;
pub mod shutdown;
pub mod start_error;
pub mod telemetry;
mod tenants;
pub mod text;

use std::time::Duration;

use crate::config::CoordinatorConfig;
use crate::coordinator::Coordinator;
use crate::start_error::StartError;

pub use crate::instance_list::{ListError, list_instances};

/// How long tasks may take to end after the coordinator has; they hold nothing that matters.
const RUNTIME_SHUTDOWN_TIMEOUT: Duration = Duration::from_millis(500);

/// Runs the coordinator that `config_json` describes until SIGTERM, SIGINT or a defect, and
/// returns the process's exit code. Blocks; takes over both signals.
pub fn run(config_json: &str) -> Result<u8, StartError> {
    let config = CoordinatorConfig::from_json(config_json)?;
    telemetry::start(config.log_format);
    let coordinator = Coordinator::bind(config)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .thread_name("step3rt-serve")
        .enable_all()
        .build()?;
    let code = runtime.block_on(async {
        let stops = shutdown::stop_signals()?;
        coordinator.serve(stops).await
    });
    runtime.shutdown_timeout(RUNTIME_SHUTDOWN_TIMEOUT);
    code
}
