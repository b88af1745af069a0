//! A worker with its hands tied: it takes one job at a time and does what the test says.

use std::time::Duration;

use bytes::Bytes;
use farm::artifact::ArtifactKey;
use farm::broker::{Broker, Consumer, DeliveryTag};
use farm::id::WorkerId;
use farm::job::{ClaimedJob, Failure, FailureKind, Finished, JobState, Lane};
use farm::message::{Progress, ProgressEvent, QueueKey};
use sha2::{Digest, Sha256};

use super::{Farm, PATIENCE};

/// A PNG of one white pixel.
pub fn png() -> Bytes {
    use base64::Engine;
    const BASE64: &str = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGP4DwABAQEAsTj2FAAAAABJRU5ErkJggg==";
    base64::engine::general_purpose::STANDARD.decode(BASE64).unwrap().into()
}

/// A job in the worker's hands.
pub struct Taken<'a> {
    farm: &'a Farm,
    worker: WorkerId,
    consumer: Box<dyn Consumer>,
    tag: DeliveryTag,
    pub job: ClaimedJob,
}

impl Farm {
    /// Takes the next job of a queue, as soon as there is one.
    pub async fn take(&self, model: &str, lane: Lane) -> Taken<'_> {
        self.take_for(model, lane, PATIENCE).await
    }

    /// Takes the next job under a lease of that length.
    pub async fn take_for(&self, model: &str, lane: Lane, lease: Duration) -> Taken<'_> {
        let worker = WorkerId("test-worker".into());
        let mut consumer = self.broker.consume(&QueueKey { model: model.into(), lane }, 1).await.unwrap();
        let taking = async {
            loop {
                let delivery = consumer.next().await.unwrap().expect("nobody stops this consumer");
                let claim = self.store.claim(&worker, &[delivery.message.job_id], lease).await.unwrap();
                match claim.claimed.into_iter().next() {
                    Some(job) => return (delivery.tag, job),
                    None => assert!(consumer.acker().ack(delivery.tag).await.unwrap()),
                }
            }
        };
        let (tag, job) = tokio::time::timeout(PATIENCE, taking).await.expect("a job comes");
        Taken { farm: self, worker, consumer, tag, job }
    }
}

impl Taken<'_> {
    pub fn id(&self) -> String {
        self.job.lease.job_id.to_string()
    }

    /// Tells the watchers of a step.
    pub async fn step(&self, step: u32, total: u32) {
        self.announce(Progress::Step { step, total }).await;
    }

    async fn announce(&self, progress: Progress) {
        let event = ProgressEvent { job_id: self.job.lease.job_id, worker: self.worker.clone(), progress };
        self.farm.broker.announce(&event).await.unwrap();
    }

    /// Uploads what would have been the image.
    pub async fn upload(&self) -> (String, String) {
        let lease = &self.job.lease;
        let (submission_id, job_id, attempt) = (lease.submission_id, lease.job_id, lease.attempt);
        let image = ArtifactKey::Image { submission_id, job_id, attempt };
        let sidecar = ArtifactKey::Sidecar { submission_id, job_id, attempt };
        self.farm.artifacts.put(&image, png()).await.unwrap();
        self.farm.artifacts.put(&sidecar, Bytes::from_static(b"{\"seed\":1}")).await.unwrap();
        (image.path(), sidecar.path())
    }

    /// Uploads, commits, acks, tells.
    pub async fn finish(self) {
        let (image_key, sidecar_key) = self.upload().await;
        let finished = Finished {
            lease: self.job.lease.clone(),
            image_key,
            sidecar_key,
            sha256: Sha256::digest(png()).iter().map(|byte| format!("{byte:02x}")).collect(),
            render_time: Duration::from_millis(5),
        };
        assert_eq!(self.farm.store.finish(&[finished]).await.unwrap(), [self.job.lease.job_id]);
        self.leave().await;
    }

    /// Fails the attempt; the job's state after it.
    pub async fn fail(self, kind: FailureKind, message: &str) -> JobState {
        let failure = Failure { kind, message: message.into() };
        let state = self.farm.store.fail(&self.worker, &self.job.lease, &failure).await.unwrap();
        self.leave().await;
        state.expect("the lease still holds")
    }

    /// Drops the row of a cancelled job.
    pub async fn drop_cancelled(self) {
        assert!(self.farm.store.cancelled(&self.job.lease).await.unwrap());
        self.leave().await;
    }

    async fn leave(self) {
        assert!(self.consumer.acker().ack(self.tag).await.unwrap());
        self.announce(Progress::Left).await;
    }
}
