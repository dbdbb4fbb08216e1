//! Metrics over HTTP: `GET /metrics`, and nothing else.
//!
//! It asks the drive loop once per answer, one answer after the other, so that nobody who asks often
//! holds up steps.

use std::future::Future;
use std::io;
use std::net::TcpListener;
use std::sync::Arc;

use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use tokio::sync::Mutex;
use tracing::error;

use crate::drive_handle::{DriveHandle, Message};
use crate::metrics::Metrics;

const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

struct Source {
    metrics: Mutex<Metrics>,
    drive: DriveHandle,
}

/// Answers on `listener` until `closed` resolves.
pub fn serve(
    listener: TcpListener,
    metrics: Metrics,
    drive: DriveHandle,
    closed: impl Future<Output = ()> + Send + 'static,
) -> io::Result<()> {
    let listener = tokio::net::TcpListener::from_std(listener)?;
    let source = Source {
        metrics: Mutex::new(metrics),
        drive,
    };
    let router = Router::new()
        .route("/metrics", get(scrape))
        .with_state(Arc::new(source));
    tokio::spawn(async move {
        let served = axum::serve(listener, router).with_graceful_shutdown(closed);
        if let Err(error) = served.await {
            error!(%error, "metrics are not served any more");
        }
    });
    Ok(())
}

async fn scrape(State(source): State<Arc<Source>>) -> Response {
    let mut metrics = source.metrics.lock().await;
    let Ok(observed) = source.drive.ask(Message::Observe).await else {
        return (StatusCode::SERVICE_UNAVAILABLE, "the coordinator ends\n").into_response();
    };
    match metrics.text(&observed) {
        Ok(text) => ([(CONTENT_TYPE, OPEN_METRICS)], text).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}
