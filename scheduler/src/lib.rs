//! The scheduler: takes submissions, hands their jobs to the broker bit by bit, and keeps their state true.
//!
//! Reading order: [`run`] here; [`submission`] (what a client sends at once, as a stream of jobs), `images` (what
//! jobs start from); [`api`] (HTTP);
//! then the loops over one driver, `loops`: `dispatch` (store to broker), `reaper` (silent workers),
//! `reconciler` (lost messages), `leftovers` (objects nobody owns); `metrics` and `server` (the socket) last.
//!
//! Any number of schedulers may run on one store: nothing that matters lives in the process.
//!
//! Invariant: no tensors here (never candle), no SQL, no AMQP, no S3: only the ports of [`farm`].

mod images;
mod refusal;
pub mod submission;

pub mod api;

mod dispatch;
mod leftovers;
mod loops;
mod metrics;
mod reaper;
mod reconciler;
mod server;

use std::collections::HashMap;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use farm::artifact::SharedArtifacts;
use farm::broker::SharedBroker;
use farm::catalog::Catalog;
use farm::clock::Clock;
use farm::config::{ApiConfig, SchedulerConfig, seconds};
use farm::spec::Limits;
use farm::store::SharedStore;
use tokio::net::TcpListener;
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::api::{Api, Keys};
pub use crate::api::{
    ArtifactStored, JobAccepted, JobPage, JobStateView, ModelView, Models, Part, Problem, Ready, StreamEvent,
    SubmissionAccepted, SubmissionCountersView, SubmissionPage, SubmissionRetried, Workers,
};
use crate::dispatch::Dispatcher;
use crate::leftovers::LeftoverSweeper;
use crate::loops::{Rhythm, repeat};
use crate::metrics::Metrics;
use crate::reaper::Reaper;
use crate::reconciler::Reconciler;
use crate::submission::Spool;

/// The shortest rest of a loop, whatever the configuration says.
const SHORTEST_REST: Duration = Duration::from_millis(1);

/// What a scheduler works with.
pub struct Scheduler {
    /// What is true.
    pub store: SharedStore,
    /// Carries jobs to the workers and news back.
    pub broker: SharedBroker,
    /// Where the images are.
    pub artifacts: SharedArtifacts,
    /// The checkpoints that jobs may name.
    pub catalog: Arc<Catalog>,
    /// What a request may ask for at most.
    pub limits: Limits,
    /// The API's settings. The socket is the caller's; `listen` is not read.
    pub api: ApiConfig,
    /// The loops' settings.
    pub config: SchedulerConfig,
    /// The time.
    pub clock: Arc<dyn Clock>,
}

/// Serves the API on `listener` and runs the loops until `shutdown` resolves. Then: no new connections, watchers
/// of jobs are sent away, open requests get `shutdown_seconds` to end, the loops end after their sweep.
///
/// Errors: a key hash that cannot be read; an address that others can reach while there are no API keys; a folder
/// for streamed submissions that cannot be written to.
pub async fn run(scheduler: Scheduler, listener: TcpListener, shutdown: impl Future) -> anyhow::Result<()> {
    let keys = Keys::read(&scheduler.api.key_hashes)?;
    Spool::create(scheduler.api.spool_dir.as_deref())
        .await
        .context("streamed submissions cannot be spooled: set `api.spool_dir` to a folder that can be written to")?;
    let address = listener.local_addr().context("the listening socket has no address")?;
    let loopback = address.ip().to_canonical().is_loopback();
    if keys.is_empty() && !loopback {
        bail!(
            "`api.listen` is {address}, which other machines can reach, but `api.key_hashes` is empty: add an API key \
             to `api.key_hashes` or set `api.listen` to a loopback address such as 127.0.0.1:{}",
            address.port()
        );
    }
    if keys.is_empty() {
        info!("the API listens on http://{address}, without API keys: open to this machine only");
    } else {
        info!(keys = keys.len(), "the API listens on http://{address}");
    }

    let stop = CancellationToken::new();
    // Also when this future is dropped before its end.
    let _stop_on_drop = stop.clone().drop_guard();
    let nudge = Arc::new(Notify::new());
    let metrics = Metrics::new();
    let mut loops = spawn_loops(&scheduler, &metrics, &nudge, &stop);
    let grace = seconds(scheduler.config.shutdown_seconds);
    let router = api::router(Api::new(scheduler, keys, metrics, nudge, stop.clone()));
    let serving = server::serve(listener, router, stop.clone(), grace);
    let stopped = async {
        shutdown.await;
        info!("stopping");
        stop.cancel();
    };
    tokio::join!(serving, stopped);

    let all_ended = async { while loops.join_next().await.is_some() {} };
    if tokio::time::timeout(grace, all_ended).await.is_err() {
        warn!("a loop was still at work when the time for an orderly stop was over; its transaction is undone");
        loops.shutdown().await;
    }
    Ok(())
}

fn spawn_loops(scheduler: &Scheduler, metrics: &Metrics, nudge: &Arc<Notify>, stop: &CancellationToken) -> JoinSet<()> {
    let Scheduler { store, broker, artifacts, config, clock, .. } = scheduler;
    let every = |value: f64| Rhythm { interval: seconds(value).max(SHORTEST_REST), nudge: None };
    let mut loops = JoinSet::new();
    let dispatcher = Dispatcher {
        store: store.clone(),
        broker: broker.clone(),
        queue_bound: config.queue_bound,
        metrics: metrics.clone(),
    };
    let interval = Duration::from_millis(config.dispatch_interval_ms).max(SHORTEST_REST);
    let rhythm = Rhythm { interval, nudge: Some(nudge.clone()) };
    loops.spawn(repeat(dispatcher, rhythm, metrics.clone(), stop.clone()));

    let reaper = Reaper { store: store.clone(), metrics: metrics.clone() };
    loops.spawn(repeat(reaper, every(config.reap_interval_seconds), metrics.clone(), stop.clone()));

    let reconciler = Reconciler {
        store: store.clone(),
        broker: broker.clone(),
        clock: clock.clone(),
        grace: seconds(config.reconcile_grace_seconds),
        just_started: true,
        short_since: HashMap::new(),
        nudge: nudge.clone(),
        metrics: metrics.clone(),
    };
    loops.spawn(repeat(reconciler, every(config.reconcile_interval_seconds), metrics.clone(), stop.clone()));

    let leftovers = LeftoverSweeper {
        store: store.clone(),
        artifacts: artifacts.clone(),
        clock: clock.clone(),
        grace: seconds(config.leftover_grace_seconds),
        metrics: metrics.clone(),
    };
    // Nobody waits for it: as rarely as the reconciler looks.
    loops.spawn(repeat(leftovers, every(config.reconcile_interval_seconds), metrics.clone(), stop.clone()));
    loops
}
