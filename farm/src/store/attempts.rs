//! How attempts end: delivered, failed, released, cancelled. Every change to a leased job goes through
//! [`lock_leases`], which checks the fencing token and the time.

use std::collections::{HashMap, HashSet};
use std::slice;

use serde::Serialize;

use super::columns::Moment;
use super::counters::{self, Moves};
use super::driver::{Statement, Transaction, arguments, given_leases, json_list, statement};
use super::lifecycle::{EndedAttempt, Ending, LeasedJob, end_attempt};
use super::sql::SqlStore;
use super::{Result, cancel};
use crate::id::{JobId, LeaseToken, SubmissionId, WorkerId};
use crate::job::{Failure, Finished, JobState, Lease};

/// A lease as statements unpack it.
#[derive(Debug, Serialize)]
struct Given {
    job_id: JobId,
    token: LeaseToken,
}

/// Leases as the one JSON parameter of a statement.
pub(super) fn given<'a>(leases: impl IntoIterator<Item = &'a Lease>) -> String {
    let given: Vec<Given> =
        leases.into_iter().map(|lease| Given { job_id: lease.job_id, token: lease.token }).collect();
    json_list(&given)
}

// In id order, as everywhere: two transactions then never wait for each other. The cross join makes
// SQLite look each given job up instead of reading all that are leased.
const LOCK_LEASES: Statement = statement!(
    "-- lock_leases(leases, now)
    SELECT jobs.job_id, jobs.submission_id, jobs.attempts, jobs.max_attempts, jobs.last_attempt,
           jobs.cancel_requested, jobs.worker, jobs.failed_workers
    FROM ",
    given_leases,
    " CROSS JOIN jobs
    WHERE jobs.job_id = given.job_id
      AND jobs.state = 'leased' AND jobs.token = given.token AND jobs.expires_at > $2
    ORDER BY jobs.job_id",
    { " FOR UPDATE OF jobs" | "" }
);

/// Those of the leased jobs whose lease still holds, their rows locked.
async fn lock_leases<'a>(
    transaction: &mut Transaction,
    leases: impl IntoIterator<Item = &'a Lease>,
    now: Moment,
) -> Result<Vec<LeasedJob>> {
    let given = given(leases);
    transaction.fetch(&LOCK_LEASES, arguments![given, now]).await
}

/// A delivered job as `mark_done` unpacks it.
#[derive(Debug, Serialize)]
struct DoneRow<'a> {
    job_id: JobId,
    image_key: &'a str,
    sidecar_key: &'a str,
    sha256: &'a str,
    render_ms: u64,
}

impl<'a> From<&'a Finished> for DoneRow<'a> {
    fn from(finished: &'a Finished) -> Self {
        Self {
            job_id: finished.lease.job_id,
            image_key: &finished.image_key,
            sidecar_key: &finished.sidecar_key,
            sha256: &finished.sha256,
            render_ms: finished.render_time.as_millis() as u64,
        }
    }
}

const MARK_DONE: Statement = statement!(
    "-- mark_done(results, now)
    UPDATE jobs
    SET state = 'done', token = NULL, expires_at = NULL, cancel_requested = false, finished_at = $2,
        image_key = result.image_key, sidecar_key = result.sidecar_key, sha256 = result.sha256,
        render_ms = result.render_ms
    FROM ",
    {
        "jsonb_to_recordset($1::jsonb)
        AS result(job_id uuid, image_key text, sidecar_key text, sha256 text, render_ms bigint)"
            | "(SELECT value ->> 'job_id' AS job_id, value ->> 'image_key' AS image_key,
               value ->> 'sidecar_key' AS sidecar_key, value ->> 'sha256' AS sha256,
               value ->> 'render_ms' AS render_ms FROM json_each($1)) AS result"
    },
    " WHERE jobs.job_id = result.job_id"
);

// Object keys carry the attempt, so a row with this key has been finished by this very attempt.
const DONE_ALREADY: Statement = statement!(
    "-- done_already(results)
    SELECT jobs.job_id FROM ",
    {
        "jsonb_to_recordset($1::jsonb) AS result(job_id uuid, image_key text)"
            | "(SELECT value ->> 'job_id' AS job_id, value ->> 'image_key' AS image_key FROM json_each($1)) AS result"
    },
    " CROSS JOIN jobs
    WHERE jobs.job_id = result.job_id AND jobs.state = 'done' AND jobs.image_key = result.image_key"
);

pub(super) async fn finish(store: &SqlStore, finished: &[Finished]) -> Result<Vec<JobId>> {
    let (mut transaction, now) = store.begin().await?;
    let held = lock_leases(&mut transaction, finished.iter().map(|one| &one.lease), now).await?;
    let held: HashMap<JobId, SubmissionId> = held.iter().map(|job| (job.job_id, job.submission_id)).collect();
    let (won, lost): (Vec<&Finished>, Vec<&Finished>) =
        finished.iter().partition(|one| held.contains_key(&one.lease.job_id));
    let mut done: HashSet<JobId> = held.keys().copied().collect();
    if !lost.is_empty() {
        // The caller may have seen its connection break after the commit, and says it again.
        let rows: Vec<DoneRow<'_>> = lost.into_iter().map(DoneRow::from).collect();
        let before: Vec<(JobId,)> = transaction.fetch(&DONE_ALREADY, arguments![json_list(&rows)]).await?;
        done.extend(before.into_iter().map(|(job,)| job));
    }
    if !won.is_empty() {
        let mut moves = Moves::default();
        for submission in held.values() {
            moves.shift(*submission, JobState::Leased, JobState::Done, 1);
        }
        let rows: Vec<DoneRow<'_>> = won.into_iter().map(DoneRow::from).collect();
        transaction.execute(&MARK_DONE, arguments![json_list(&rows), now]).await?;
        moves.count(&mut transaction, now).await?;
        transaction.commit().await?;
    }
    Ok(finished.iter().map(|one| one.lease.job_id).filter(|job| done.contains(job)).collect())
}

