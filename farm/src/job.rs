//! A job's life: states, leases, failures, and what clients see of them.
//!
//! ```text
//! pending ──► queued ──► leased ──► done
//!    ▲           │          ├─────► failed
//!    └───────────┴──────────┘       cancelled (from any of the first three)
//! ```

use std::time::Duration;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::id::{JobId, LeaseToken, SubmissionId, WorkerId};
use crate::spec::RenderSpec;

/// Where a job stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum JobState {
    /// Waits in the store to be published. This state is the outbox: the dispatcher takes it from
    /// here; a crash of any process leaves it here.
    Pending,
    /// On the broker, confirmed. A worker claims it from here; if the broker loses it, the
    /// reconciler puts it back to pending.
    Queued,
    /// A worker holds a lease. The worker finishes, fails or releases it; if the worker dies, the
    /// reaper puts it back to pending once the lease has expired.
    Leased,
    /// Rendered and stored. Final.
    Done,
    /// Given up after its attempts, or invalid. Final until retried by a client.
    Failed,
    /// Cancelled by a client. Final until retried by a client.
    Cancelled,
}

impl JobState {
    /// Every state, in the order of a job's life.
    pub const ALL: [JobState; 6] =
        [Self::Pending, Self::Queued, Self::Leased, Self::Done, Self::Failed, Self::Cancelled];

    /// The word used in SQL, JSON and logs.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Queued => "queued",
            Self::Leased => "leased",
            Self::Done => "done",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
        }
    }

    /// Reads the word back.
    pub fn parse(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|state| state.as_str() == word)
    }

    /// True for states that nothing but a client's retry leaves.
    pub fn is_final(self) -> bool {
        matches!(self, Self::Done | Self::Failed | Self::Cancelled)
    }
}

/// Who should not wait for whom.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Lane {
    /// Somebody is looking at the screen; served before bulk.
    Interactive,
    /// Datasets, catalogues, evaluations.
    #[default]
    Bulk,
}

impl Lane {
    /// Both lanes, the more urgent first.
    pub const ALL: [Lane; 2] = [Self::Interactive, Self::Bulk];

    /// The word used in SQL, JSON, queue names and logs.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Interactive => "interactive",
            Self::Bulk => "bulk",
        }
    }

    /// Reads the word back.
    pub fn parse(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|lane| lane.as_str() == word)
    }
}

/// A job as it enters the store.
#[derive(Clone, Debug)]
pub struct NewJob {
    /// Its id, made by the scheduler.
    pub id: JobId,
    /// What to render.
    pub spec: RenderSpec,
}

/// A submission as it enters the store; its jobs follow as a stream.
#[derive(Clone, Debug)]
pub struct NewSubmission {
    /// Its id, made by the scheduler.
    pub id: SubmissionId,
    /// The client's `Idempotency-Key`, if it sent one, and the hash of the request it stands for.
    pub idempotency: Option<Idempotency>,
    /// The client's name for it, shown in listings.
    pub name: Option<String>,
    /// How many times a job is tried before it fails.
    pub max_attempts: u32,
    /// Once so many jobs of the submission have failed, the rest is cancelled. `None`: never.
    pub failure_limit: Option<u64>,
}

/// A request that may be sent twice and must count once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Idempotency {
    /// The client's key.
    pub key: String,
    /// SHA-256 (hex) of the request: the same key with another request is a conflict.
    pub request_hash: String,
}

/// A worker's right to a job for a time. Everything a worker says about a job carries it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lease {
    /// The job.
    pub job_id: JobId,
    /// The submission it belongs to.
    pub submission_id: SubmissionId,
    /// Which attempt this is, from 1. No number is given twice, not even after a release or a retry: object
    /// keys carry it.
    pub attempt: u32,
    /// The fencing token.
    pub token: LeaseToken,
    /// When the right ends unless renewed.
    pub expires_at: DateTime<Utc>,
}

/// A claimed job: the lease and what to render.
#[derive(Clone, Debug)]
pub struct ClaimedJob {
    /// The right to it.
    pub lease: Lease,
    /// What to render.
    pub spec: RenderSpec,
}

/// What a worker delivers with a finished job.
#[derive(Clone, Debug, PartialEq)]
pub struct Finished {
    /// The lease it was rendered under.
    pub lease: Lease,
    /// Object key of the PNG, or of the latent.
    pub image_key: String,
    /// Object key of the JSON sidecar.
    pub sidecar_key: String,
    /// SHA-256 of that object, hex.
    pub sha256: String,
    /// From joining the batch to the decoded image.
    pub render_time: Duration,
}

/// Why a job did not work out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum FailureKind {
    /// The job can never work (unknown checkpoint, refused parameters): fails at once.
    Invalid,
    /// Another attempt may work (network, storage, a dying worker).
    Retryable,
    /// The device ran out of memory with this job alone.
    OutOfMemory,
    /// The job broke the renderer while alone in its batch.
    Poison,
}

impl FailureKind {
    /// Every kind.
    pub const ALL: [FailureKind; 4] = [Self::Invalid, Self::Retryable, Self::OutOfMemory, Self::Poison];

