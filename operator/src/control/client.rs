//! The client of the API server: one whose requests and answers are counted, and that remembers when the server wants
//! to be left alone.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use http::{HeaderMap, StatusCode, header::RETRY_AFTER};
use http_body_util::BodyExt;
use kube::{
    Client,
    client::{Body, ClientBuilder, DynBody},
};
use tokio::time::Instant;
use tower::{
    BoxError,
    util::{BoxService, MapRequestLayer, MapResultLayer},
};

use super::metrics::Metrics;

/// What carries requests to the API server.
type Transport = BoxService<http::Request<Body>, http::Response<Box<DynBody>>, BoxError>;

/// The longest that is waited because the server asks for it.
const LONGEST: Duration = Duration::from_secs(600);

/// Until when the API server wants no requests, as it has said last (`Retry-After`).
#[derive(Debug, Default)]
pub(super) struct Wish {
    until: Mutex<Option<Instant>>,
}

impl Wish {
    /// How long from now on; zero when it has no such wish.
    pub(super) fn left(&self) -> Duration {
        let until = *self.until.lock().unwrap_or_else(PoisonError::into_inner);
        until.map_or(Duration::ZERO, |until| until.saturating_duration_since(Instant::now()))
    }

    fn hear(&self, headers: &HeaderMap) {
        // The other form, a date, is none of the API server's.
        let seconds = headers
            .get(RETRY_AFTER)
            .and_then(|value| value.to_str().ok()?.parse().ok());
        if let Some(seconds) = seconds {
            let until = Instant::now() + Duration::from_secs(seconds).min(LONGEST);
            *self.until.lock().unwrap_or_else(PoisonError::into_inner) = Some(until);
        }
    }
}

/// The configuration of a client that sends each request once. kube's own would send it up to 15 times more where the
/// answer is 429, 503 or 504: nobody would see that the API server is overloaded, and a request that is to be answered
/// in time would not fail in time.
///
/// # Errors
/// No cluster is configured.
pub(super) async fn configuration() -> Result<kube::Config, kube::config::InferConfigError> {
    let mut config = kube::Config::infer().await?;
    config.default_retry = false;
    Ok(config)
}

/// A client that counts its requests, what it receives and what fails.
pub(super) fn counted(builder: ClientBuilder<Transport>, metrics: &Arc<Metrics>) -> (Client, Arc<Wish>) {
    let wish = Arc::<Wish>::default();
    let sent = Arc::clone(metrics);
    let requests = MapRequestLayer::new(move |request: http::Request<Body>| {
        sent.api_requests.inc();
        request
    });
    let (received, heard) = (Arc::clone(metrics), Arc::clone(&wish));
    let answers = MapResultLayer::new(move |answer: Result<http::Response<Box<DynBody>>, BoxError>| {
        let answer = answer.inspect_err(|_| received.failed(None))?;
        let status = answer.status();
        if status.is_client_error() || status.is_server_error() {
            received.failed(Some(status.as_u16()));
        }
        if matches!(status, StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE) {
            heard.hear(answer.headers());
        }
        let metrics = Arc::clone(&received);
        Ok::<_, BoxError>(answer.map(|body| {
            body.map_frame(move |frame| {
                let length = frame.data_ref().map_or(0, |data| data.len());
                metrics.api_received_bytes.inc_by(length as u64);
                frame
            })
        }))
    });
    (builder.with_layer(&answers).with_layer(&requests).build(), wish)
}
