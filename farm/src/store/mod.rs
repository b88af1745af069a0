//! The store: what is true about submissions, jobs and workers. On Postgres for a farm, on SQLite for
//! one machine, held together by one conformance suite.
//!
//! Reading order: [`Store`] is the port. `sql` says which verb is written where; the verbs are
//! `submit`, `listing`, `dispatch`, `claim`, `attempts`, `cancel`, `sweep` and `workers`, each with its
//! statements beside it. `lifecycle` decides what becomes of a job and `counters` counts it. Below them,
//! `driver` runs a statement in either dialect, `columns` says how our types stand in columns, and
//! `postgres`, `sqlite`, `schema` and `error` know the databases.
//!
//! Invariant: no transaction waits for a client or for a device; the one that publishes waits for the
//! broker, for a bounded time.

mod sql;

mod attempts;
mod cancel;
mod claim;
mod dispatch;
mod listing;
mod submit;
mod sweep;
mod workers;

mod counters;
mod lifecycle;

mod columns;
mod driver;
mod error;
mod postgres;
mod schema;
pub mod scratch;
mod sqlite;

pub use schema::{migrate, revert};

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use chrono::{DateTime, Utc};
use futures_util::Stream;

use self::schema::Address;
use self::sql::SqlStore;
use crate::broker::Broker;
use crate::clock::Clock;
pub use crate::fleet::{DEMAND_BOUND, Demand, TextStatus, WorkerStatus, WorkerView};
use crate::id::{JobId, SubmissionId, WorkerId};
use crate::job::{
    ClaimedJob, Counters, Failure, Finished, Idempotency, JobState, JobView, Lease, NewJob, NewSubmission,
    SubmissionView,
};
use crate::message::QueueKey;

/// What can go wrong with a store. Callers branch on the kind; logs get the chain.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Nobody answers, or the connection broke: try again later.
    #[error("the store is unavailable: {0}")]
    Unavailable(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The disk is full.
    #[error("the store's disk is full: {0}")]
    Full(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The schema is not the one this build needs.
    #[error("the store's schema is at version {found}, this build needs {needed}: run `kiln migrate`")]
    Schema {
        /// The version the store has.
        found: i64,
        /// The version this build needs.
        needed: i64,
    },
    /// The stream of jobs that `submit` read from failed; nothing was stored.
    #[error("the submission was not stored: {0}")]
    Source(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// A broken invariant or an error that trying again will not mend.
    #[error("the store failed: {0}")]
    Internal(#[source] Box<dyn std::error::Error + Send + Sync>),
}

/// Shorthand.
pub type Result<T, E = StoreError> = std::result::Result<T, E>;

/// The jobs of a submission, in order. An error ends the submission: nothing of it is stored.
pub type JobStream<'a> =
    Pin<Box<dyn Stream<Item = std::result::Result<NewJob, Box<dyn std::error::Error + Send + Sync>>> + Send + 'a>>;

/// How a submission ended up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Submitted {
    /// Stored, with so many jobs.
    Created {
        /// Jobs stored.
        jobs: u64,
    },
    /// The same key and request came before: this is what it made then.
    Existing {
        /// The submission made then.
        submission_id: SubmissionId,
        /// Its first job.
        first_job: JobId,
    },
    /// The same key came before with another request.
    Conflict,
}

/// Which jobs to list: filters that hold together, and a keyset page.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct JobFilter {
    /// Of this submission.
    pub submission_id: Option<SubmissionId>,
    /// In this state.
    pub state: Option<JobState>,
    /// Of this checkpoint.
    pub model: Option<String>,
    /// With this tag.
    pub tag: Option<String>,
    /// After this job (exclusive), in id order: the last id of the page before.
    pub after: Option<JobId>,
    /// At most so many.
    pub limit: u32,
}

/// What became of a claim.
#[derive(Debug, Default)]
pub struct Claim {
    /// Leased to the caller, in the order asked for.
    pub claimed: Vec<ClaimedJob>,
    // A delivery that is in neither list is stale (done, cancelled, leased to another, or not due yet): it is
    // acked away, and the store knows what becomes of it.
    /// Given back to pending, since this worker failed them before and another live one could take them.
    pub deferred: Vec<JobId>,
}

/// What a heartbeat brings back.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Heartbeat {
    /// Leases that are no longer the worker's: drop the rows, deliver nothing.
    pub lost: Vec<JobId>,
    /// Jobs that a client wants to stop: drop the row, then say so with [`Store::cancelled`].
    pub cancelled: Vec<JobId>,
}

