//! What every request passes through: a log line and metrics for its answer, a net for panics, a time limit.

use std::panic::AssertUnwindSafe;
use std::time::{Duration, Instant};

use axum::extract::{MatchedPath, Request, State};
use axum::http::Method;
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use futures_util::FutureExt;
use tracing::{debug, error, info};

use super::SharedApi;
use super::error::{ApiError, ErrorReport, ProblemKind};

/// Time for an answer of the routes that answer at once.
const TIME_LIMIT: Duration = Duration::from_secs(30);

/// Catches panics, counts and logs. An error is logged here and nowhere else.
pub(crate) async fn observe(State(api): State<SharedApi>, request: Request, next: Next) -> Response {
    let begun = Instant::now();
    let method = known_method(request.method());
    let route = request.extensions().get::<MatchedPath>().map_or("unmatched", MatchedPath::as_str).to_owned();
    let path = request.uri().path().to_owned();
    let response = match AssertUnwindSafe(next.run(request)).catch_unwind().await {
        Ok(response) => response,
        Err(panic) => ApiError::panicked(&*panic).into_response(),
    };
    let (status, took) = (response.status(), begun.elapsed());
    api.metrics.request_answered(method, &route, status.as_u16(), took);
    let (status, duration_ms) = (status.as_u16(), took.as_millis() as u64);
    match response.extensions().get::<ErrorReport>() {
        Some(ErrorReport(report)) if status >= 500 => error!(method, path, status, duration_ms, "{report}"),
        Some(ErrorReport(report)) => info!(method, path, status, duration_ms, "{report}"),
        None => debug!(method, path, status, duration_ms, "answered"),
    }
    response
}

/// Gives up on a request that takes too long; what it had begun in the store is undone.
pub(crate) async fn limit_time(request: Request, next: Next) -> Response {
    match tokio::time::timeout(TIME_LIMIT, next.run(request)).await {
        Ok(response) => response,
        Err(_elapsed) => {
            let detail = format!("no answer within {} seconds; try again", TIME_LIMIT.as_secs());
            ApiError::new(ProblemKind::TookTooLong, detail).into_response()
        }
    }
}

/// Clients choose methods freely; metrics must not grow with that.
fn known_method(method: &Method) -> &'static str {
    match *method {
        Method::GET => "GET",
        Method::HEAD => "HEAD",
        Method::POST => "POST",
        Method::PUT => "PUT",
        Method::PATCH => "PATCH",
        Method::DELETE => "DELETE",
        Method::OPTIONS => "OPTIONS",
        _ => "other",
    }
}
