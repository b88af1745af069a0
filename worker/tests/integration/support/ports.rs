//! The ports, with a switch in front of each: what the worker asks for is noted, and fails when the test
//! wants it to.

use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use chrono::{DateTime, Utc};
use farm::artifact::{self, ArtifactError, ArtifactKey, ArtifactStore, SharedArtifacts};
use farm::broker::{self, Acker, Broker, BrokerError, Consumer, Delivery, DeliveryTag, ProgressStream, SharedBroker};
use farm::id::{JobId, SubmissionId, WorkerId};
use farm::job::{Counters, Failure, Finished, Idempotency, JobState, JobView, Lease, NewSubmission, SubmissionView};
use farm::message::{JobMessage, ProgressEvent, QueueKey};
use farm::store::{
    self, Claim, Decide, Demand, Heartbeat, JobFilter, JobStream, Leftover, Reaped, SharedStore, Store, StoreError,
    Submitted, WorkerStatus, WorkerView,
};
use tokio::sync::{Notify, watch};

use super::faults::Faults;

pub struct FaultyStore {
    pub inner: SharedStore,
    pub faults: Arc<Faults>,
}

fn store_away() -> StoreError {
    StoreError::Unavailable("switched off by the test".into())
}

impl FaultyStore {
    fn check(&self) -> store::Result<()> {
        if self.faults.store_down.load(SeqCst) { Err(store_away()) } else { Ok(()) }
    }
}

macro_rules! pass_on {
    ($(fn $name:ident($($argument:ident: $type:ty),*) -> $result:ty;)*) => {
        #[async_trait]
        impl Store for FaultyStore {
            $(async fn $name(&self, $($argument: $type),*) -> store::Result<$result> {
                self.check()?;
                self.inner.$name($($argument),*).await
            })*

            async fn submit(&self, submission: &NewSubmission, jobs: JobStream<'_>) -> store::Result<Submitted> {
                self.inner.submit(submission, jobs).await
            }

            async fn claim(&self, worker: &WorkerId, jobs: &[JobId], lease: Duration) -> store::Result<Claim> {
                self.check()?;
                self.faults.note(format!("claim {}", jobs.len()));
                self.inner.claim(worker, jobs, lease).await
            }

            async fn finish(&self, finished: &[Finished]) -> store::Result<Vec<JobId>> {
                self.check()?;
                let done = self.inner.finish(finished).await?;
                done.iter().for_each(|job| self.faults.note(format!("finish {job}")));
                if self.faults.lose_next_answer.swap(false, SeqCst) { Err(store_away()) } else { Ok(done) }
            }

            async fn place(&self, worker: &WorkerId, decide: Decide<'_>) -> store::Result<Option<String>> {
                self.check()?;
                self.inner.place(worker, decide).await
            }
        }
    };
}

pass_on! {
    fn ping() -> ();
    fn find_idempotent(idempotency: &Idempotency) -> Option<Submitted>;
    fn job(job: JobId) -> Option<JobView>;
    fn jobs(filter: &JobFilter) -> Vec<JobView>;
    fn submission(submission: SubmissionId) -> Option<SubmissionView>;
    fn submissions(before: Option<SubmissionId>, limit: u32) -> Vec<SubmissionView>;
    fn cancel_job(job: JobId) -> Option<JobState>;
    fn cancel_submission(submission: SubmissionId) -> Option<Counters>;
    fn retry_job(job: JobId) -> Option<JobState>;
    fn retry_submission(submission: SubmissionId, cancelled: bool) -> Option<u64>;
    fn dispatch(queue: &QueueKey, limit: u32, broker: &dyn Broker) -> u64;
    fn demand() -> Vec<Demand>;
    fn requeue(queue: &QueueKey, queued_before: DateTime<Utc>) -> u64;
    fn queued_since(queue: &QueueKey, queued_before: DateTime<Utc>) -> u64;
    fn fail(worker: &WorkerId, lease: &Lease, failure: &Failure) -> Option<JobState>;
    fn release(leases: &[Lease]) -> u64;
    fn cancelled(lease: &Lease) -> bool;
    fn heartbeat(status: &WorkerStatus, leases: &[Lease], lease: Duration) -> Heartbeat;
    fn goodbye(worker: &WorkerId) -> ();
    fn workers() -> Vec<WorkerView>;
    fn reap(limit: u32) -> Reaped;
    fn leftovers(ended_before: DateTime<Utc>, limit: u32) -> Vec<Leftover>;
    fn forget_leftovers(leftovers: &[Leftover]) -> ();
    fn totals() -> Counters;
}

pub struct FaultyArtifacts {
    pub inner: SharedArtifacts,
    pub faults: Arc<Faults>,
}

#[async_trait]
impl ArtifactStore for FaultyArtifacts {
    async fn ping(&self) -> artifact::Result<()> {
        self.inner.ping().await
    }

    async fn put(&self, key: &ArtifactKey, bytes: Bytes) -> artifact::Result<()> {
        self.faults.note("put");
        self.faults.disk_is_open().await;
        if self.faults.disk_full.load(SeqCst) {
            return Err(ArtifactError::Full("switched to full by the test".into()));
        }
        self.inner.put(key, bytes).await
    }

