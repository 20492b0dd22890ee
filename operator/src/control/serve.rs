//! `/metrics`, `/healthz` and `/readyz`.

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use axum::{
    Router,
    extract::State,
    http::{StatusCode, header},
    response::IntoResponse,
    routing::get,
};
use tokio::{net::TcpListener, task::JoinHandle};
use tracing::{error, info};

use super::{ControlError, metrics::Metrics};

/// How long the API server may be silent. The lease is looked at every ten seconds, by a leader and by a standby.
const SILENCE: Duration = Duration::from_secs(30);

/// When the API server was heard last.
#[derive(Debug, Default)]
pub(super) struct Health {
    contact: Mutex<Option<Instant>>,
}

impl Health {
    /// The API server has answered.
    pub(super) fn contact(&self) {
        *self.contact.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
    }

    /// It has answered lately.
    fn ready(&self) -> bool {
        let contact = *self.contact.lock().unwrap_or_else(PoisonError::into_inner);
        contact.is_some_and(|contact| contact.elapsed() < SILENCE)
    }
}

type Shared = (Arc<Metrics>, Arc<Health>);

/// Serves until the task is aborted.
///
/// # Errors
/// The address cannot be had.
pub(super) async fn serve(
    address: SocketAddr,
    metrics: Arc<Metrics>,
    health: Arc<Health>,
) -> Result<JoinHandle<()>, ControlError> {
    let failed = |source| ControlError::Listen { address, source };
    let listener = TcpListener::bind(address).await.map_err(failed)?;
    let local = listener.local_addr().map_err(failed)?;
    info!(address = %local, "serving");
    let app = Router::new()
        .route("/metrics", get(show_metrics))
        .route("/healthz", get(|| async { "ok" }))
        .route("/readyz", get(show_ready))
        .with_state((metrics, health));
    Ok(tokio::spawn(async move {
        if let Err(error) = axum::serve(listener, app).await {
            error!(%error, "nothing is served any more");
        }
    }))
}

async fn show_metrics(State((metrics, _)): State<Shared>) -> impl IntoResponse {
    match metrics.text() {
        Ok(text) => {
            let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
            (StatusCode::OK, [(header::CONTENT_TYPE, kind)], text)
        }
        Err(error) => {
            let kind = "text/plain";
            (
                StatusCode::INTERNAL_SERVER_ERROR,
                [(header::CONTENT_TYPE, kind)],
                error.to_string(),
            )
        }
    }
}

/// A standby is ready, too: it would lead if it had to.
async fn show_ready(State((_, health)): State<Shared>) -> (StatusCode, &'static str) {
    if health.ready() {
        (StatusCode::OK, "ok")
    } else {
        (
            StatusCode::SERVICE_UNAVAILABLE,
            "the API server has not answered lately",
        )
    }
}