    /// The word used in SQL, JSON and logs.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Invalid => "invalid",
            Self::Retryable => "retryable",
            Self::OutOfMemory => "out_of_memory",
            Self::Poison => "poison",
        }
    }

    /// Reads the word back.
    pub fn parse(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.as_str() == word)
    }

    /// True where the job gets another attempt, if it has any left.
    pub fn is_retryable(self) -> bool {
        !matches!(self, Self::Invalid)
    }
}

/// A failure with its story.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Failure {
    /// What sort of failure.
    pub kind: FailureKind,
    /// For people; names the field, limit and value where there is one.
    pub message: String,
}

/// A job as clients see it.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct JobView {
    /// The job.
    pub job_id: JobId,
    /// The submission it belongs to.
    pub submission_id: SubmissionId,
    /// Its place in the submission, from 0.
    pub index: u64,
    /// Where it stands.
    pub state: JobState,
    /// What it renders.
    pub spec: RenderSpec,
    /// Attempts spent so far. A release and a client's retry give them back.
    pub attempts: u32,
    /// The worker that holds or held it last.
    pub worker: Option<WorkerId>,
    /// Object key of the image, once done; of the latent where the job ends in one.
    pub image_key: Option<String>,
    /// Object key of the JSON sidecar, once done.
    pub sidecar_key: Option<String>,
    /// SHA-256 of the PNG or the latent, once done.
    pub sha256: Option<String>,
    /// The last failure, if any attempt failed.
    pub error: Option<Failure>,
    /// When it was accepted.
    pub created_at: DateTime<Utc>,
    /// When it was last put on the broker.
    pub queued_at: Option<DateTime<Utc>>,
    /// When its last attempt began.
    pub started_at: Option<DateTime<Utc>>,
    /// When it became final.
    pub finished_at: Option<DateTime<Utc>>,
    /// Milliseconds from joining the batch to the decoded image.
    pub render_ms: Option<u64>,
}

/// How many jobs stand where. Kept up to date in the transactions that move jobs: reading it never
/// counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Counters {
    /// Waiting in the store.
    pub pending: u64,
    /// On the broker.
    pub queued: u64,
    /// Being rendered.
    pub leased: u64,
    /// Stored.
    pub done: u64,
    /// Given up.
    pub failed: u64,
    /// Cancelled.
    pub cancelled: u64,
}

impl Counters {
    /// All jobs.
    pub fn total(&self) -> u64 {
        self.pending + self.queued + self.leased + self.done + self.failed + self.cancelled
    }

    /// Jobs in a final state.
    pub fn finished(&self) -> u64 {
        self.done + self.failed + self.cancelled
    }
}

/// A submission as the store holds it.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct SubmissionView {
    /// The submission.
    pub submission_id: SubmissionId,
    /// The client's name for it.
    pub name: Option<String>,
    /// When it was accepted.
    pub created_at: DateTime<Utc>,
    /// When its last job became final.
    pub finished_at: Option<DateTime<Utc>>,
    /// Where its jobs stand.
    pub counters: Counters,
    /// Done jobs per second over the last minute in which any finished.
    pub rate: Option<f64>,
    /// Seconds until the rest is done at that rate.
    pub eta_seconds: Option<f64>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_word_is_read_back_and_is_the_one_in_json() {
        for state in JobState::ALL {
            assert_eq!(JobState::parse(state.as_str()), Some(state));
            assert_eq!(serde_json::to_value(state).unwrap(), state.as_str());
        }
        for lane in Lane::ALL {
            assert_eq!(Lane::parse(lane.as_str()), Some(lane));
            assert_eq!(serde_json::to_value(lane).unwrap(), lane.as_str());
        }
        for kind in FailureKind::ALL {
            assert_eq!(FailureKind::parse(kind.as_str()), Some(kind));
            assert_eq!(serde_json::to_value(kind).unwrap(), kind.as_str());
        }
        assert_eq!((JobState::parse("Done"), Lane::parse(""), FailureKind::parse("oom")), (None, None, None));
    }

    #[test]
    fn states_are_listed_in_the_order_of_their_numbers() {
        assert!(JobState::ALL.into_iter().enumerate().all(|(place, state)| state as usize == place));
    }

    #[test]
    fn a_final_state_is_one_that_only_a_client_leaves() {
        let last: Vec<JobState> = JobState::ALL.into_iter().filter(|state| state.is_final()).collect();
        assert_eq!(last, [JobState::Done, JobState::Failed, JobState::Cancelled]);
    }

    #[test]
    fn only_an_invalid_job_gets_no_second_attempt() {
        let hopeless: Vec<FailureKind> = FailureKind::ALL.into_iter().filter(|kind| !kind.is_retryable()).collect();
        assert_eq!(hopeless, [FailureKind::Invalid]);
    }

    #[test]
    fn the_interactive_lane_goes_first() {
        assert!(Lane::Interactive < Lane::Bulk);
        assert_eq!(Lane::default(), Lane::Bulk);
    }

    #[test]
    fn counters_add_up() {
        let counters = Counters { pending: 1, queued: 2, leased: 4, done: 8, failed: 16, cancelled: 32 };
        assert_eq!((counters.total(), counters.finished()), (63, 56));
    }
}
