//! A database for each test, and short words for what tests do with it.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::panic::{AssertUnwindSafe, resume_unwind};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use chrono::{DateTime, Utc};
use farm::broker::{Broker, BrokerError, Consumer, ProgressStream};
use farm::clock::{Clock, MockClock};
use farm::id::{JobId, SubmissionId, WorkerId};
use farm::job::{
    ClaimedJob, Counters, Failure, FailureKind, Finished, JobState, JobView, Lane, Lease, NewJob, NewSubmission,
};
use farm::message::{JobMessage, ProgressEvent, QueueKey};
use farm::spec::RenderSpec;
use farm::store::{self, Claim, JobFilter, SharedStore, StoreSettings, Submitted, TextStatus, WorkerStatus, scratch};
use futures_util::{FutureExt, stream};
use sqlx::{AssertSqlSafe, Connection, PgConnection, SqliteConnection};

use crate::services;

/// How long leases last in these tests.
pub const LEASE: Duration = Duration::from_secs(60);

/// A store, its clock, and a way around it for looking at rows.
pub struct TestFarm {
    pub store: SharedStore,
    pub clock: MockClock,
    pub broker: RecordingBroker,
    pub url: String,
}

pub fn settings() -> StoreSettings {
    StoreSettings {
        backoff: Duration::from_secs(2),
        backoff_max: Duration::from_secs(10),
        worker_timeout: Duration::from_secs(30),
        connections: 10,
    }
}

/// When every test begins: at the start of a minute, for the tests that count by minutes.
fn start() -> DateTime<Utc> {
    "2026-11-21T08:00:00Z".parse().expect("a time")
}

pub fn on_sqlite(test: impl AsyncFnOnce(&TestFarm)) {
    let folder = tempfile::tempdir().expect("a folder");
    let url = format!("sqlite:{}", folder.path().join("data").join("kiln.db").display());
    runtime().block_on(async { resume(run(url, test).await) });
}

pub fn on_postgres(test: impl AsyncFnOnce(&TestFarm)) {
    let Some(server) = services::variable("KILN_STORE_URL") else { return };
    runtime().block_on(async {
        let name = format!("kiln_test_{}_{:08x}", std::process::id(), rand::random::<u32>());
        copy_template(&server, &name).await;
        let outcome = run(scratch::url_of(&server, &name), test).await;
        scratch::remove(&server, &name).await.expect("the database is removed");
        resume(outcome);
    });
}

pub fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("a runtime")
}

async fn run(url: String, test: impl AsyncFnOnce(&TestFarm)) -> std::thread::Result<()> {
    let clock = MockClock::new(start());
    let store = store::connect(&url, &settings(), Arc::new(clock.clone())).await.expect("the store opens");
    let farm = TestFarm { store, clock, broker: RecordingBroker::default(), url };
    AssertUnwindSafe(test(&farm)).catch_unwind().await
}

fn resume(outcome: std::thread::Result<()>) {
    outcome.unwrap_or_else(|panic| resume_unwind(panic));
}

/// Copies the migrated template, which is made by whoever needs it first and kept on the server for
/// as long as the migrations stay the same.
async fn copy_template(server: &str, name: &str) {
    let mut hasher = DefaultHasher::new();
    include_str!("../../../../migrations/postgres/0001_farm.up.sql").hash(&mut hasher);
    let template = format!("kiln_template_{:016x}", hasher.finish());
    let mut connection = PgConnection::connect(server).await.expect("a connection to Postgres");
    sqlx::query("SELECT pg_advisory_lock(5520871)").execute(&mut connection).await.expect("the lock");
    let exists: Option<(i32,)> = sqlx::query_as("SELECT 1 FROM pg_database WHERE datname = $1")
        .bind(&template)
        .fetch_optional(&mut connection)
        .await
        .expect("the list of databases");
    if exists.is_none() {
        scratch::create(server, &template).await.expect("the template is made");
        store::migrate(&scratch::url_of(server, &template)).await.expect("the template is migrated");
    }
    let copy = format!("CREATE DATABASE {name} TEMPLATE {template}");
    sqlx::query(AssertSqlSafe(copy)).execute(&mut connection).await.expect("a copy of the template");
    connection.close().await.expect("the lock is given back");
}

/// A valid spec.
pub fn spec(model: &str, lane: Lane) -> RenderSpec {
    RenderSpec {
        model: model.into(),
        prompt: "a small red star".into(),
        negative_prompt: String::new(),
        width: 128,
        height: 128,
        steps: 20,
        guidance_scale: 7.5,
        sampler: None,
        schedule: None,
        seed: 42,
        init_image: None,
        lane,
        tags: Vec::new(),
        metadata: serde_json::Map::new(),
        options: farm::spec::FamilyOptions::default(),
    }
}

