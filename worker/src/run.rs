//! The worker's life: start, serve, stop.

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use anyhow::{Context as _, bail};
use farm::artifact::SharedArtifacts;
use farm::broker::SharedBroker;
use farm::catalog::Catalog;
use farm::clock::Clock;
use farm::config::{WorkerConfig, seconds};
use farm::id::WorkerId;
use farm::spec::Limits;
use farm::store::SharedStore;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::affinity;
use crate::announce::Announcer;
use crate::context::{Context, Tally};
use crate::deliver::Delivery;
use crate::device::{Device, Event};
use crate::heartbeat;
use crate::holdings::{Holdings, Stage};
use crate::inputs::Inputs;
use crate::renderer::{EngineRenderer, Renderer};
use crate::settle;

/// How long the device thread may take to notice that the worker has stopped.
const JOIN_PATIENCE: Duration = Duration::from_secs(10);

/// What a worker works with.
#[derive(Clone)]
pub struct Worker {
    /// Where jobs and leases are kept.
    pub store: SharedStore,
    /// Where jobs come from.
    pub broker: SharedBroker,
    /// Where pictures go.
    pub artifacts: SharedArtifacts,
    /// The checkpoints and where their weights are.
    pub catalog: Arc<Catalog>,
    /// Settings.
    pub config: WorkerConfig,
    /// What init images may be.
    pub limits: Limits,
    /// The time.
    pub clock: Arc<dyn Clock>,
}

/// What a worker did in its life.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkerSummary {
    /// Its name.
    pub worker_id: WorkerId,
    /// Jobs finished.
    pub done: u64,
    /// Attempts failed.
    pub failed: u64,
    /// Jobs dropped because a client cancelled them.
    pub cancelled: u64,
    /// Jobs given back with their attempt unspent.
    pub released: u64,
    /// Leases lost to the reaper.
    pub lost: u64,
    /// Checkpoints loaded.
    pub loads: u64,
}

/// Serves the farm with the configured device until `shutdown` resolves, then finishes what is running.
///
/// # Errors
/// If the device cannot be opened, or the worker has drained itself after too many failures.
pub async fn run(worker: Worker, shutdown: impl Future<Output = ()>) -> anyhow::Result<WorkerSummary> {
    let config = worker.config.clone();
    let renderer = tokio::task::spawn_blocking(move || EngineRenderer::open(&config)).await??;
    run_with(worker, renderer, shutdown).await
}

/// The same with any renderer.
///
/// # Errors
/// If the worker has drained itself after too many failures.
pub async fn run_with(
    worker: Worker,
    renderer: impl Renderer,
    shutdown: impl Future<Output = ()>,
) -> anyhow::Result<WorkerSummary> {
    let host = host_name();
    let name = worker.config.name.clone().unwrap_or_else(|| host.clone());
    let suffix = uuid::Uuid::new_v4().simple().to_string();
    let (device_name, dtype) = (renderer.device(), renderer.dtype());
    let patience = seconds(worker.config.bulk_wait_seconds);
    let (device, events, thread) =
        Device::start(renderer, worker.config.max_batch as usize, patience).context("starting the device thread")?;
    let context = Arc::new(Context {
        store: worker.store,
        broker: worker.broker,
        artifacts: worker.artifacts,
        catalog: worker.catalog,
        config: worker.config,
        limits: worker.limits,
        inputs: Inputs::default(),
        clock: worker.clock,
        id: WorkerId(format!("{name}-{}", &suffix[..8])),
        host,
        device_name,
        dtype,
        device,
        holdings: Holdings::default(),
        announcer: Announcer::default(),
        tally: Tally::default(),
        post: Default::default(),
        speaking: Default::default(),
        stop: CancellationToken::new(),
        drained: Default::default(),
        overdue: CancellationToken::new(),
        abandon: CancellationToken::new(),
        tasks: TaskTracker::new(),
    });
    tracing::info!(worker.id = %context.id, device = context.device_name, dtype = context.dtype, "the worker starts");

    let background = CancellationToken::new();
    let life = (Arc::clone(&context), background.clone());
    let serving = tokio::spawn(async move {
        let (context, background) = life;
        let served = live(&context, events, background).await;
        context.stop.cancel();
        served
    });
    tokio::select! {
        () = shutdown => context.stop.cancel(),
        () = context.stop.cancelled() => {}
    }
    let served = serving.await.context("the worker's loop panicked")?;
    background.cancel();
    context.tasks.close();
    let _ = tokio::time::timeout(JOIN_PATIENCE, context.tasks.wait()).await;

    let summary = summarise(&context);
    let drained = context.drained.get().cloned();
    drop(context);
    let joined = tokio::task::spawn_blocking(move || thread.join());
    if tokio::time::timeout(JOIN_PATIENCE, joined).await.is_err() {
        tracing::warn!(worker.id = %summary.worker_id, "the device is still busy with its last step: it is left alone");
    }
    tracing::info!(worker.id = %summary.worker_id, done = summary.done, failed = summary.failed, released = summary.released, loads = summary.loads, "the worker has stopped");
    served?;
    if let Some(failures) = drained {
        bail!("worker {} drained itself after {failures}", summary.worker_id);
    }
    Ok(summary)
}

