//! The heartbeat: one statement renews every lease in hand and brings back what was lost or cancelled.

use std::sync::Arc;

use farm::config::seconds;
use farm::id::JobId;
use farm::job::Lease;
use farm::store::{Heartbeat, StoreError};
use tokio::time::MissedTickBehavior;

use crate::context::Context;
use crate::settle;

/// Beats until nothing is in hand any more: a beat after the goodbye would bring the worker back to life.
/// A store that is away hears the next one.
pub(crate) async fn run(context: Arc<Context>) {
    let mut ticks = tokio::time::interval(seconds(context.config.heartbeat_seconds.max(0.01)));
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    while context.abandon.run_until_cancelled(ticks.tick()).await.is_some() {
        if let Err(error) = beat(&context).await {
            tracing::warn!(worker.id = %context.id, %error, "a heartbeat did not reach the store");
        }
    }
}

/// One heartbeat. Rows are dropped beside it: the device answers at its next step boundary, and the
/// leases cannot wait for that.
pub(crate) async fn beat(context: &Arc<Context>) -> Result<(), StoreError> {
    let leases = context.holdings.leases();
    let Heartbeat { lost, cancelled } = {
        let _speaking = context.speaking.lock().await;
        if context.abandon.is_cancelled() {
            return Ok(());
        }
        context.store.heartbeat(&context.status(), &leases, context.lease_time()).await?
    };
    let lost = affected(&leases, &lost, |lease| context.holdings.mark_lost(lease));
    let cancelled = affected(&leases, &cancelled, |lease| context.holdings.mark_cancelled(lease));
    if !lost.is_empty() || !cancelled.is_empty() {
        context.tasks.spawn(drop_rows(Arc::clone(context), lost, cancelled));
    }
    Ok(())
}

fn affected(leases: &[Lease], jobs: &[JobId], mark: impl Fn(&Lease) -> bool) -> Vec<JobId> {
    let named = leases.iter().filter(|lease| jobs.contains(&lease.job_id) && mark(lease));
    named.map(|lease| lease.job_id).collect()
}

/// A row that is not on the device any more has become a picture or a failure: whoever deals with that
/// sees the mark.
async fn drop_rows(context: Arc<Context>, lost: Vec<JobId>, cancelled: Vec<JobId>) {
    for job in context.device.drop_rows(lost).await.unwrap_or_default() {
        settle::lost(&context, job).await;
    }
    for job in context.device.drop_rows(cancelled).await.unwrap_or_default() {
        settle::cancelled(&context, job).await;
    }
}