pub fn queue(model: &str, lane: Lane) -> QueueKey {
    QueueKey { model: model.into(), lane }
}

/// A new submission with nothing special about it.
pub fn new_submission() -> NewSubmission {
    NewSubmission { id: SubmissionId::new(), idempotency: None, name: None, max_attempts: 3, failure_limit: None }
}

/// A stored submission.
#[derive(Clone, Debug)]
pub struct Submission {
    pub id: SubmissionId,
    pub jobs: Vec<JobId>,
}

pub fn worker(name: &str) -> WorkerId {
    WorkerId(name.into())
}

pub fn status(name: &str) -> WorkerStatus {
    WorkerStatus {
        worker_id: worker(name),
        host: "host".into(),
        device: "cpu".into(),
        serving: Some("demo".into()),
        warm: None,
        draining: false,
        rows: 0,
        done: 0,
        failed: 0,
        loads: 0,
        text: TextStatus::default(),
    }
}

pub fn failure(kind: FailureKind) -> Failure {
    Failure { kind, message: "it did not work".into() }
}

/// What a worker delivers for a lease.
pub fn finished(lease: &Lease) -> Finished {
    Finished {
        lease: lease.clone(),
        image_key: format!("images/{}/{}.png", lease.job_id, lease.attempt),
        sidecar_key: format!("images/{}/{}.json", lease.job_id, lease.attempt),
        sha256: "ab".repeat(32),
        render_time: Duration::from_millis(1500),
    }
}

impl TestFarm {
    pub fn now(&self) -> DateTime<Utc> {
        self.clock.now()
    }

    /// Stores jobs of these specs.
    pub async fn submit_specs(&self, submission: NewSubmission, specs: Vec<RenderSpec>) -> Submission {
        let jobs: Vec<NewJob> = specs.into_iter().map(|spec| NewJob { id: JobId::new(), spec }).collect();
        let ids = jobs.iter().map(|job| job.id).collect::<Vec<_>>();
        let stream = Box::pin(stream::iter(jobs.into_iter().map(Ok)));
        let submitted = self.store.submit(&submission, stream).await.expect("the submission is stored");
        assert_eq!(submitted, Submitted::Created { jobs: ids.len() as u64 });
        Submission { id: submission.id, jobs: ids }
    }

    /// Stores so many bulk jobs of `demo`.
    pub async fn submit(&self, jobs: usize) -> Submission {
        self.submit_specs(new_submission(), vec![spec("demo", Lane::Bulk); jobs]).await
    }

    /// Publishes what is due of `demo`'s bulk lane.
    pub async fn dispatch(&self) -> u64 {
        self.store.dispatch(&queue("demo", Lane::Bulk), 10_000, &self.broker).await.expect("dispatched")
    }

    pub async fn claim(&self, name: &str, jobs: &[JobId]) -> Claim {
        self.store.claim(&worker(name), jobs, LEASE).await.expect("claimed")
    }

    /// Submits so many jobs, publishes them, and leases all to `ann`.
    pub async fn lease(&self, jobs: usize) -> (Submission, Vec<Lease>) {
        self.lease_of(new_submission(), jobs).await
    }

    pub async fn lease_of(&self, submission: NewSubmission, jobs: usize) -> (Submission, Vec<Lease>) {
        let submission = self.submit_specs(submission, vec![spec("demo", Lane::Bulk); jobs]).await;
        self.dispatch().await;
        let claimed = self.claim("ann", &submission.jobs).await.claimed;
        assert_eq!(claimed.len(), jobs);
        (submission, claimed.into_iter().map(|job: ClaimedJob| job.lease).collect())
    }

    pub async fn finish(&self, lease: &Lease) -> bool {
        self.store.finish(&[finished(lease)]).await.expect("finished").contains(&lease.job_id)
    }

    pub async fn fail(&self, name: &str, lease: &Lease, kind: FailureKind) -> Option<JobState> {
        self.store.fail(&worker(name), lease, &failure(kind)).await.expect("failed")
    }

    pub async fn job(&self, job: JobId) -> JobView {
        self.store.job(job).await.expect("the store answers").expect("the job exists")
    }

    pub async fn state(&self, job: JobId) -> JobState {
        self.job(job).await.state
    }

    /// The states of a submission's jobs in their order.
    pub async fn states(&self, submission: &Submission) -> Vec<JobState> {
        let filter = JobFilter { submission_id: Some(submission.id), limit: 100_000, ..Default::default() };
        self.store.jobs(&filter).await.expect("the jobs").iter().map(|job| job.state).collect()
    }

    pub async fn counters(&self, submission: &Submission) -> Counters {
        self.counters_of(submission.id).await
    }

    pub async fn counters_of(&self, submission: SubmissionId) -> Counters {
        self.store.submission(submission).await.expect("the store answers").expect("it exists").counters
    }

