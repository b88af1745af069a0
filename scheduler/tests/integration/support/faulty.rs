//! Ports that fail when they are told to.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use chrono::{DateTime, Utc};
use farm::artifact::{self, ArtifactError, ArtifactKey, ArtifactStore, SharedArtifacts};
use farm::broker::memory::MemoryBroker;
use farm::broker::{self, Broker, BrokerError, Consumer, ProgressStream};
use farm::id::{JobId, SubmissionId, WorkerId};
use farm::job::{Counters, Failure, Finished, Idempotency, JobState, JobView, Lease, NewSubmission, SubmissionView};
use farm::message::{JobMessage, ProgressEvent, QueueKey};
use farm::store::{
    Claim, Decide, Demand, Heartbeat, JobFilter, JobStream, Leftover, Reaped, Result, SharedStore, Store, StoreError,
    Submitted, WorkerStatus, WorkerView,
};

/// The in-process broker, which can go away.
pub struct FaultyBroker {
    inner: MemoryBroker,
    down: AtomicBool,
    watches_end: AtomicBool,
    watches: AtomicU64,
}

impl FaultyBroker {
    pub fn new() -> Self {
        Self {
            inner: MemoryBroker::new(),
            down: AtomicBool::new(false),
            watches_end: AtomicBool::new(false),
            watches: AtomicU64::new(0),
        }
    }

    pub fn set_down(&self, down: bool) {
        self.down.store(down, Ordering::SeqCst);
    }

    /// From now on, every watch ends at once.
    pub fn end_watches(&self) {
        self.watches_end.store(true, Ordering::SeqCst);
    }

    /// How many watches have been asked for.
    pub fn watches(&self) -> u64 {
        self.watches.load(Ordering::SeqCst)
    }

    fn check(&self) -> broker::Result<()> {
        match self.down.load(Ordering::SeqCst) {
            true => Err(BrokerError::Unavailable("the test has pulled the plug".into())),
            false => Ok(()),
        }
    }
}

#[async_trait]
impl Broker for FaultyBroker {
    async fn ping(&self) -> broker::Result<()> {
        self.check()?;
        self.inner.ping().await
    }

    async fn publish(&self, queue: &QueueKey, messages: &[JobMessage]) -> broker::Result<Vec<bool>> {
        self.check()?;
        self.inner.publish(queue, messages).await
    }

    async fn depth(&self, queue: &QueueKey) -> broker::Result<u64> {
        self.check()?;
        self.inner.depth(queue).await
    }

    async fn purge(&self, queue: &QueueKey) -> broker::Result<u64> {
        self.inner.purge(queue).await
    }

    async fn consume(&self, queue: &QueueKey, prefetch: u16) -> broker::Result<Box<dyn Consumer>> {
        self.inner.consume(queue, prefetch).await
    }

    async fn announce(&self, event: &ProgressEvent) -> broker::Result<()> {
        self.inner.announce(event).await
    }

    async fn watch(&self, job: JobId) -> broker::Result<ProgressStream> {
        self.watches.fetch_add(1, Ordering::SeqCst);
        self.check()?;
        if self.watches_end.load(Ordering::SeqCst) {
            return Ok(Box::pin(futures_util::stream::empty()));
        }
        self.inner.watch(job).await
    }
}

/// How a port fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    Unavailable,
    Full,
    Internal,
    Panic,
}

/// A store that can go away.
pub struct FaultyStore {
    inner: SharedStore,
    fault: Mutex<Option<Fault>>,
}

impl FaultyStore {
    pub fn over(inner: SharedStore) -> Self {
        Self { inner, fault: Mutex::default() }
    }

    pub fn set(&self, fault: Option<Fault>) {
        *self.fault.lock().unwrap() = fault;
    }

    fn check(&self) -> Result<()> {
        let fault = *self.fault.lock().unwrap();
        match fault {
            None => Ok(()),
            Some(Fault::Unavailable) => Err(StoreError::Unavailable("the test has pulled the plug".into())),
            Some(Fault::Full) => Err(StoreError::Full("the test has filled the disk".into())),
            Some(Fault::Internal) => Err(StoreError::Internal("the secret reason".into())),
            Some(Fault::Panic) => panic!("the test wants this panic"),
        }
    }
}

/// Writes the methods, which hand everything on to the store beneath unless the switch is thrown.
macro_rules! behind_the_switch {
    ($(async fn $name:ident(&self $(, $argument:ident: $type:ty)*) -> $answer:ty;)*) => {
        #[async_trait]
        impl Store for FaultyStore {
            $(async fn $name(&self $(, $argument: $type)*) -> $answer {
                self.check()?;
                self.inner.$name($($argument),*).await
            })*
        }
    };
}

