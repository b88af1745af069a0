//! From the store to the broker and back: what waits, what is due, what the broker has lost.

use std::time::Duration;

use chrono::{DateTime, Utc};

use super::columns::Moment;
use super::counters::Moves;
use super::driver::{Statement, Transaction, arguments, given_ids, json_list, statement, waiting_jobs};
use super::sql::SqlStore;
use super::{DEMAND_BOUND, Demand, Result, StoreError};
use crate::batch_key::BatchKey;
use crate::broker::{Broker, BrokerError};
use crate::id::{JobId, SubmissionId};
use crate::job::{JobState, Lane};
use crate::message::{self, JobMessage, QueueKey};
use crate::spec::RenderSpec;

/// How long the broker may take to confirm: rows stay locked so long.
const PUBLISH_PATIENCE: Duration = Duration::from_secs(10);

/// A job that is due.
#[derive(Debug, sqlx::FromRow)]
struct DueJob {
    job_id: JobId,
    submission_id: SubmissionId,
    attempts: i32,
    #[sqlx(json)]
    spec: RenderSpec,
}

const LOCK_DUE_JOBS: Statement = statement!(
    "-- lock_due_jobs(model, lane, now, limit)
    SELECT job_id, submission_id, attempts, spec FROM ",
    waiting_jobs,
    " AND model = $1 AND lane = $2 AND state = 'pending' AND not_before <= $3
    ORDER BY not_before, job_id LIMIT $4",
    { " FOR UPDATE SKIP LOCKED" | "" }
);

const MARK_QUEUED: Statement = statement!(
    "-- mark_queued(job_ids, now)
    UPDATE jobs SET state = 'queued', queued_at = $2 WHERE job_id IN ",
    given_ids
);

pub(super) async fn dispatch(store: &SqlStore, queue: &QueueKey, limit: u32, broker: &dyn Broker) -> Result<u64> {
    let (mut transaction, now) = store.begin().await?;
    let arguments = arguments![queue.model.clone(), queue.lane, now, i64::from(limit)];
    let due: Vec<DueJob> = transaction.fetch(&LOCK_DUE_JOBS, arguments).await?;
    if due.is_empty() {
        return Ok(0);
    }
    let mut moves = Moves::default();
    let (mut messages, mut submissions) = (Vec::with_capacity(due.len()), Vec::with_capacity(due.len()));
    for job in due {
        submissions.push(job.submission_id);
        messages.push(job_message(job));
    }
    let confirmed = publish(broker, queue, &messages).await?;
    let mut queued = Vec::with_capacity(messages.len());
    for ((message, submission), confirmed) in messages.iter().zip(submissions).zip(confirmed) {
        if confirmed {
            queued.push(message.job_id);
            moves.shift(submission, JobState::Pending, JobState::Queued, 1);
        }
    }
    if queued.is_empty() {
        return Ok(0);
    }
    let marked = transaction.execute(&MARK_QUEUED, arguments![json_list(&queued), now]).await?;
    moves.count(&mut transaction, now).await?;
    transaction.commit().await?;
    Ok(marked)
}

fn job_message(job: DueJob) -> JobMessage {
    JobMessage {
        version: message::VERSION,
        job_id: job.job_id,
        attempts: job.attempts as u32,
        batch_key: BatchKey::of(&job.spec),
        spec: job.spec,
    }
}

/// Publishes within [`PUBLISH_PATIENCE`]. If that fails the jobs stay pending: some messages may have
/// arrived all the same, and a worker may claim those.
async fn publish(broker: &dyn Broker, queue: &QueueKey, messages: &[JobMessage]) -> Result<Vec<bool>> {
    match tokio::time::timeout(PUBLISH_PATIENCE, broker.publish(queue, messages)).await {
        Ok(Ok(confirmed)) => Ok(confirmed),
        Ok(Err(error @ BrokerError::Unavailable(_))) => Err(StoreError::Unavailable(error.into())),
        Ok(Err(error @ BrokerError::Internal(_))) => Err(StoreError::Internal(error.into())),
        Err(_) => {
            let message = format!("the broker has not confirmed {} jobs for {PUBLISH_PATIENCE:?}", messages.len());
            Err(StoreError::Unavailable(message.into()))
        }
    }
}

#[derive(Debug, sqlx::FromRow)]
struct DemandRow {
    model: String,
    lane: Lane,
    pending: i64,
    queued: i64,
    oldest_pending: Option<Moment>,
    oldest_queued: Option<Moment>,
}

macro_rules! in_this_queue {
    ($dialect:ident) => {
        " AND jobs.model = queues.model AND jobs.lane = queues.lane"
    };
}

macro_rules! due {
    ($dialect:ident) => {
        " AND jobs.state = 'pending' AND jobs.not_before <= $1"
    };
}

macro_rules! published {
    ($dialect:ident) => {
        " AND jobs.state = 'queued'"
    };
}

macro_rules! first {
    ($dialect:ident) => {
        " ORDER BY jobs.not_before, jobs.job_id LIMIT 1"
    };
}