    /// Counts rows, to hold the counters against.
    pub async fn recount(&self, of: Option<SubmissionId>) -> Counters {
        let filter = JobFilter { submission_id: of, limit: 1_000_000, ..Default::default() };
        let mut counters = Counters::default();
        for job in self.store.jobs(&filter).await.expect("the jobs") {
            *match job.state {
                JobState::Pending => &mut counters.pending,
                JobState::Queued => &mut counters.queued,
                JobState::Leased => &mut counters.leased,
                JobState::Done => &mut counters.done,
                JobState::Failed => &mut counters.failed,
                JobState::Cancelled => &mut counters.cancelled,
            } += 1;
        }
        counters
    }

    /// Runs a statement of the test's own, past the store.
    pub async fn execute(&self, sql: &str) -> Result<u64, sqlx::Error> {
        let sql = AssertSqlSafe(sql.to_owned());
        if self.url.starts_with("sqlite") {
            let mut connection = SqliteConnection::connect(&self.url).await?;
            Ok(sqlx::query(sql).execute(&mut connection).await?.rows_affected())
        } else {
            let mut connection = PgConnection::connect(&self.url).await?;
            Ok(sqlx::query(sql).execute(&mut connection).await?.rows_affected())
        }
    }

    /// The rows of a statement that gives one text each.
    pub async fn texts(&self, sql: &str) -> Vec<Option<String>> {
        let sql = AssertSqlSafe(sql.to_owned());
        if self.url.starts_with("sqlite") {
            let mut connection = SqliteConnection::connect(&self.url).await.expect("a connection");
            sqlx::query_scalar(sql).fetch_all(&mut connection).await.expect("rows")
        } else {
            let mut connection = PgConnection::connect(&self.url).await.expect("a connection");
            sqlx::query_scalar(sql).fetch_all(&mut connection).await.expect("rows")
        }
    }
}

/// What the broker says to each message.
type Confirm = dyn Fn(&JobMessage) -> Result<bool, BrokerError> + Send + Sync;

/// A broker that remembers what was published and carries nothing.
pub struct RecordingBroker {
    published: Mutex<Vec<JobMessage>>,
    confirm: Box<Confirm>,
    gate: Option<Gate>,
}

/// Holds a publisher up: says that it has arrived, then waits to be let through.
#[derive(Clone, Default)]
pub struct Gate {
    pub arrived: Arc<tokio::sync::Notify>,
    pub open: Arc<tokio::sync::Notify>,
}

impl Default for RecordingBroker {
    fn default() -> Self {
        Self::that_says(|_| Ok(true))
    }
}

impl RecordingBroker {
    pub fn that_says(confirm: impl Fn(&JobMessage) -> Result<bool, BrokerError> + Send + Sync + 'static) -> Self {
        Self { published: Mutex::default(), confirm: Box::new(confirm), gate: None }
    }

    pub fn behind(gate: &Gate) -> Self {
        Self { gate: Some(gate.clone()), ..Self::default() }
    }

    /// What was published since the last look.
    pub fn take(&self) -> Vec<JobMessage> {
        std::mem::take(&mut self.published.lock().expect("no holder panics"))
    }

    /// The same, as ids.
    pub fn take_ids(&self) -> Vec<JobId> {
        self.take().iter().map(|message| message.job_id).collect()
    }
}

fn only_publishes<T>() -> Result<T, BrokerError> {
    Err(BrokerError::Internal("this broker only takes messages".into()))
}

#[async_trait]
impl Broker for RecordingBroker {
    async fn ping(&self) -> Result<(), BrokerError> {
        Ok(())
    }

    async fn publish(&self, queue: &QueueKey, messages: &[JobMessage]) -> Result<Vec<bool>, BrokerError> {
        if let Some(gate) = &self.gate {
            gate.arrived.notify_one();
            gate.open.notified().await;
        }
        let confirmed = messages.iter().map(|message| (self.confirm)(message)).collect::<Result<Vec<bool>, _>>()?;
        for message in messages {
            assert_eq!((&message.spec.model, message.spec.lane), (&queue.model, queue.lane), "in the right queue");
        }
        self.published.lock().expect("no holder panics").extend_from_slice(messages);
        Ok(confirmed)
    }

    async fn depth(&self, _queue: &QueueKey) -> Result<u64, BrokerError> {
        only_publishes()
    }

    async fn purge(&self, _queue: &QueueKey) -> Result<u64, BrokerError> {
        only_publishes()
    }

    async fn consume(&self, _queue: &QueueKey, _prefetch: u16) -> Result<Box<dyn Consumer>, BrokerError> {
        only_publishes()
    }

    async fn announce(&self, _event: &ProgressEvent) -> Result<(), BrokerError> {
        only_publishes()
    }

    async fn watch(&self, _job: JobId) -> Result<ProgressStream, BrokerError> {
        only_publishes()
    }
}
