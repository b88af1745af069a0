//! `/metrics`, for Prometheus: the process's counters, and gauges read from store and broker on the spot.

use std::time::Duration;

use axum::extract::State;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use farm::job::{Counters, JobState};
use tracing::warn;

use super::error::ApiError;
use super::openapi::Problems;
use super::{Api, SharedApi};
use crate::metrics::QueueReading;

/// Time to read one source's gauges.
const READ_LIMIT: Duration = Duration::from_secs(3);

/// Counters and gauges in the OpenMetrics text format. A source that does not answer leaves its gauges as they
/// were and sets `kiln_unread` for it.
#[utoipa::path(
    get, path = "/metrics", tag = "farm",
    responses((status = 200, body = String, content_type = "application/openmetrics-text"), Problems)
)]
pub(super) async fn metrics(State(api): State<SharedApi>) -> Result<Response, ApiError> {
    tokio::join!(
        read(&api, "jobs", read_jobs(&api)),
        read(&api, "queues", read_queues(&api)),
        read(&api, "workers", read_workers(&api))
    );
    let text = api.metrics.encode().expect("metrics can be written to a string");
    let content_type = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    Ok(([(header::CONTENT_TYPE, content_type)], text).into_response())
}

async fn read(api: &Api, name: &str, reading: impl Future<Output = anyhow::Result<()>>) {
    let outcome = match tokio::time::timeout(READ_LIMIT, reading).await {
        Ok(outcome) => outcome,
        Err(_elapsed) => Err(anyhow::anyhow!("no answer within {} seconds", READ_LIMIT.as_secs())),
    };
    if let Err(error) = &outcome {
        warn!(source = name, "gauges cannot be read: {error:#}");
    }
    api.metrics.read_from(name, outcome.is_ok());
}

async fn read_jobs(api: &Api) -> anyhow::Result<()> {
    let Counters { pending, queued, leased, done, failed, cancelled } = api.store.totals().await?;
    let counts = [pending, queued, leased, done, failed, cancelled];
    api.metrics.read_jobs(JobState::ALL.into_iter().zip(counts));
    Ok(())
}

async fn read_queues(api: &Api) -> anyhow::Result<()> {
    let mut readings = Vec::new();
    for demand in api.store.demand().await? {
        let ready = api.broker.depth(&demand.queue).await.ok();
        readings.push(QueueReading { queue: demand.queue, waiting: demand.waiting, queued: demand.queued, ready });
    }
    api.metrics.read_queues(&readings);
    Ok(())
}

async fn read_workers(api: &Api) -> anyhow::Result<()> {
    let workers = api.store.workers().await?.into_iter();
    let alive: Vec<_> = workers.filter(|worker| worker.alive).map(|worker| worker.status).collect();
    api.metrics.read_workers(&alive);
    Ok(())
}