// Hops from checkpoint to checkpoint in the index instead of reading all that waits; then counts each
// queue up to a bound. The longest waiting is the first in the index.
const DEMAND: Statement = statement!(
    "-- demand(now, bound)
    WITH RECURSIVE waiting(model) AS (
        SELECT min(jobs.model) FROM ",
    waiting_jobs,
    "
        UNION ALL
        SELECT (SELECT min(jobs.model) FROM ",
    waiting_jobs,
    " AND jobs.model > waiting.model)
        FROM waiting WHERE waiting.model IS NOT NULL
    ), queues AS (
        SELECT waiting.model, lanes.lane
        FROM waiting, (SELECT 'interactive' AS lane UNION ALL SELECT 'bulk') AS lanes
        WHERE waiting.model IS NOT NULL
    )
    SELECT queues.model, queues.lane,
           (SELECT count(*) FROM (SELECT 1 FROM ",
    waiting_jobs,
    in_this_queue,
    due,
    " LIMIT $2) AS bounded) AS pending,
           (SELECT count(*) FROM (SELECT 1 FROM ",
    waiting_jobs,
    in_this_queue,
    published,
    " LIMIT $2) AS bounded)
               AS queued,
           (SELECT jobs.created_at FROM ",
    waiting_jobs,
    in_this_queue,
    due,
    first,
    ") AS oldest_pending,
           (SELECT jobs.created_at FROM ",
    waiting_jobs,
    in_this_queue,
    published,
    first,
    ") AS oldest_queued
    FROM queues"
);

pub(super) async fn demand(store: &SqlStore) -> Result<Vec<Demand>> {
    let arguments = arguments![store.now(), DEMAND_BOUND as i64];
    Ok(collect_demand(store.driver.fetch(&DEMAND, arguments).await?))
}

/// The demand as a transaction sees it.
pub(super) async fn demand_within(transaction: &mut Transaction, now: Moment) -> Result<Vec<Demand>> {
    Ok(collect_demand(transaction.fetch(&DEMAND, arguments![now, DEMAND_BOUND as i64]).await?))
}

fn collect_demand(rows: Vec<DemandRow>) -> Vec<Demand> {
    let demand = |row: DemandRow| {
        let oldest = [row.oldest_pending, row.oldest_queued].into_iter().flatten().min()?;
        let queue = QueueKey { model: row.model, lane: row.lane };
        let (pending, queued) = (row.pending as u64, row.queued as u64);
        Some(Demand { queue, waiting: (pending + queued).min(DEMAND_BOUND), queued, oldest: oldest.0 })
    };
    let mut all: Vec<Demand> = rows.into_iter().filter_map(demand).collect();
    all.sort_by(|one, other| one.queue.cmp(&other.queue));
    all
}

// Whoever is claiming some of these right now has proved that the broker did not lose them.
const LOCK_QUEUED_JOBS: Statement = statement!(
    "-- lock_queued_jobs(model, lane, queued_before)
    SELECT job_id, submission_id FROM ",
    waiting_jobs,
    " AND model = $1 AND lane = $2 AND state = 'queued' AND queued_at < $3
    ORDER BY job_id",
    { " FOR UPDATE SKIP LOCKED" | "" }
);

const MARK_PENDING: Statement = statement!(
    "-- mark_pending(job_ids, not_before)
    UPDATE jobs SET state = 'pending', not_before = $2 WHERE job_id IN ",
    given_ids
);

/// Puts waiting jobs, locked by the caller, back to pending until `not_before`.
pub(super) async fn mark_pending(transaction: &mut Transaction, jobs: &[JobId], not_before: Moment) -> Result<u64> {
    transaction.execute(&MARK_PENDING, arguments![json_list(jobs), not_before]).await
}

pub(super) async fn requeue(store: &SqlStore, queue: &QueueKey, queued_before: DateTime<Utc>) -> Result<u64> {
    let (mut transaction, now) = store.begin().await?;
    let arguments = arguments![queue.model.clone(), queue.lane, Moment(queued_before)];
    let lost: Vec<(JobId, SubmissionId)> = transaction.fetch(&LOCK_QUEUED_JOBS, arguments).await?;
    if lost.is_empty() {
        return Ok(0);
    }
    let mut moves = Moves::default();
    for (_, submission) in &lost {
        moves.shift(*submission, JobState::Queued, JobState::Pending, 1);
    }
    let jobs: Vec<JobId> = lost.into_iter().map(|(job, _)| job).collect();
    let marked = mark_pending(&mut transaction, &jobs, now).await?;
    moves.count(&mut transaction, now).await?;
    transaction.commit().await?;
    Ok(marked)
}

const QUEUED_SINCE: Statement = statement!(
    "-- queued_since(model, lane, queued_before)
    SELECT count(*) FROM ",
    waiting_jobs,
    " AND model = $1 AND lane = $2 AND state = 'queued' AND queued_at < $3"
);

pub(super) async fn queued_since(store: &SqlStore, queue: &QueueKey, queued_before: DateTime<Utc>) -> Result<u64> {
    let arguments = arguments![queue.model.clone(), queue.lane, Moment(queued_before)];
    let count: Option<(i64,)> = store.driver.fetch_optional(&QUEUED_SINCE, arguments).await?;
    Ok(count.map_or(0, |(count,)| count as u64))
}
