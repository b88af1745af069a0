//! What travels over the broker. Versioned JSON; the store stays the truth, a message is a hint.

use serde::{Deserialize, Serialize};

use crate::batch_key::BatchKey;
use crate::id::{JobId, WorkerId};
use crate::job::Lane;
use crate::spec::RenderSpec;

/// The version this build writes. Readers refuse newer ones.
pub const VERSION: u32 = 1;

/// The queue of one checkpoint and lane.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct QueueKey {
    /// The checkpoint, as the catalog names it.
    pub model: String,
    /// The lane.
    pub lane: Lane,
}

/// A job on its way to a worker.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct JobMessage {
    /// [`VERSION`] of the writer.
    pub version: u32,
    /// The job.
    pub job_id: JobId,
    /// How many attempts had begun when it was published.
    pub attempts: u32,
    /// What its row must share with its batch.
    pub batch_key: BatchKey,
    /// What to render.
    pub spec: RenderSpec,
}

/// News of a running job, for those who watch. Transient: nobody's correctness depends on it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ProgressEvent {
    /// The job.
    pub job_id: JobId,
    /// Who renders it.
    pub worker: WorkerId,
    /// What happened.
    #[serde(flatten)]
    pub progress: Progress,
}

/// What a watcher can learn.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Progress {
    /// A denoiser call ended.
    Step {
        /// Calls so far.
        step: u32,
        /// Calls in all.
        total: u32,
    },
    /// The job left the worker (done, failed, cancelled or given back): read the store.
    Left,
}
