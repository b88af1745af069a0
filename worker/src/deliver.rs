//! Delivers pictures: PNG, upload, commit, ack, beside the device thread. Jobs that are ready while a
//! commit runs share the next one.

use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use chrono::{DateTime, Utc};
use farm::artifact::{self, ArtifactError, ArtifactKey};
use farm::id::JobId;
use farm::job::{Failure, FailureKind, Finished};
use farm::latent::LatentFile;
use sha2::{Digest, Sha256};
use tokio::sync::{Semaphore, mpsc};

use crate::context::{Backoff, Context};
use crate::device::{Output, Rendered};
use crate::holdings::{Held, Stage};
use crate::picture::{self, BatchSeen, Provenance, Sidecar, Timings, milliseconds};
use crate::settle;

/// Jobs that one commit finishes at most.
const COMMIT: usize = 64;

/// Objects being stored at once.
const UPLOADS: usize = 16;

/// How many lease times an artifact store may be away before a job's attempt fails. Heartbeats hold
/// the lease meanwhile.
const PATIENCE_LEASES: u32 = 5;

pub(crate) struct Delivery {
    context: Arc<Context>,
    encoders: Semaphore,
    uploads: Semaphore,
    ready: mpsc::UnboundedSender<Finished>,
}

/// Why a picture is not delivered.
enum Stop {
    /// The lease was lost, or a client cancelled the job.
    Unwanted,
    /// The attempt failed.
    Failed(Failure),
}

impl Delivery {
    /// Starts committing; deliver with [`Delivery::deliver`]. There are no more pictures under way than
    /// jobs in hand, which intake bounds.
    pub(crate) fn start(context: &Arc<Context>) -> Arc<Self> {
        let (ready, inbox) = mpsc::unbounded_channel();
        let encoders = std::thread::available_parallelism().map_or(1, usize::from);
        context.tasks.spawn(commit_all(Arc::clone(context), inbox));
        let context = Arc::clone(context);
        Arc::new(Self { context, encoders: Semaphore::new(encoders), uploads: Semaphore::new(UPLOADS), ready })
    }

    /// Brings one picture to where its job counts as done, or fails.
    pub(crate) async fn deliver(self: Arc<Self>, rendered: Rendered) {
        let job = rendered.job_id;
        let Some(held) = self.context.holdings.advance(job, Stage::Delivering) else { return };
        let stopped = match self.store_objects(&held, rendered).await {
            Ok(finished) => match self.context.holdings.begin_settling(job) {
                Some(_) => return drop(self.ready.send(finished)),
                None => Stop::Unwanted,
            },
            Err(stopped) => stopped,
        };
        delete_objects(&self.context, &held).await;
        match stopped {
            Stop::Failed(failure) => settle::failed(&self.context, job, failure).await,
            Stop::Unwanted if self.context.holdings.get(job).is_some_and(|held| held.cancelled && !held.lost) => {
                settle::cancelled(&self.context, job).await;
            }
            Stop::Unwanted => settle::lost(&self.context, job).await,
        }
    }

    async fn store_objects(&self, held: &Held, rendered: Rendered) -> Result<Finished, Stop> {
        let [image_key, sidecar_key] = keys(held, &rendered.output);
        let render_time = rendered.denoise + rendered.decode;
        let mut sidecar = self.describe(held, &rendered);
        let object = self.encode(rendered, &mut sidecar).await?;
        self.check_wanted(held)?;
        let started = Instant::now();
        self.put(held, &image_key, object).await?;
        // After the image: what it took to store it is in there.
        sidecar.timings.upload_ms = milliseconds(started.elapsed());
        let json = serde_json::to_vec_pretty(&sidecar).map_err(|error| failed(FailureKind::Retryable, error))?;
        self.put(held, &sidecar_key, json.into()).await?;
        Ok(Finished {
            lease: held.lease.clone(),
            image_key: image_key.path(),
            sidecar_key: sidecar_key.path(),
            sha256: sidecar.sha256,
            render_time,
        })
    }

    fn describe(&self, held: &Held, rendered: &Rendered) -> Sidecar {
        let lease = &held.lease;
        let accepted = accepted_at(lease.job_id).unwrap_or(held.claimed_at);
        Sidecar {
            provenance: Provenance {
                job_id: lease.job_id,
                submission_id: lease.submission_id,
                attempt: lease.attempt,
                spec: (*held.spec).clone(),
                kiln: env!("CARGO_PKG_VERSION"),
                device: self.context.device_name.clone(),
                dtype: self.context.dtype.clone(),
            },
            worker: self.context.id.clone(),
            image_key: keys(held, &rendered.output)[0].path(),
            image_bytes: 0,
            sha256: String::new(),
            rendered_at: self.context.clock.now(),
            batch: BatchSeen { largest: rendered.largest_batch, mean: rendered.mean_batch },
            timings: Timings {
                queued_ms: milliseconds((held.claimed_at - accepted).to_std().unwrap_or_default()),
                wait_ms: milliseconds(rendered.wait),
                load_ms: milliseconds(self.context.post().load_time),
                denoise_ms: milliseconds(rendered.denoise),
                decode_ms: milliseconds(rendered.decode),
                encode_ms: 0,
                upload_ms: 0,
            },
        }
    }

