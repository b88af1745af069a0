//! Keeps one checkpoint warm, serves its queue, and moves when another needs this worker more.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use chrono::{DateTime, Utc};
use farm::config::seconds;
use farm::fleet::{Demand, WorkerView};
use farm::job::{Failure, FailureKind};
use farm::placement::{self, Asker, Bounds};
use tokio_util::sync::CancellationToken;

use crate::context::{Backoff, Context};
use crate::device::DeviceGone;
use crate::holdings::Stage;
use crate::intake::{self, Fate};
use crate::resolve;
use crate::settle;

/// Between two looks for something to do, while there is nothing to do.
const IDLE_PAUSE: Duration = Duration::from_millis(200);

/// Between two looks for something better to do.
const BUSY_PAUSE: Duration = Duration::from_secs(1);

/// After so long, a checkpoint that could not be loaded is tried again.
const RELOAD_AFTER: Duration = Duration::from_secs(30);

/// Serves one checkpoint after the other until the worker is to stop.
pub(crate) async fn serve(context: &Arc<Context>) -> Result<(), DeviceGone> {
    let mut pause = Backoff::default();
    while !context.stop.is_cancelled() {
        match choose(context).await {
            Some(Some(model)) => {
                if let Some(fate) = prepare(context, &model).await? {
                    pause = Backoff::default();
                    serve_one(context, &model, fate).await?;
                } else {
                    context.stop.run_until_cancelled(pause.rest()).await;
                }
            }
            Some(None) => rest(context, IDLE_PAUSE).await,
            None => drop(context.stop.run_until_cancelled(pause.rest()).await),
        }
    }
    Ok(())
}

async fn rest(context: &Context, time: Duration) {
    context.stop.run_until_cancelled(tokio::time::sleep(time)).await;
}

/// What to serve next, as the store recorded it; `None` if the store did not answer.
async fn choose(context: &Context) -> Option<Option<String>> {
    let _speaking = context.speaking.lock().await;
    let post = context.post();
    let config = &context.config;
    let bounds =
        Bounds { interactive: seconds(config.interactive_wait_seconds), bulk: seconds(config.bulk_wait_seconds) };
    let asker = Asker {
        worker: &context.id,
        serving: post.serving.as_deref(),
        since: post.since,
        warm: post.warm.as_deref(),
        has_waiting: context.holdings.count(Stage::Waiting) > 0,
    };
    let decide = |demand: &[Demand], fleet: &[WorkerView], now: DateTime<Utc>| {
        placement::choose(&asker, demand, fleet, now, &bounds)
    };
    match context.store.place(&context.id, &decide).await {
        Ok(next) => {
            if next != post.serving {
                tracing::info!(worker.id = %context.id, from = post.serving, to = next, "this worker moves");
                let now = context.clock.now();
                context.change_post(|post| (post.serving, post.since) = (next.clone(), now));
            }
            Some(next)
        }
        Err(error) => {
            tracing::warn!(worker.id = %context.id, %error, "no placement: the store did not answer");
            None
        }
    }
}

/// Makes a checkpoint warm once the rows of the one before have finished. What to do with its jobs;
/// `None` if they have to wait, since the weights cannot be had now, or the worker is to stop.
async fn prepare(context: &Arc<Context>, model: &str) -> Result<Option<Fate>, DeviceGone> {
    if context.post().warm.as_deref() == Some(model) {
        return Ok(Some(Fate::Render));
    }
    let Some(idle) = context.stop.run_until_cancelled(context.device.when_idle()).await else { return Ok(None) };
    idle?;
    let Some(loaded) = context.stop.run_until_cancelled(load(context, model)).await else { return Ok(None) };
    let now = context.clock.now();
    context.change_post(|post| post.since = now);
    match loaded? {
        Ok(load_time) => {
            context.tally.loads.fetch_add(1, Relaxed);
            context.change_post(|post| (post.warm, post.load_time) = (Some(model.to_owned()), load_time));
            tracing::info!(worker.id = %context.id, checkpoint = model, duration_ms = load_time.as_millis() as u64, "a checkpoint is warm");
            Ok(Some(Fate::Render))
        }
        Err(failure) => {
            context.note_failure(&failure);
            let message = &failure.message;
            if failure.kind == FailureKind::Retryable {
                // Nothing speaks against the jobs: they stay in their queue, with all their attempts.
                tracing::warn!(worker.id = %context.id, checkpoint = model, message, "a checkpoint cannot be had now: trying again");
                return Ok(None);
            }
            tracing::error!(worker.id = %context.id, checkpoint = model, message, "a checkpoint cannot be served: its jobs fail");
            Ok(Some(Fate::Refuse(failure)))
        }
    }
}

/// Finds the checkpoint and loads it. How long that took, or why its jobs fail.
async fn load(context: &Arc<Context>, model: &str) -> Result<Result<Duration, Failure>, DeviceGone> {
    let facts = match context.catalog.find(Some(model)) {
        Ok((_, facts)) => facts.clone(),
        Err(error) => return Ok(Err(Failure { kind: FailureKind::Invalid, message: error.to_string() })),
    };
    let started = Instant::now();
    let located = match resolve::locate(&facts, &context.config, &context.stop).await {
        Ok(located) => located,
        Err(error) => {
            let message = format!("checkpoint `{model}`: {error}");
            return Ok(Err(Failure { kind: error.kind(), message }));
        }
    };
    // From here on the weights of the one before are gone, whatever comes of it.
    context.change_post(|post| post.warm = None);
    let loaded = context.device.load(located).await?;
    Ok(loaded.map(|_| started.elapsed()).map_err(|error| {
        let Failure { kind, message } = error.into();
        // What breaks a load has no single row for a culprit.
        let kind = if kind == FailureKind::Poison { FailureKind::Retryable } else { kind };
        Failure { kind, message: format!("checkpoint `{model}`: {message}") }
    }))
}

/// Serves a checkpoint's queue until another needs this worker more, or the worker is to stop. Then
/// gives back what has not joined a batch; running rows go on.
async fn serve_one(context: &Arc<Context>, model: &str, fate: Fate) -> Result<(), DeviceGone> {
    let began = Instant::now();
    let refuses = matches!(fate, Fate::Refuse(_));
    let stop = CancellationToken::new();
    let intake = tokio::spawn(intake::run(Arc::clone(context), model.to_owned(), fate, stop.clone()));
    let mut pause = IDLE_PAUSE;
    loop {
        rest(context, pause).await;
        // Whoever has been idle for long may look less often.
        pause = (pause * 2).min(BUSY_PAUSE);
        if context.stop.is_cancelled() || intake.is_finished() {
            break;
        }
        // A store that does not answer moves nobody.
        let moves = choose(context).await.is_some_and(|next| next.as_deref() != Some(model));
        if moves || refuses && began.elapsed() >= RELOAD_AFTER {
            break;
        }
    }
    stop.cancel();
    if let Err(error) = intake.await {
        tracing::error!(%error, "intake ended badly");
    }
    // The device answers at its next step boundary; a stop that is overdue by then gives back all.
    if let Some(waiting) = context.overdue.run_until_cancelled(context.device.take_waiting()).await {
        settle::released(context, waiting?).await;
    }
    Ok(())
}
