//! What nobody asks for: leases that ran out, and what lost attempts have left behind.

use chrono::{DateTime, Utc};
use serde::Serialize;

use super::columns::Moment;
use super::driver::{Statement, arguments, json_list, statement};
use super::lifecycle::{EndedAttempt, Ending, LeasedJob, end_attempt};
use super::sql::SqlStore;
use super::{Leftover, Reaped, Result, attempts};
use crate::id::{JobId, SubmissionId};
use crate::job::JobState;

// Rows that are locked are being finished, renewed, or reaped by another scheduler.
const LOCK_EXPIRED_LEASES: Statement = statement!(
    "-- lock_expired_leases(now, limit)
    SELECT job_id, submission_id, attempts, max_attempts, last_attempt, cancel_requested, worker, failed_workers
    FROM jobs WHERE state = 'leased' AND expires_at <= $1 ORDER BY job_id LIMIT $2",
    { " FOR UPDATE SKIP LOCKED" | "" }
);

pub(super) async fn reap(store: &SqlStore, limit: u32) -> Result<Reaped> {
    let (mut transaction, now) = store.begin().await?;
    let expired: Vec<LeasedJob> = transaction.fetch(&LOCK_EXPIRED_LEASES, arguments![now, i64::from(limit)]).await?;
    let ended: Vec<EndedAttempt> =
        expired.into_iter().map(|job| end_attempt(job, &Ending::Expired, &store.settings)).collect();
    attempts::end_attempts(&mut transaction, &ended, now).await?;
    transaction.commit().await?;
    let count = |state: JobState| ended.iter().filter(|ended| ended.state == state).count() as u64;
    Ok(Reaped {
        retried: count(JobState::Pending),
        failed: count(JobState::Failed),
        cancelled: count(JobState::Cancelled),
    })
}

const LEFTOVERS: Statement = statement!(
    "-- leftovers(ended_before, limit)
    SELECT submission_id, job_id, attempt FROM leftovers WHERE ended_at < $1 ORDER BY ended_at LIMIT $2"
);

pub(super) async fn leftovers(store: &SqlStore, ended_before: DateTime<Utc>, limit: u32) -> Result<Vec<Leftover>> {
    let arguments = arguments![Moment(ended_before), i64::from(limit)];
    let rows: Vec<(SubmissionId, JobId, i32)> = store.driver.fetch(&LEFTOVERS, arguments).await?;
    let leftover = |(submission_id, job_id, attempt)| Leftover { submission_id, job_id, attempt: attempt as u32 };
    Ok(rows.into_iter().map(|(submission, job, attempt): (_, _, i32)| leftover((submission, job, attempt))).collect())
}

#[derive(Debug, Serialize)]
struct ForgottenRow {
    job_id: JobId,
    attempt: u32,
}

const FORGET_LEFTOVERS: Statement = statement!(
    "-- forget_leftovers(attempts)
    DELETE FROM leftovers WHERE (job_id, attempt) IN ",
    {
        "(SELECT job_id, attempt FROM jsonb_to_recordset($1::jsonb) AS gone(job_id uuid, attempt integer))"
            | "(SELECT value ->> 'job_id', value ->> 'attempt' FROM json_each($1))"
    }
);

pub(super) async fn forget_leftovers(store: &SqlStore, leftovers: &[Leftover]) -> Result<()> {
    let rows: Vec<ForgottenRow> =
        leftovers.iter().map(|leftover| ForgottenRow { job_id: leftover.job_id, attempt: leftover.attempt }).collect();
    let (mut transaction, _now) = store.begin().await?;
    transaction.execute(&FORGET_LEFTOVERS, arguments![json_list(&rows)]).await?;
    transaction.commit().await
}