behind_the_switch! {
    async fn ping(&self) -> Result<()>;
    async fn submit(&self, submission: &NewSubmission, jobs: JobStream<'_>) -> Result<Submitted>;
    async fn find_idempotent(&self, idempotency: &Idempotency) -> Result<Option<Submitted>>;
    async fn job(&self, job: JobId) -> Result<Option<JobView>>;
    async fn jobs(&self, filter: &JobFilter) -> Result<Vec<JobView>>;
    async fn submission(&self, submission: SubmissionId) -> Result<Option<SubmissionView>>;
    async fn submissions(&self, before: Option<SubmissionId>, limit: u32) -> Result<Vec<SubmissionView>>;
    async fn cancel_job(&self, job: JobId) -> Result<Option<JobState>>;
    async fn cancel_submission(&self, submission: SubmissionId) -> Result<Option<Counters>>;
    async fn retry_job(&self, job: JobId) -> Result<Option<JobState>>;
    async fn retry_submission(&self, submission: SubmissionId, cancelled: bool) -> Result<Option<u64>>;
    async fn dispatch(&self, queue: &QueueKey, limit: u32, broker: &dyn Broker) -> Result<u64>;
    async fn demand(&self) -> Result<Vec<Demand>>;
    async fn requeue(&self, queue: &QueueKey, queued_before: DateTime<Utc>) -> Result<u64>;
    async fn queued_since(&self, queue: &QueueKey, queued_before: DateTime<Utc>) -> Result<u64>;
    async fn claim(&self, worker: &WorkerId, jobs: &[JobId], lease: Duration) -> Result<Claim>;
    async fn finish(&self, finished: &[Finished]) -> Result<Vec<JobId>>;
    async fn fail(&self, worker: &WorkerId, lease: &Lease, failure: &Failure) -> Result<Option<JobState>>;
    async fn release(&self, leases: &[Lease]) -> Result<u64>;
    async fn cancelled(&self, lease: &Lease) -> Result<bool>;
    async fn heartbeat(&self, status: &WorkerStatus, leases: &[Lease], lease: Duration) -> Result<Heartbeat>;
    async fn goodbye(&self, worker: &WorkerId) -> Result<()>;
    async fn workers(&self) -> Result<Vec<WorkerView>>;
    async fn place(&self, worker: &WorkerId, decide: Decide<'_>) -> Result<Option<String>>;
    async fn reap(&self, limit: u32) -> Result<Reaped>;
    async fn leftovers(&self, ended_before: DateTime<Utc>, limit: u32) -> Result<Vec<Leftover>>;
    async fn forget_leftovers(&self, leftovers: &[Leftover]) -> Result<()>;
    async fn totals(&self) -> Result<Counters>;
}

/// An artifact store that can go away, or make URLs.
pub struct FaultyArtifacts {
    inner: SharedArtifacts,
    down: AtomicBool,
    presigns: AtomicBool,
}

impl FaultyArtifacts {
    pub fn over(inner: SharedArtifacts) -> Self {
        Self { inner, down: AtomicBool::new(false), presigns: AtomicBool::new(false) }
    }

    pub fn set_down(&self, down: bool) {
        self.down.store(down, Ordering::SeqCst);
    }

    /// From now on, objects have URLs of their own.
    pub fn presign(&self) {
        self.presigns.store(true, Ordering::SeqCst);
    }

    fn check(&self) -> artifact::Result<()> {
        match self.down.load(Ordering::SeqCst) {
            true => Err(ArtifactError::Unavailable("the test has pulled the plug".into())),
            false => Ok(()),
        }
    }
}

#[async_trait]
impl ArtifactStore for FaultyArtifacts {
    async fn ping(&self) -> artifact::Result<()> {
        self.check()?;
        self.inner.ping().await
    }

    async fn put(&self, key: &ArtifactKey, bytes: Bytes) -> artifact::Result<()> {
        self.check()?;
        self.inner.put(key, bytes).await
    }

    async fn get(&self, path: &str) -> artifact::Result<Bytes> {
        self.check()?;
        self.inner.get(path).await
    }

    async fn delete(&self, path: &str) -> artifact::Result<()> {
        self.check()?;
        self.inner.delete(path).await
    }

    async fn list(&self, prefix: &str) -> artifact::Result<Vec<String>> {
        self.check()?;
        self.inner.list(prefix).await
    }

    fn path_of(&self, address: &str) -> Option<String> {
        self.inner.path_of(address)
    }

    async fn presign(&self, path: &str, valid_for: Duration) -> artifact::Result<Option<String>> {
        let url = || format!("http://objects.test/{path}?valid_for={}", valid_for.as_secs());
        Ok(self.presigns.load(Ordering::SeqCst).then(url))
    }
}
