//! What the worker's tasks share.

use std::future::Future;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use chrono::{DateTime, Utc};
use farm::artifact::SharedArtifacts;
use farm::broker::SharedBroker;
use farm::catalog::Catalog;
use farm::clock::Clock;
use farm::config::{WorkerConfig, seconds};
use farm::fleet::{TextStatus, WorkerStatus};
use farm::id::WorkerId;
use farm::job::{Failure, FailureKind};
use farm::spec::Limits;
use farm::store::{SharedStore, StoreError};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::announce::Announcer;
use crate::device::Device;
use crate::holdings::{Holdings, Stage};
use crate::inputs::Inputs;

/// What the worker serves.
#[derive(Clone, Debug, Default)]
pub(crate) struct Post {
    pub(crate) serving: Option<String>,
    pub(crate) since: DateTime<Utc>,
    pub(crate) warm: Option<String>,
    /// How long the warm checkpoint took to load.
    pub(crate) load_time: Duration,
}

/// What the worker has done since it started.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    pub(crate) done: AtomicU64,
    pub(crate) failed: AtomicU64,
    pub(crate) cancelled: AtomicU64,
    pub(crate) released: AtomicU64,
    pub(crate) lost: AtomicU64,
    pub(crate) loads: AtomicU64,
    pub(crate) text: Mutex<TextStatus>,
    failures_in_row: AtomicU32,
}

/// Shared by all tasks of a worker.
pub(crate) struct Context {
    pub(crate) store: SharedStore,
    pub(crate) broker: SharedBroker,
    pub(crate) artifacts: SharedArtifacts,
    pub(crate) catalog: Arc<Catalog>,
    pub(crate) config: WorkerConfig,
    pub(crate) limits: Limits,
    pub(crate) inputs: Inputs,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) id: WorkerId,
    pub(crate) host: String,
    pub(crate) device_name: String,
    pub(crate) dtype: String,
    pub(crate) device: Device,
    pub(crate) holdings: Holdings,
    pub(crate) announcer: Announcer,
    pub(crate) tally: Tally,
    pub(crate) post: Mutex<Post>,
    /// Held while the store is told what this worker serves, so that a heartbeat under way never
    /// overwrites a placement with what was true before it.
    pub(crate) speaking: tokio::sync::Mutex<()>,
    /// No more jobs: an orderly stop, or too many failures.
    pub(crate) stop: CancellationToken,
    /// The failures that made this worker stop itself, if they did.
    pub(crate) drained: OnceLock<String>,
    /// The time that an orderly stop may take is over.
    pub(crate) overdue: CancellationToken,
    /// No more patience with the store: what is not settled yet is left to the reaper.
    pub(crate) abandon: CancellationToken,
    pub(crate) tasks: TaskTracker,
}

impl Context {
    pub(crate) fn lease_time(&self) -> Duration {
        seconds(self.config.lease_seconds)
    }

    pub(crate) fn post(&self) -> Post {
        self.post.lock().expect("no holder of this lock panics").clone()
    }

    pub(crate) fn change_post(&self, change: impl FnOnce(&mut Post)) {
        change(&mut self.post.lock().expect("no holder of this lock panics"));
    }

    /// What the next heartbeat says.
    pub(crate) fn status(&self) -> WorkerStatus {
        let post = self.post();
        WorkerStatus {
            worker_id: self.id.clone(),
            host: self.host.clone(),
            device: self.device_name.clone(),
            serving: post.serving,
            warm: post.warm,
            draining: self.stop.is_cancelled(),
            rows: self.holdings.count(Stage::Running) as u32,
            done: self.tally.done.load(Relaxed),
            failed: self.tally.failed.load(Relaxed),
            loads: self.tally.loads.load(Relaxed),
            text: *self.tally.text.lock().expect("no holder of this lock panics"),
        }
    }

    /// A job came out well: the failures before it were not this worker's.
    pub(crate) fn note_success(&self) {
        self.tally.done.fetch_add(1, Relaxed);
        self.tally.failures_in_row.store(0, Relaxed);
    }

    /// An attempt failed. Too many in a row speak against the worker, and it drains itself; what is
    /// wrong with the job alone does not count.
    pub(crate) fn note_failure(&self, failure: &Failure) {
        if failure.kind == FailureKind::Invalid {
            return;
        }
        let in_row = self.tally.failures_in_row.fetch_add(1, Relaxed) + 1;
        if in_row < self.config.max_failures || self.config.max_failures == 0 {
            return;
        }
        let (kind, message) = (failure.kind.as_str(), &failure.message);
        let story = format!("{in_row} failures in a row, the last: {kind}: {message}");
        if self.drained.set(story).is_ok() {
            tracing::error!(worker.id = %self.id, failures = in_row, kind, message, "too many failures in a row: this worker drains itself");
            self.stop.cancel();
        }
    }

    /// Asks the store until it answers. An outage is waited out, until `give_up`; other errors are tried
    /// a few times, since some pass (a deadlock, a restarting server's odd words).
    pub(crate) async fn until_stored<T, F>(
        &self,
        what: &str,
        give_up: &CancellationToken,
        mut call: impl FnMut() -> F,
    ) -> Result<T, StoreError>
    where
        F: Future<Output = Result<T, StoreError>>,
    {
        const TRIES: u32 = 5;
        let mut pause = Backoff::default();
        let mut internal = 0;
        loop {
            let error = match call().await {
                Ok(answer) => return Ok(answer),
                Err(error @ (StoreError::Unavailable(_) | StoreError::Full(_))) => error,
                Err(error) => {
                    internal += 1;
                    if internal == TRIES {
                        return Err(error);
                    }
                    error
                }
            };
            tracing::warn!(worker.id = %self.id, %error, what, "the store did not answer: trying again");
            if give_up.run_until_cancelled(pause.rest()).await.is_none() {
                return Err(error);
            }
        }
    }
}

/// Waits that double: a tenth of a second to five.
#[derive(Debug)]
pub(crate) struct Backoff(Duration);

impl Default for Backoff {
    fn default() -> Self {
        Self(Duration::from_millis(100))
    }
}

impl Backoff {
    /// Waits, longer each time.
    pub(crate) async fn rest(&mut self) {
        let wait = self.0;
        self.0 = (wait * 2).min(Duration::from_secs(5));
        tokio::time::sleep(wait).await;
    }
}