/// An object that an attempt which did not win may have left behind.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Leftover {
    /// The submission.
    pub submission_id: SubmissionId,
    /// The job.
    pub job_id: JobId,
    /// The attempt.
    pub attempt: u32,
}

/// What a sweep of the reaper did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reaped {
    /// Leases that had expired, back to pending.
    pub retried: u64,
    /// Leases that had expired, with no attempt left.
    pub failed: u64,
    /// Leases that had expired, of jobs that a client had cancelled.
    pub cancelled: u64,
}

/// Settings every implementation shares.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StoreSettings {
    /// First wait before a failed job is tried again; doubles with each attempt.
    pub backoff: Duration,
    /// The longest such wait.
    pub backoff_max: Duration,
    /// A worker silent for longer is dead.
    pub worker_timeout: Duration,
    /// Connections of the pool.
    pub connections: u32,
}

impl Default for StoreSettings {
    fn default() -> Self {
        Self {
            backoff: Duration::from_secs(2),
            backoff_max: Duration::from_secs(300),
            worker_timeout: Duration::from_secs(30),
            connections: 10,
        }
    }
}

/// A pure choice made while the store holds still, see [`Store::place`].
pub type Decide<'a> =
    &'a (dyn for<'d> Fn(&'d [Demand], &'d [WorkerView], DateTime<Utc>) -> Option<String> + Send + Sync);

