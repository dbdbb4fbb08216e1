//! `grpc.health.v1`: SERVING while the cluster can compute and is not draining.
//!
//! It never decides that; it repeats what the drive loop publishes.

use step3rt_proto::INFERENCE_SERVICE_NAME;
use tokio::sync::watch;
use tonic_health::ServingStatus;
use tonic_health::server::HealthReporter;

use crate::drive_handle::ClusterStatus;

/// The names that clients and probes ask about: the whole server, and its one public service.
const SERVICE_NAMES: [&str; 2] = ["", INFERENCE_SERVICE_NAME];

/// Reports every change of `status` until the drive loop is gone.
pub async fn report(reporter: HealthReporter, mut status: watch::Receiver<ClusterStatus>) {
    loop {
        let serving = if status.borrow_and_update().is_serving {
            ServingStatus::Serving
        } else {
            ServingStatus::NotServing
        };
        for name in SERVICE_NAMES {
            reporter.set_service_status(name, serving).await;
        }
        if status.changed().await.is_err() {
            return;
        }
    }
}
