//! The one store over both databases: which verb is written where.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use chrono::{DateTime, SubsecRound, Utc};

use super::columns::Moment;
use super::driver::{Driver, Transaction};
use super::error::is_conflict;
use super::{
    Claim, Decide, Demand, Heartbeat, JobFilter, JobStream, Leftover, Reaped, Result, Store, StoreSettings, Submitted,
    WorkerStatus, WorkerView, attempts, cancel, claim, dispatch, listing, schema, submit, sweep, workers,
};
use crate::broker::Broker;
use crate::clock::Clock;
use crate::id::{JobId, SubmissionId, WorkerId};
use crate::job::{Counters, Failure, Finished, Idempotency, JobState, JobView, Lease, NewSubmission, SubmissionView};
use crate::message::QueueKey;

/// How often a transaction that gave way to another is run again.
const CONFLICT_RETRIES: u32 = 5;

/// A store on a database.
#[derive(Debug)]
pub(super) struct SqlStore {
    pub(super) driver: Driver,
    pub(super) settings: StoreSettings,
    pub(super) clock: Arc<dyn Clock>,
}

impl SqlStore {
    /// Now, to the microsecond: as precise as it can be stored.
    pub(super) fn now(&self) -> Moment {
        Moment(self.clock.now().trunc_subsecs(6))
    }

    /// Begins a transaction. The time is read once it has begun: it may have had to wait.
    pub(super) async fn begin(&self) -> Result<(Transaction, Moment)> {
        let transaction = self.driver.begin().await?;
        Ok((transaction, self.now()))
    }
}

/// Runs a transaction again that Postgres has broken off in favour of another.
async fn retried<T, F>(mut transact: impl FnMut() -> F + Send) -> Result<T>
where
    F: Future<Output = Result<T>> + Send,
{
    let mut retries = 0;
    loop {
        match transact().await {
            Err(error) if is_conflict(&error) && retries < CONFLICT_RETRIES => retries += 1,
            outcome => return outcome,
        }
    }
}

#[async_trait]
impl Store for SqlStore {
    async fn ping(&self) -> Result<()> {
        schema::check(&self.driver).await
    }

    async fn submit(&self, submission: &NewSubmission, jobs: JobStream<'_>) -> Result<Submitted> {
        submit::submit(self, submission, jobs).await
    }

    async fn find_idempotent(&self, idempotency: &Idempotency) -> Result<Option<Submitted>> {
        submit::find_idempotent(self, idempotency).await
    }

    async fn job(&self, job: JobId) -> Result<Option<JobView>> {
        listing::job(self, job).await
    }

    async fn jobs(&self, filter: &JobFilter) -> Result<Vec<JobView>> {
        listing::jobs(self, filter).await
    }

    async fn submission(&self, submission: SubmissionId) -> Result<Option<SubmissionView>> {
        listing::submission(self, submission).await
    }

    async fn submissions(&self, before: Option<SubmissionId>, limit: u32) -> Result<Vec<SubmissionView>> {
        listing::submissions(self, before, limit).await
    }

    async fn cancel_job(&self, job: JobId) -> Result<Option<JobState>> {
        retried(|| cancel::cancel_job(self, job)).await
    }

    async fn cancel_submission(&self, submission: SubmissionId) -> Result<Option<Counters>> {
        retried(|| cancel::cancel_submission(self, submission)).await
    }

    async fn retry_job(&self, job: JobId) -> Result<Option<JobState>> {
        retried(|| cancel::retry_job(self, job)).await
    }

    async fn retry_submission(&self, submission: SubmissionId, cancelled: bool) -> Result<Option<u64>> {
        retried(|| cancel::retry_submission(self, submission, cancelled)).await
    }

    async fn dispatch(&self, queue: &QueueKey, limit: u32, broker: &dyn Broker) -> Result<u64> {
        dispatch::dispatch(self, queue, limit, broker).await
    }

    async fn demand(&self) -> Result<Vec<Demand>> {
        dispatch::demand(self).await
    }

    async fn requeue(&self, queue: &QueueKey, queued_before: DateTime<Utc>) -> Result<u64> {
        retried(|| dispatch::requeue(self, queue, queued_before)).await
    }

    async fn queued_since(&self, queue: &QueueKey, queued_before: DateTime<Utc>) -> Result<u64> {
        dispatch::queued_since(self, queue, queued_before).await
    }

    async fn claim(&self, worker: &WorkerId, jobs: &[JobId], lease: Duration) -> Result<Claim> {
        retried(|| claim::claim(self, worker, jobs, lease)).await
    }

    async fn finish(&self, finished: &[Finished]) -> Result<Vec<JobId>> {
        retried(|| attempts::finish(self, finished)).await
    }

    async fn fail(&self, worker: &WorkerId, lease: &Lease, failure: &Failure) -> Result<Option<JobState>> {
        retried(|| attempts::fail(self, worker, lease, failure)).await
    }

    async fn release(&self, leases: &[Lease]) -> Result<u64> {
        retried(|| attempts::release(self, leases)).await
    }

    async fn cancelled(&self, lease: &Lease) -> Result<bool> {
        retried(|| attempts::cancelled(self, lease)).await
    }

    async fn heartbeat(&self, status: &WorkerStatus, leases: &[Lease], lease: Duration) -> Result<Heartbeat> {
        retried(|| workers::heartbeat(self, status, leases, lease)).await
    }

    async fn goodbye(&self, worker: &WorkerId) -> Result<()> {
        workers::goodbye(self, worker).await
    }

    async fn workers(&self) -> Result<Vec<WorkerView>> {
        workers::workers(self).await
    }

    async fn place(&self, worker: &WorkerId, decide: Decide<'_>) -> Result<Option<String>> {
        workers::place(self, worker, decide).await
    }

    async fn reap(&self, limit: u32) -> Result<Reaped> {
        retried(|| sweep::reap(self, limit)).await
    }

    async fn leftovers(&self, ended_before: DateTime<Utc>, limit: u32) -> Result<Vec<Leftover>> {
        sweep::leftovers(self, ended_before, limit).await
    }

    async fn forget_leftovers(&self, leftovers: &[Leftover]) -> Result<()> {
        sweep::forget_leftovers(self, leftovers).await
    }

    async fn totals(&self) -> Result<Counters> {
        listing::totals(self).await
    }
}
