//! How a job leaves this worker. Always in this order: the store is told, the delivery is acked, those
//! who watch are told. A crash in between makes the broker deliver again, which the next claim finds
//! stale.

use std::sync::atomic::Ordering::Relaxed;

use farm::id::JobId;
use farm::job::Failure;

use crate::context::Context;
use crate::holdings::Held;

/// The attempt failed.
pub(crate) async fn failed(context: &Context, job: JobId, failure: Failure) {
    context.note_failure(&failure);
    fail_quietly(context, job, &failure).await;
}

/// The attempt failed, through no fault of this worker that has not been counted already.
pub(crate) async fn fail_quietly(context: &Context, job: JobId, failure: &Failure) {
    let Some(held) = context.holdings.begin_settling(job) else { return };
    let tell = || context.store.fail(&context.id, &held.lease, failure);
    match context.until_stored("fail", &context.abandon, tell).await {
        Ok(Some(state)) => {
            context.tally.failed.fetch_add(1, Relaxed);
            let (kind, message) = (failure.kind.as_str(), &failure.message);
            tracing::warn!(job.id = %job, attempt = held.lease.attempt, kind, message, state = state.as_str(), "a job failed");
        }
        Ok(None) => note_lost(context, job),
        Err(error) => tracing::error!(job.id = %job, %error, "a failure could not be recorded: the lease will expire"),
    }
    leave(context, &held).await;
}

/// The row of a cancelled job has been dropped.
pub(crate) async fn cancelled(context: &Context, job: JobId) {
    let Some(held) = context.holdings.begin_settling(job) else { return };
    match context.until_stored("cancelled", &context.abandon, || context.store.cancelled(&held.lease)).await {
        Ok(true) => {
            context.tally.cancelled.fetch_add(1, Relaxed);
            tracing::info!(job.id = %job, "a job was cancelled");
        }
        Ok(false) => note_lost(context, job),
        Err(error) => {
            tracing::error!(job.id = %job, %error, "a cancellation could not be recorded: the lease will expire");
        }
    }
    leave(context, &held).await;
}

/// Gives jobs back, their attempt unspent.
pub(crate) async fn released(context: &Context, jobs: Vec<JobId>) {
    let held: Vec<_> = jobs.into_iter().filter_map(|job| context.holdings.begin_settling(job)).collect();
    if held.is_empty() {
        return;
    }
    let leases: Vec<_> = held.iter().map(|held| held.lease.clone()).collect();
    match context.until_stored("release", &context.abandon, || context.store.release(&leases)).await {
        Ok(count) => {
            context.tally.released.fetch_add(count, Relaxed);
            tracing::info!(worker.id = %context.id, jobs = count, "gave jobs back that had not begun");
        }
        Err(error) => tracing::error!(%error, "leases could not be released: they will expire"),
    }
    for held in &held {
        leave(context, held).await;
    }
}

/// The lease is no longer ours, and the row has been dropped: the store has decided already.
pub(crate) async fn lost(context: &Context, job: JobId) {
    let Some(held) = context.holdings.begin_settling(job) else { return };
    note_lost(context, job);
    held.receipt.ack().await;
    context.announcer.forget(job);
    context.holdings.remove(job);
}

pub(crate) fn note_lost(context: &Context, job: JobId) {
    context.tally.lost.fetch_add(1, Relaxed);
    tracing::warn!(worker.id = %context.id, job.id = %job, "a lease was lost: the job is dropped here");
}

/// The store knows: ack, tell, forget.
pub(crate) async fn leave(context: &Context, held: &Held) {
    held.receipt.ack().await;
    context.announcer.left(held.lease.job_id);
    context.holdings.remove(held.lease.job_id);
}