const END_ATTEMPTS: Statement = statement!(
    "-- end_attempts(endings, now)
    UPDATE jobs
    SET state = ended.state, token = NULL, expires_at = NULL, cancel_requested = false,
        attempts = ended.attempts, failed_workers = ended.failed_workers,
        error_kind = coalesce(ended.error_kind, jobs.error_kind),
        error_message = coalesce(ended.error_message, jobs.error_message),
        not_before = CASE WHEN ended.state = 'pending' THEN ",
    { "$2 + ended.delay * interval '1 microsecond'" | "$2 + ended.delay" },
    "
                          ELSE jobs.not_before END,
        finished_at = CASE WHEN ended.state = 'pending' THEN NULL ELSE $2 END
    FROM ",
    {
        "jsonb_to_recordset($1::jsonb) AS ended(job_id uuid, state text, attempts integer, delay bigint,
                                             error_kind text, error_message text, failed_workers jsonb)"
            | "(SELECT value ->> 'job_id' AS job_id, value ->> 'state' AS state, value ->> 'attempts' AS attempts,
               value ->> 'delay' AS delay, value ->> 'error_kind' AS error_kind,
               value ->> 'error_message' AS error_message, value -> 'failed_workers' AS failed_workers
        FROM json_each($1)) AS ended"
    },
    " WHERE jobs.job_id = ended.job_id"
);

/// An attempt whose objects may have to be deleted, as `insert_leftovers` unpacks it.
#[derive(Debug, Serialize)]
struct LeftoverRow {
    job_id: JobId,
    attempt: i32,
    submission_id: SubmissionId,
}

const INSERT_LEFTOVERS: Statement = statement!(
    "-- insert_leftovers(attempts, now)
    INSERT INTO leftovers (job_id, attempt, submission_id, ended_at)
    SELECT lost.job_id, lost.attempt, lost.submission_id, $2
    FROM ",
    {
        "jsonb_to_recordset($1::jsonb) AS lost(job_id uuid, attempt integer, submission_id uuid)"
            | "(SELECT value ->> 'job_id' AS job_id, value ->> 'attempt' AS attempt,
               value ->> 'submission_id' AS submission_id FROM json_each($1)) AS lost"
    }
);

/// Ends the attempts of locked jobs: moves the jobs, remembers what the attempts may have left behind,
/// counts, and cancels the rest of a submission in which too many jobs have failed.
pub(super) async fn end_attempts(transaction: &mut Transaction, endings: &[EndedAttempt], now: Moment) -> Result<()> {
    if endings.is_empty() {
        return Ok(());
    }
    let mut moves = Moves::default();
    let mut leftovers = Vec::with_capacity(endings.len());
    for ended in endings {
        let EndedAttempt { job_id, attempt, submission_id, state, .. } = *ended;
        moves.shift(submission_id, JobState::Leased, state, 1);
        leftovers.push(LeftoverRow { job_id, attempt, submission_id });
    }
    transaction.execute(&END_ATTEMPTS, arguments![json_list(endings), now]).await?;
    transaction.execute(&INSERT_LEFTOVERS, arguments![json_list(&leftovers), now]).await?;
    for (submission, failed) in moves.failing() {
        if reaches_failure_limit(transaction, submission, failed).await? {
            cancel::cancel_rest(transaction, submission, now, &mut moves).await?;
        }
    }
    moves.count(transaction, now).await
}

// Of two transactions that fail a job each, the second has to see the first one's count.
const LOCK_FAILURE_LIMIT: Statement = statement!(
    "-- lock_failure_limit(submission_id)
    SELECT failure_limit FROM submissions WHERE submission_id = $1 AND failure_limit IS NOT NULL",
    { " FOR NO KEY UPDATE" | "" }
);

/// Whether a submission has failed as many jobs as it may, `failed` of them in this transaction.
async fn reaches_failure_limit(transaction: &mut Transaction, submission: SubmissionId, failed: u64) -> Result<bool> {
    let limit: Option<(i64,)> = transaction.fetch_optional(&LOCK_FAILURE_LIMIT, arguments![submission]).await?;
    let Some((limit,)) = limit else { return Ok(false) };
    let before = counters::read_within(transaction, submission).await?.failed;
    Ok(before + failed >= limit as u64)
}

pub(super) async fn fail(
    store: &SqlStore,
    worker: &WorkerId,
    lease: &Lease,
    failure: &Failure,
) -> Result<Option<JobState>> {
    let ended = end(store, slice::from_ref(lease), &Ending::Failed(worker, failure)).await?;
    Ok(ended.first().map(|ended| ended.state))
}

pub(super) async fn release(store: &SqlStore, leases: &[Lease]) -> Result<u64> {
    Ok(end(store, leases, &Ending::Released).await?.len() as u64)
}

pub(super) async fn cancelled(store: &SqlStore, lease: &Lease) -> Result<bool> {
    Ok(!end(store, slice::from_ref(lease), &Ending::Cancelled).await?.is_empty())
}

/// Ends the attempts whose leases still hold; which did, and how.
async fn end(store: &SqlStore, leases: &[Lease], ending: &Ending<'_>) -> Result<Vec<EndedAttempt>> {
    let (mut transaction, now) = store.begin().await?;
    let held = lock_leases(&mut transaction, leases, now).await?;
    let ended: Vec<EndedAttempt> = held.into_iter().map(|job| end_attempt(job, ending, &store.settings)).collect();
    end_attempts(&mut transaction, &ended, now).await?;
    transaction.commit().await?;
    Ok(ended)
}