/// Registers, serves, and winds down.
async fn live(
    context: &Arc<Context>,
    events: mpsc::UnboundedReceiver<Event>,
    background: CancellationToken,
) -> anyhow::Result<()> {
    let register = || heartbeat::beat(context);
    if context.until_stored("register the worker", &context.stop, register).await.is_err() {
        if context.stop.is_cancelled() {
            return Ok(());
        }
        bail!("the store refuses this worker's registration (see the log)");
    }
    context.tasks.spawn(heartbeat::run(Arc::clone(context)));
    context.tasks.spawn(time_the_stop(Arc::clone(context), background.clone()));
    context.tasks.spawn(announce(Arc::clone(context), background.clone()));
    context.tasks.spawn(listen(Arc::clone(context), events, background));
    let served = affinity::serve(context).await;
    context.stop.cancel();
    wind_down(context).await;
    served.context("serving")
}

/// Calls an orderly stop overdue once it has taken its time, and a little later whatever still asks for the store's
/// answer: with the store away, rows that had not begun could never be given back, and the stop would wait for that.
async fn time_the_stop(context: Arc<Context>, end: CancellationToken) {
    let timing = async {
        context.stop.cancelled().await;
        tokio::time::sleep(seconds(context.config.shutdown_seconds)).await;
        context.overdue.cancel();
        tokio::time::sleep(JOIN_PATIENCE).await;
        context.abandon.cancel();
    };
    end.run_until_cancelled(timing).await;
}

async fn announce(context: Arc<Context>, stop: CancellationToken) {
    context.announcer.run(&context.broker, &context.id, stop).await;
}

/// Deals with the device's news.
async fn listen(context: Arc<Context>, mut events: mpsc::UnboundedReceiver<Event>, stop: CancellationToken) {
    let delivery = Delivery::start(&context);
    while let Some(Some(event)) = stop.run_until_cancelled(events.recv()).await {
        match event {
            Event::Joined(job) => drop(context.holdings.advance(job, Stage::Running)),
            Event::Stepped { job_id, step, total } => {
                if let Some(held) = context.holdings.get(job_id) {
                    let now = std::time::Instant::now();
                    context.announcer.stepped(job_id, held.spec.lane, step, total, now);
                }
            }
            Event::Rendered(rendered) => drop(context.tasks.spawn(Arc::clone(&delivery).deliver(*rendered))),
            Event::Text(text) => *context.tally.text.lock().expect("no holder of this lock panics") = text,
            Event::Failed(job, failure) => {
                let of_task = Arc::clone(&context);
                context.tasks.spawn(async move { settle::failed(&of_task, job, failure).await });
            }
        }
    }
}

/// Finishes what runs for as long as an orderly stop may take, gives back the rest, and says goodbye.
async fn wind_down(context: &Arc<Context>) {
    if context.overdue.run_until_cancelled(context.holdings.empty()).await.is_none() {
        tracing::warn!(worker.id = %context.id, jobs = context.holdings.len(), "the stop takes too long: what is left is given back");
        let release = settle::released(context, context.holdings.job_ids());
        // It ends by itself when `abandon` comes; cut off before, it would keep receipts that subscriptions wait for.
        let _ = tokio::time::timeout(2 * JOIN_PATIENCE, release).await;
    }
    context.abandon.cancel();
    let _speaking = tokio::time::timeout(JOIN_PATIENCE, context.speaking.lock()).await;
    match tokio::time::timeout(JOIN_PATIENCE, context.store.goodbye(&context.id)).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::warn!(worker.id = %context.id, %error, "could not say goodbye"),
        Err(_) => tracing::warn!(worker.id = %context.id, "could not say goodbye in time"),
    }
}

fn summarise(context: &Context) -> WorkerSummary {
    let tally = &context.tally;
    WorkerSummary {
        worker_id: context.id.clone(),
        done: tally.done.load(Relaxed),
        failed: tally.failed.load(Relaxed),
        cancelled: tally.cancelled.load(Relaxed),
        released: tally.released.load(Relaxed),
        lost: tally.lost.load(Relaxed),
        loads: tally.loads.load(Relaxed),
    }
}

/// The machine's name, where the system tells it in a file.
fn host_name() -> String {
    let read = |path: &str| std::fs::read_to_string(path).ok();
    let name = read("/proc/sys/kernel/hostname").or_else(|| read("/etc/hostname")).unwrap_or_default();
    let name = name.trim();
    if name.is_empty() { "worker".into() } else { name.to_owned() }
}
