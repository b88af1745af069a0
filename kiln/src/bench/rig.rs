//! One farm under test: its ports, and the scheduler and workers that run on them in this process.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use farm::catalog::Catalog;
use farm::config::Config;
use farm::fleet::WorkerView;
use farm::id::SubmissionId;
use farm::job::SubmissionView;
use scheduler::api::Workers;
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::client::Client;
use crate::embedded;
use crate::ports::Ports;

/// Between two looks at a submission; no figure depends on it.
const LOOK_INTERVAL: Duration = Duration::from_millis(500);

/// How long workers may take to report what they have just done.
const REPORT_PATIENCE: Duration = Duration::from_secs(20);

/// A farm, of which as much runs as was started.
pub struct Rig {
    /// What it stands on.
    pub ports: Ports,
    config: Config,
    catalog: Arc<Catalog>,
    parts: JoinSet<(&'static str, Result<()>)>,
    stop: CancellationToken,
}

impl Rig {
    /// A farm of which nothing runs.
    pub fn new(config: Config, catalog: Arc<Catalog>, ports: Ports) -> Self {
        Self { ports, config, catalog, parts: JoinSet::new(), stop: CancellationToken::new() }
    }

    /// Starts the scheduler; a client for it.
    pub async fn serve(&mut self) -> Result<Client> {
        let listener = TcpListener::bind("127.0.0.1:0").await.context("no port is free")?;
        let address = listener.local_addr().context("the listening socket has no address")?;
        let scheduler = embedded::scheduler(&self.config, &self.ports, &self.catalog);
        let stop = self.stop.clone().cancelled_owned();
        self.parts.spawn(async move { ("scheduler", scheduler::run(scheduler, listener, stop).await) });
        Client::at(format!("http://{address}"), None)
    }

    /// Starts one more worker. Where the ports are servers it has connections of its own, as another process would.
    pub async fn add_worker(&mut self) -> Result<()> {
        let has_servers = !self.config.broker.url.0.is_empty();
        let ports = if has_servers { Ports::open(&self.config).await? } else { self.ports.clone() };
        let worker = embedded::worker(&self.config, &ports, &self.catalog);
        let stop = self.stop.clone().cancelled_owned();
        self.parts.spawn(async move { ("worker", worker::run(worker, stop).await.map(drop)) });
        Ok(())
    }

    /// Does `work`, unless a part of the farm breaks meanwhile.
    pub async fn watch_over<T>(&mut self, work: impl Future<Output = Result<T>>) -> Result<T> {
        tokio::select! {
            outcome = work => outcome,
            Some(ended) = self.parts.join_next() => Err(match ended {
                Ok((part, Err(error))) => error.context(format!("the {part} ended")),
                Ok((part, Ok(()))) => anyhow!("the {part} ended by itself"),
                Err(panic) => anyhow!(panic).context("a part of the farm broke; this is a bug"),
            }),
        }
    }

    /// Stops what runs, in order.
    pub async fn stop(mut self) -> Result<()> {
        self.stop.cancel();
        while let Some(ended) = self.parts.join_next().await {
            let (part, outcome) = ended.context("a part of the farm broke; this is a bug")?;
            outcome.with_context(|| format!("the {part} did not stop cleanly"))?;
        }
        Ok(())
    }
}

/// Submits lines of JSON as one submission.
pub async fn submit(client: &Client, lines: impl Into<reqwest::Body>) -> Result<SubmissionId> {
    let key = Uuid::new_v4().to_string();
    Ok(client.submit(&[], &key, "application/x-ndjson", lines.into()).await?.submission_id)
}

/// Waits until every job of a submission is done.
pub async fn all_done(client: &Client, id: SubmissionId) -> Result<SubmissionView> {
    loop {
        let view = client.submission(id).await?;
        if view.counters.finished() == view.counters.total() {
            if let Some(job) = client.jobs(id, Some("failed"), None, 1).await?.first() {
                let reason = job.error.as_ref().map_or("no reason was recorded", |failure| &failure.message);
                anyhow::bail!(
                    "{} of {} jobs failed, for instance: {reason}",
                    view.counters.failed,
                    view.counters.total()
                );
            }
            return Ok(view);
        }
        tokio::time::sleep(LOOK_INTERVAL).await;
    }
}

/// Seconds from the acceptance of a submission until its last job was done.
pub fn seconds_of(view: &SubmissionView) -> Result<f64> {
    let finished_at = view.finished_at.context("a finished submission has no time at which it finished")?;
    let seconds = (finished_at - view.created_at).as_seconds_f64();
    ensure!(seconds > 0.0, "a submission took {seconds} s: the clock was turned back meanwhile");
    Ok(seconds)
}

/// The workers, once they have reported `done` jobs between them.
pub async fn workers_after(client: &Client, done: u64) -> Result<Vec<WorkerView>> {
    let start = tokio::time::Instant::now();
    loop {
        let Workers { workers } = client.get("/v1/workers").await?;
        let reported: u64 = workers.iter().map(|worker| worker.status.done).sum();
        if reported >= done {
            return Ok(workers);
        }
        ensure!(start.elapsed() < REPORT_PATIENCE, "the workers report {reported} jobs of {done}");
        tokio::time::sleep(LOOK_INTERVAL).await;
    }
}