    async fn encode(&self, rendered: Rendered, sidecar: &mut Sidecar) -> Result<Bytes, Stop> {
        let _turn = self.encoders.acquire().await.expect("nobody closes the semaphore");
        let started = Instant::now();
        let provenance = sidecar.provenance.clone();
        let encode = move || {
            let object = match &rendered.output {
                Output::Picture(image) => picture::encode(image, &provenance)?,
                Output::Latent(latent) => picture::encode_latent(latent, &provenance)?,
            };
            let hash = Sha256::digest(&object).iter().map(|byte| format!("{byte:02x}")).collect::<String>();
            anyhow::Ok((Bytes::from(object), hash))
        };
        let encoded = tokio::task::spawn_blocking(encode).await;
        let (object, hash) = encoded
            .map_err(|error| failed(FailureKind::Poison, error))?
            .map_err(|error| failed(FailureKind::Poison, format!("writing the picture: {error:#}")))?;
        sidecar.sha256 = hash;
        sidecar.image_bytes = object.len() as u64;
        sidecar.timings.encode_ms = milliseconds(started.elapsed());
        Ok(object)
    }

    /// Stores an object. While the artifact store is away or full, tries again for as long as the job is
    /// wanted here and patience lasts.
    async fn put(&self, held: &Held, key: &ArtifactKey, bytes: Bytes) -> Result<(), Stop> {
        let patience = self.context.lease_time() * PATIENCE_LEASES;
        let started = Instant::now();
        let mut pause = Backoff::default();
        loop {
            let stored = {
                let _turn = self.uploads.acquire().await.expect("nobody closes the semaphore");
                self.context.artifacts.put(key, bytes.clone()).await
            };
            let error = match stored {
                Ok(()) => return Ok(()),
                Err(error @ (ArtifactError::Unavailable(_) | ArtifactError::Full(_))) => error,
                Err(error) => return Err(failed(FailureKind::Retryable, format!("storing {}: {error}", key.path()))),
            };
            if started.elapsed() >= patience {
                let message = format!("storing {} for {} s: {error}", key.path(), patience.as_secs());
                return Err(failed(FailureKind::Retryable, message));
            }
            tracing::warn!(job.id = %held.lease.job_id, %error, "an object could not be stored: trying again");
            pause.rest().await;
            self.check_wanted(held)?;
        }
    }

    fn check_wanted(&self, held: &Held) -> Result<(), Stop> {
        let now = self.context.holdings.get(held.lease.job_id);
        let wanted = now.is_some_and(|now| !now.lost && !now.cancelled && now.stage == Stage::Delivering);
        if wanted { Ok(()) } else { Err(Stop::Unwanted) }
    }
}

fn failed(kind: FailureKind, message: impl ToString) -> Stop {
    Stop::Failed(Failure { kind, message: message.to_string() })
}

/// Job ids are made when jobs are accepted, and carry that time.
fn accepted_at(job: JobId) -> Option<DateTime<Utc>> {
    let (seconds, nanoseconds) = job.0.get_timestamp()?.to_unix();
    DateTime::from_timestamp(i64::try_from(seconds).ok()?, nanoseconds)
}

/// The keys of what a job has become and of its sidecar.
fn keys(held: &Held, output: &Output) -> [ArtifactKey; 2] {
    let (submission_id, job_id, attempt) = (held.lease.submission_id, held.lease.job_id, held.lease.attempt);
    let object = match output {
        Output::Picture(_) => ArtifactKey::Image { submission_id, job_id, attempt },
        Output::Latent(LatentFile { width, height, .. }) => {
            ArtifactKey::Latent { submission_id, job_id, attempt, width: *width, height: *height }
        }
    };
    [object, ArtifactKey::Sidecar { submission_id, job_id, attempt }]
}

/// The store's sweep of leftovers deletes what cannot be deleted now.
async fn delete_objects(context: &Context, held: &Held) {
    let lease = &held.lease;
    let artifacts = context.artifacts.as_ref();
    if let Err(error) = artifact::delete_attempt(artifacts, lease.submission_id, lease.job_id, lease.attempt).await {
        tracing::warn!(job.id = %lease.job_id, %error, "objects of a lost attempt are left behind");
    }
}

/// Commits what is ready, many jobs at once.
async fn commit_all(context: Arc<Context>, mut ready: mpsc::UnboundedReceiver<Finished>) {
    let mut finished = Vec::with_capacity(COMMIT);
    while ready.recv_many(&mut finished, COMMIT).await > 0 {
        let jobs = std::mem::take(&mut finished);
        commit(&context, &jobs).await;
    }
}

async fn commit(context: &Arc<Context>, finished: &[Finished]) {
    let done = context.until_stored("finish", &context.abandon, || context.store.finish(finished)).await;
    let done = match done {
        Ok(done) => done,
        Err(error) => {
            tracing::error!(%error, jobs = finished.len(), "results could not be recorded: their leases will expire");
            finished.iter().for_each(|finished| context.holdings.remove(finished.lease.job_id));
            return;
        }
    };
    let settle = finished.iter().map(|finished| settle_one(context, finished, done.contains(&finished.lease.job_id)));
    futures_util::future::join_all(settle).await;
}

async fn settle_one(context: &Context, finished: &Finished, done: bool) {
    let job = finished.lease.job_id;
    let Some(held) = context.holdings.get(job) else { return };
    if done {
        context.note_success();
        tracing::debug!(worker.id = %context.id, job.id = %job, "a job is done");
    } else {
        settle::note_lost(context, job);
        delete_objects(context, &held).await;
    }
    settle::leave(context, &held).await;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_job_id_tells_when_its_job_was_accepted() {
        let accepted = accepted_at(JobId::new()).unwrap();
        assert!((Utc::now() - accepted).num_seconds().abs() < 5);
        assert_eq!(accepted_at(JobId(uuid::Uuid::nil())), None);
    }
}