    async fn get(&self, path: &str) -> artifact::Result<Bytes> {
        self.faults.note(format!("get {path}"));
        if self.faults.reads_fail.load(SeqCst) {
            return Err(ArtifactError::Unavailable("switched off by the test".into()));
        }
        self.inner.get(path).await
    }

    async fn delete(&self, path: &str) -> artifact::Result<()> {
        self.faults.note(format!("delete {path}"));
        self.inner.delete(path).await
    }

    async fn list(&self, prefix: &str) -> artifact::Result<Vec<String>> {
        self.inner.list(prefix).await
    }

    fn path_of(&self, address: &str) -> Option<String> {
        self.inner.path_of(address)
    }

    async fn presign(&self, path: &str, valid_for: Duration) -> artifact::Result<Option<String>> {
        self.inner.presign(path, valid_for).await
    }
}

pub struct FaultyBroker {
    pub inner: SharedBroker,
    pub faults: Arc<Faults>,
}

fn broker_away() -> BrokerError {
    BrokerError::Unavailable("switched off by the test".into())
}

#[async_trait]
impl Broker for FaultyBroker {
    async fn ping(&self) -> broker::Result<()> {
        self.inner.ping().await
    }

    async fn publish(&self, queue: &QueueKey, messages: &[JobMessage]) -> broker::Result<Vec<bool>> {
        self.inner.publish(queue, messages).await
    }

    async fn depth(&self, queue: &QueueKey) -> broker::Result<u64> {
        self.inner.depth(queue).await
    }

    async fn purge(&self, queue: &QueueKey) -> broker::Result<u64> {
        self.inner.purge(queue).await
    }

    async fn consume(&self, queue: &QueueKey, prefetch: u16) -> broker::Result<Box<dyn Consumer>> {
        if *self.faults.broker_down.borrow() {
            return Err(broker_away());
        }
        let inner = self.inner.consume(queue, prefetch).await?;
        let acker = inner.acker();
        let cut = Arc::new(AtomicBool::new(false));
        let (faults, down) = (Arc::clone(&self.faults), self.faults.broker_down.subscribe());
        let acker = Arc::new(FaultyAcker { inner: acker, faults, cut: Arc::clone(&cut), tags: Mutex::default() });
        Ok(Box::new(FaultyConsumer { inner: Some(inner), acker, down, cut }))
    }

    async fn announce(&self, event: &ProgressEvent) -> broker::Result<()> {
        if *self.faults.broker_down.borrow() {
            return Err(broker_away());
        }
        self.inner.announce(event).await
    }

    async fn watch(&self, job: JobId) -> broker::Result<ProgressStream> {
        self.inner.watch(job).await
    }
}

struct FaultyConsumer {
    /// Dropped with the connection, so that the queue gets its deliveries back.
    inner: Option<Box<dyn Consumer>>,
    acker: Arc<FaultyAcker>,
    down: watch::Receiver<bool>,
    cut: Arc<AtomicBool>,
}

#[async_trait]
impl Consumer for FaultyConsumer {
    async fn next(&mut self) -> broker::Result<Option<Delivery>> {
        let Some(inner) = &mut self.inner else { return Err(broker_away()) };
        tokio::select! {
            biased;
            _ = self.down.wait_for(|down| *down) => {}
            next = inner.next() => {
                if let Ok(Some(delivery)) = &next {
                    self.acker.tags.lock().unwrap().push((delivery.tag, delivery.message.job_id));
                }
                return next;
            }
        }
        self.cut.store(true, SeqCst);
        self.inner = None;
        Err(broker_away())
    }

    fn acker(&self) -> Arc<dyn Acker> {
        self.acker.clone()
    }

    async fn stop(&mut self) -> broker::Result<()> {
        match &mut self.inner {
            Some(inner) => inner.stop().await,
            None => Err(broker_away()),
        }
    }
}

struct FaultyAcker {
    inner: Arc<dyn Acker>,
    faults: Arc<Faults>,
    cut: Arc<AtomicBool>,
    tags: Mutex<Vec<(DeliveryTag, JobId)>>,
}

#[async_trait]
impl Acker for FaultyAcker {
    async fn ack(&self, tag: DeliveryTag) -> broker::Result<bool> {
        let job = self.tags.lock().unwrap().iter().find(|(known, _)| *known == tag).map(|(_, job)| *job);
        self.faults.note(format!("ack {}", job.expect("the delivery is known")));
        if self.cut.load(SeqCst) { Ok(false) } else { self.inner.ack(tag).await }
    }

    async fn requeue(&self, tag: DeliveryTag) -> broker::Result<bool> {
        if self.cut.load(SeqCst) { Ok(false) } else { self.inner.requeue(tag).await }
    }
}

/// A gate that tasks wait at while it is shut.
#[derive(Default)]
pub struct Gate {
    shut: AtomicBool,
    opened: Notify,
}

impl Gate {
    pub fn shut(&self) {
        self.shut.store(true, SeqCst);
    }

    pub fn open(&self) {
        self.shut.store(false, SeqCst);
        self.opened.notify_waiters();
    }

    pub async fn pass(&self) {
        loop {
            let opened = self.opened.notified();
            if !self.shut.load(SeqCst) {
                return;
            }
            opened.await;
        }
    }
}
