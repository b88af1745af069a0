//! What clients change: cancelling and trying again.

use super::Result;
use super::columns::Moment;
use super::counters::{self, Moves};
use super::driver::{Statement, Transaction, arguments, statement};
use super::sql::SqlStore;
use crate::id::{JobId, SubmissionId};
use crate::job::{Counters, JobState};

/// A job and where it stands, its row locked.
#[derive(Debug, sqlx::FromRow)]
struct LockedJob {
    submission_id: SubmissionId,
    state: JobState,
}

const LOCK_JOB: Statement = statement!(
    "-- lock_job(job_id)
    SELECT submission_id, state FROM jobs WHERE job_id = $1",
    { " FOR UPDATE" | "" }
);

const CANCEL_JOB: Statement = statement!(
    "-- cancel_job(job_id, now)
    UPDATE jobs SET state = 'cancelled', finished_at = $2 WHERE job_id = $1"
);

const REQUEST_CANCELLATION: Statement = statement!(
    "-- request_cancellation(job_id)
    UPDATE jobs SET cancel_requested = true WHERE job_id = $1"
);

pub(super) async fn cancel_job(store: &SqlStore, job: JobId) -> Result<Option<JobState>> {
    let (mut transaction, now) = store.begin().await?;
    let locked: Option<LockedJob> = transaction.fetch_optional(&LOCK_JOB, arguments![job]).await?;
    let Some(LockedJob { submission_id, state }) = locked else { return Ok(None) };
    let state = match state {
        JobState::Pending | JobState::Queued => {
            transaction.execute(&CANCEL_JOB, arguments![job, now]).await?;
            let mut moves = Moves::default();
            moves.shift(submission_id, state, JobState::Cancelled, 1);
            moves.count(&mut transaction, now).await?;
            JobState::Cancelled
        }
        JobState::Leased => {
            transaction.execute(&REQUEST_CANCELLATION, arguments![job]).await?;
            state
        }
        JobState::Done | JobState::Failed | JobState::Cancelled => state,
    };
    transaction.commit().await?;
    Ok(Some(state))
}

// Locked before they are moved state by state, or one that moves in between could slip through.
const LOCK_REST: Statement = statement!(
    "-- lock_rest(submission_id)
    SELECT count(*) FROM (
        SELECT job_id FROM jobs
        WHERE submission_id = $1 AND state IN ('pending', 'queued', 'leased') ORDER BY job_id",
    { " FOR UPDATE" | "" },
    ") AS locked"
)
.bulk();

const CANCEL_JOBS: Statement = statement!(
    "-- cancel_jobs(submission_id, state, now)
    UPDATE jobs SET state = 'cancelled', finished_at = $3 WHERE submission_id = $1 AND state = $2"
)
.bulk();

const REQUEST_CANCELLATIONS: Statement = statement!(
    "-- request_cancellations(submission_id)
    UPDATE jobs SET cancel_requested = true WHERE submission_id = $1 AND state = 'leased'"
)
.bulk();

/// Cancels all that is not final: what waits at once, what is leased at its next step boundary.
pub(super) async fn cancel_rest(
    transaction: &mut Transaction,
    submission: SubmissionId,
    now: Moment,
    moves: &mut Moves,
) -> Result<()> {
    let _locked: Option<(i64,)> = transaction.fetch_optional(&LOCK_REST, arguments![submission]).await?;
    for state in [JobState::Pending, JobState::Queued] {
        let jobs = transaction.execute(&CANCEL_JOBS, arguments![submission, state, now]).await?;
        moves.shift(submission, state, JobState::Cancelled, jobs as i64);
    }
    transaction.execute(&REQUEST_CANCELLATIONS, arguments![submission]).await?;
    Ok(())
}

const LOCK_SUBMISSION: Statement = statement!(
    "-- lock_submission(submission_id)
    SELECT jobs FROM submissions WHERE submission_id = $1",
    { " FOR NO KEY UPDATE" | "" }
);

pub(super) async fn cancel_submission(store: &SqlStore, submission: SubmissionId) -> Result<Option<Counters>> {
    let (mut transaction, now) = store.begin().await?;
    let locked: Option<(i64,)> = transaction.fetch_optional(&LOCK_SUBMISSION, arguments![submission]).await?;
    if locked.is_none() {
        return Ok(None);
    }
    let mut moves = Moves::default();
    cancel_rest(&mut transaction, submission, now, &mut moves).await?;
    moves.count(&mut transaction, now).await?;
    let counters = counters::read_within(&mut transaction, submission).await?;
    transaction.commit().await?;
    Ok(Some(counters))
}

macro_rules! anew {
    ($dialect:ident) => {
        "UPDATE jobs
    SET state = 'pending', attempts = 0, failed_workers = '[]', error_kind = NULL, error_message = NULL,
        not_before = $2, queued_at = NULL, started_at = NULL, finished_at = NULL, worker = NULL"
    };
}

const RETRY_JOB: Statement = statement!("-- retry_job(job_id, now)\n    ", anew, " WHERE job_id = $1");

const RETRY_JOBS: Statement =
    statement!("-- retry_jobs(submission_id, now, state)\n    ", anew, " WHERE submission_id = $1 AND state = $3")
        .bulk();

pub(super) async fn retry_job(store: &SqlStore, job: JobId) -> Result<Option<JobState>> {
    let (mut transaction, now) = store.begin().await?;
    let locked: Option<LockedJob> = transaction.fetch_optional(&LOCK_JOB, arguments![job]).await?;
    let Some(LockedJob { submission_id, state }) = locked else { return Ok(None) };
    if !matches!(state, JobState::Failed | JobState::Cancelled) {
        return Ok(Some(state));
    }
    transaction.execute(&RETRY_JOB, arguments![job, now]).await?;
    let mut moves = Moves::default();
    moves.shift(submission_id, state, JobState::Pending, 1);
    moves.count(&mut transaction, now).await?;
    transaction.commit().await?;
    Ok(Some(JobState::Pending))
}

pub(super) async fn retry_submission(
    store: &SqlStore,
    submission: SubmissionId,
    cancelled: bool,
) -> Result<Option<u64>> {
    let (mut transaction, now) = store.begin().await?;
    let locked: Option<(i64,)> = transaction.fetch_optional(&LOCK_SUBMISSION, arguments![submission]).await?;
    if locked.is_none() {
        return Ok(None);
    }
    let states = if cancelled { &[JobState::Failed, JobState::Cancelled][..] } else { &[JobState::Failed] };
    let mut moves = Moves::default();
    let mut retried = 0;
    for state in states {
        let jobs = transaction.execute(&RETRY_JOBS, arguments![submission, now, *state]).await?;
        moves.shift(submission, *state, JobState::Pending, jobs as i64);
        retried += jobs;
    }
    moves.count(&mut transaction, now).await?;
    transaction.commit().await?;
    Ok(Some(retried))
}
