//! Claiming a window of deliveries.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use serde::Serialize;

use super::columns::Moment;
use super::counters::Moves;
use super::driver::{Statement, Transaction, arguments, given_ids, given_leases, json_list, statement};
use super::sql::SqlStore;
use super::{Claim, Result, dispatch, workers};
use crate::id::{JobId, LeaseToken, SubmissionId, WorkerId};
use crate::job::{ClaimedJob, JobState, Lease};
use crate::spec::RenderSpec;

/// A job that may be claimed.
#[derive(Debug, sqlx::FromRow)]
struct ClaimableJob {
    job_id: JobId,
    submission_id: SubmissionId,
    state: JobState,
    last_attempt: i32,
    #[sqlx(json)]
    failed_workers: Vec<String>,
    #[sqlx(json)]
    spec: RenderSpec,
}

// A delivery can overtake the dispatcher's commit: its row is locked then, and this waits for it. If
// the dispatcher dies instead, the row is still pending and just as good. What is queued was due when
// it was published, whatever this machine's clock says.
const LOCK_CLAIMABLE_JOBS: Statement = statement!(
    "-- lock_claimable_jobs(job_ids, now)
    SELECT job_id, submission_id, state, last_attempt, failed_workers, spec FROM jobs
    WHERE job_id IN ",
    given_ids,
    " AND CASE state WHEN 'queued' THEN true WHEN 'pending' THEN not_before <= $2 ELSE false END
    ORDER BY job_id",
    { " FOR UPDATE" | "" }
);

const LEASE_JOBS: Statement = statement!(
    "-- lease_jobs(grants, worker, now, expires_at)
    UPDATE jobs
    SET state = 'leased', worker = $2, token = given.token, expires_at = $4, started_at = $3,
        attempts = jobs.attempts + 1, last_attempt = jobs.last_attempt + 1
    FROM ",
    given_leases,
    " WHERE jobs.job_id = given.job_id"
);

/// A token for a job.
#[derive(Debug, Serialize)]
struct Grant {
    job_id: JobId,
    token: LeaseToken,
}

pub(super) async fn claim(store: &SqlStore, worker: &WorkerId, jobs: &[JobId], lease: Duration) -> Result<Claim> {
    if jobs.is_empty() {
        return Ok(Claim::default());
    }
    let (mut transaction, now) = store.begin().await?;
    let claimable: Vec<ClaimableJob> =
        transaction.fetch(&LOCK_CLAIMABLE_JOBS, arguments![json_list(jobs), now]).await?;
    if claimable.is_empty() {
        return Ok(Claim::default());
    }
    let mut moves = Moves::default();
    let (deferred, granted) = split_deferred(store, &mut transaction, worker, claimable, now).await?;
    for job in &deferred {
        moves.shift(job.submission_id, job.state, JobState::Pending, 1);
    }
    let deferred: Vec<JobId> = deferred.into_iter().map(|job| job.job_id).collect();
    if !deferred.is_empty() {
        dispatch::mark_pending(&mut transaction, &deferred, Moment(now.0 + store.settings.backoff)).await?;
    }
    for job in &granted {
        moves.shift(job.submission_id, job.state, JobState::Leased, 1);
    }
    let claimed = grant(&mut transaction, worker, granted, now, Moment(now.0 + lease)).await?;
    moves.count(&mut transaction, now).await?;
    transaction.commit().await?;
    Ok(Claim { claimed: in_order(claimed, jobs), deferred })
}

/// Takes out the jobs that this worker has failed before and that another live worker could still take.
async fn split_deferred(
    store: &SqlStore,
    transaction: &mut Transaction,
    worker: &WorkerId,
    jobs: Vec<ClaimableJob>,
    now: Moment,
) -> Result<(Vec<ClaimableJob>, Vec<ClaimableJob>)> {
    if !jobs.iter().any(|job| job.failed_workers.contains(&worker.0)) {
        return Ok((Vec::new(), jobs));
    }
    let others: HashSet<String> = workers::within(transaction, &store.settings, now)
        .await?
        .into_iter()
        .filter(|other| other.alive && !other.status.draining && other.status.worker_id != *worker)
        .map(|other| other.status.worker_id.0)
        .collect();
    let another_could = |job: &ClaimableJob| others.iter().any(|other| !job.failed_workers.contains(other));
    Ok(jobs.into_iter().partition(|job| job.failed_workers.contains(&worker.0) && another_could(job)))
}

async fn grant(
    transaction: &mut Transaction,
    worker: &WorkerId,
    jobs: Vec<ClaimableJob>,
    now: Moment,
    expires_at: Moment,
) -> Result<Vec<ClaimedJob>> {
    if jobs.is_empty() {
        return Ok(Vec::new());
    }
    let grants: Vec<Grant> = jobs.iter().map(|job| Grant { job_id: job.job_id, token: LeaseToken::new() }).collect();
    transaction.execute(&LEASE_JOBS, arguments![json_list(&grants), worker.0.clone(), now, expires_at]).await?;
    let claimed = |(job, grant): (ClaimableJob, Grant)| ClaimedJob {
        lease: Lease {
            job_id: job.job_id,
            submission_id: job.submission_id,
            attempt: job.last_attempt as u32 + 1,
            token: grant.token,
            expires_at: expires_at.0,
        },
        spec: job.spec,
    };
    Ok(jobs.into_iter().zip(grants).map(claimed).collect())
}

/// The claimed jobs in the order in which they were asked for: the broker's.
fn in_order(mut claimed: Vec<ClaimedJob>, asked: &[JobId]) -> Vec<ClaimedJob> {
    let places: HashMap<JobId, usize> = asked.iter().enumerate().rev().map(|(place, job)| (*job, place)).collect();
    claimed.sort_by_key(|job| places.get(&job.lease.job_id).copied());
    claimed
}
