//! `/healthz` (the process lives) and `/readyz` (it can do its work).

use std::error::Error;
use std::future::Future;
use std::time::{Duration, Instant};

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use serde::{Deserialize, Serialize};
use tokio::sync::Mutex;
use utoipa::ToSchema;

use super::{Api, SharedApi};

/// Time for each part to answer.
const PING_LIMIT: Duration = Duration::from_secs(2);
/// An answer serves for so long: the route is open to everybody, and asking the parts is not free.
const FRESH: Duration = Duration::from_secs(1);

/// Whether the scheduler can do its work, and which part keeps it from it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Ready {
    /// True if all parts answer.
    pub ready: bool,
    /// What is true about jobs.
    pub store: Part,
    /// What carries them.
    pub broker: Part,
    /// Where the images are.
    pub artifacts: Part,
}

/// One part's answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Part {
    /// It answers.
    pub ok: bool,
    /// Why it does not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// The last answer and its age. The lock is held while the parts are asked, so that they are asked once.
#[derive(Debug, Default)]
pub(crate) struct Readiness(Mutex<Option<(Instant, Ready)>>);

/// Always 200 while the process lives.
#[utoipa::path(get, path = "/healthz", tag = "health", security(()), responses((status = 200, body = Part)))]
pub(super) async fn healthz() -> Json<Part> {
    Json(Part { ok: true, error: None })
}

/// 200 if store, broker and artifact store answer, else 503 with what is wrong.
#[utoipa::path(
    get, path = "/readyz", tag = "health", security(()),
    responses((status = 200, body = Ready), (status = 503, body = Ready))
)]
pub(super) async fn readyz(State(api): State<SharedApi>) -> (StatusCode, Json<Ready>) {
    let ready = api.readiness.of(&api).await;
    let status = if ready.ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (status, Json(ready))
}

impl Readiness {
    async fn of(&self, api: &Api) -> Ready {
        let mut last = self.0.lock().await;
        if let Some((at, ready)) = &*last
            && at.elapsed() < FRESH
        {
            return ready.clone();
        }
        let (store, broker, artifacts) =
            tokio::join!(ask(api.store.ping()), ask(api.broker.ping()), ask(api.artifacts.ping()));
        let ready = Ready { ready: store.ok && broker.ok && artifacts.ok, store, broker, artifacts };
        *last = Some((Instant::now(), ready.clone()));
        ready
    }
}

async fn ask<E: Error>(ping: impl Future<Output = Result<(), E>>) -> Part {
    let error = match tokio::time::timeout(PING_LIMIT, ping).await {
        Ok(Ok(())) => None,
        Ok(Err(error)) => Some(error.to_string()),
        Err(_elapsed) => Some(format!("no answer within {} seconds", PING_LIMIT.as_secs())),
    };
    Part { ok: error.is_none(), error }
}