/// What is true about submissions, jobs and workers.
///
/// Every method is one transaction: it happens whole or not at all, and a job's move and its
/// submission's counters change together. The time is the implementation's [`crate::clock::Clock`].
#[async_trait]
pub trait Store: Send + Sync + 'static {
    /// Answers if the store can be reached and its schema is this build's.
    async fn ping(&self) -> Result<()>;

    /// Stores a submission with all its jobs (as `pending`) or nothing; one without jobs is refused. Reads
    /// the stream in chunks: memory does not grow with the number of jobs. A transaction is open
    /// meanwhile (on SQLite nobody else can write), so the stream should not wait for a slow client.
    async fn submit(&self, submission: &NewSubmission, jobs: JobStream<'_>) -> Result<Submitted>;

    /// What an earlier request with that idempotency key made, without storing anything; `None` if
    /// the key is new.
    async fn find_idempotent(&self, idempotency: &Idempotency) -> Result<Option<Submitted>>;

    /// One job.
    async fn job(&self, job: JobId) -> Result<Option<JobView>>;

    /// A page of jobs in id order.
    async fn jobs(&self, filter: &JobFilter) -> Result<Vec<JobView>>;

    /// One submission: O(1), whatever its size.
    async fn submission(&self, submission: SubmissionId) -> Result<Option<SubmissionView>>;

    /// A page of submissions, newest first, older than `before`.
    async fn submissions(&self, before: Option<SubmissionId>, limit: u32) -> Result<Vec<SubmissionView>>;

    /// Cancels a job: at once if it is pending or queued, at its next step boundary if leased. The
    /// state after the call; `None` if there is no such job.
    async fn cancel_job(&self, job: JobId) -> Result<Option<JobState>>;

    /// Cancels all that is not final; the counters after the call.
    async fn cancel_submission(&self, submission: SubmissionId) -> Result<Option<Counters>>;

    /// Gives a failed or cancelled job its attempts anew; the state after the call.
    async fn retry_job(&self, job: JobId) -> Result<Option<JobState>>;

    /// The same for every failed (and, with `cancelled`, every cancelled) job of a submission; how
    /// many.
    async fn retry_submission(&self, submission: SubmissionId, cancelled: bool) -> Result<Option<u64>>;

    /// Takes up to `limit` due pending jobs of a queue, oldest first, publishes them and marks those
    /// that the broker confirmed as queued. Several schedulers may do it at once without taking the
    /// same job. A crash in between may publish twice, never lose. How many were marked.
    async fn dispatch(&self, queue: &QueueKey, limit: u32, broker: &dyn Broker) -> Result<u64>;

    /// Work that waits, by checkpoint and lane; only queues with any.
    async fn demand(&self) -> Result<Vec<Demand>>;

    /// Back to pending: jobs of a queue that have been `queued` since before `queued_before`. For the
    /// reconciler, which has seen that the broker does not hold them. How many.
    async fn requeue(&self, queue: &QueueKey, queued_before: DateTime<Utc>) -> Result<u64>;

    /// How many jobs of a queue have been `queued` since before `queued_before`.
    async fn queued_since(&self, queue: &QueueKey, queued_before: DateTime<Utc>) -> Result<u64>;

    /// Claims a window of deliveries at once: queued jobs (and pending ones that are due: published a
    /// moment ago) become leased by `worker` until now + `lease`, each with a token and the next attempt's
    /// number. A delivery that overtakes the dispatcher's commit waits for it.
    async fn claim(&self, worker: &WorkerId, jobs: &[JobId], lease: Duration) -> Result<Claim>;

    /// Done: stores the result of each job whose lease still holds, in one transaction. Which did, also if
    /// this very result has been stored before (so that a caller may ask again whose answer got lost);
    /// what was delivered under a lost lease is the caller's to delete.
    async fn finish(&self, finished: &[Finished]) -> Result<Vec<JobId>>;

    /// The attempt failed: back to pending with back-off, or failed when attempts are spent or the
    /// failure is final. The worker is remembered as one that failed it. The state after the call;
    /// `None` if the lease was lost.
    async fn fail(&self, worker: &WorkerId, lease: &Lease, failure: &Failure) -> Result<Option<JobState>>;

    /// Gives leases back unspent (the attempt does not count, its number is not given again): for an
    /// orderly stop. How many.
    async fn release(&self, leases: &[Lease]) -> Result<u64>;

    /// The row of a cancelled job has been dropped. False if the lease was lost.
    async fn cancelled(&self, lease: &Lease) -> Result<bool>;

    /// Records the worker's state and renews all its leases in one statement each; which are lost,
    /// which to cancel.
    async fn heartbeat(&self, status: &WorkerStatus, leases: &[Lease], lease: Duration) -> Result<Heartbeat>;

    /// The worker leaves for good.
    async fn goodbye(&self, worker: &WorkerId) -> Result<()>;

    /// Workers, the live ones first; those silent for over a day are left out.
    async fn workers(&self) -> Result<Vec<WorkerView>>;

    /// Decides what `worker` serves next. `decide` sees the demand and the fleet while no other
    /// worker can decide (so that idle workers don't stampede); its answer is recorded as what the
    /// worker serves.
    async fn place(&self, worker: &WorkerId, decide: Decide<'_>) -> Result<Option<String>>;

    /// Takes jobs whose lease has expired back: pending with back-off, failed when attempts are
    /// spent, cancelled if a client asked for it.
    async fn reap(&self, limit: u32) -> Result<Reaped>;

    /// Attempts that did not win and ended before `ended_before`, whose objects may have to be
    /// deleted.
    async fn leftovers(&self, ended_before: DateTime<Utc>, limit: u32) -> Result<Vec<Leftover>>;

    /// Forgets leftovers that have been deleted.
    async fn forget_leftovers(&self, leftovers: &[Leftover]) -> Result<()>;

    /// Jobs by state over all submissions (from counters, never counting rows).
    async fn totals(&self) -> Result<Counters>;
}

/// A shared store.
pub type SharedStore = Arc<dyn Store>;

/// Opens the store at `url` (`postgres://…`, `sqlite:PATH` or `sqlite::memory:`) and brings its schema up
/// to date. Fails with [`StoreError::Unavailable`] within seconds if nobody answers there, and with
/// [`StoreError::Schema`] if the schema is newer than this build.
pub async fn connect(url: &str, settings: &StoreSettings, clock: Arc<dyn Clock>) -> Result<SharedStore> {
    let driver = match url.parse()? {
        Address::Postgres(options) => {
            schema::migrate(url).await?;
            postgres::open(options, settings)
        }
        Address::Sqlite(options) => sqlite::open(options, settings).await?,
    };
    schema::check(&driver).await?;
    Ok(Arc::new(SqlStore { driver, settings: *settings, clock }))
}
