//! The fleet and the work that waits for it: what placement decides on.

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::id::WorkerId;
use crate::message::QueueKey;

/// What a worker says about itself with each heartbeat.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct WorkerStatus {
    /// The worker.
    pub worker_id: WorkerId,
    /// The machine it runs on.
    pub host: String,
    /// Its device, in words (`cpu`, `cuda:0 NVIDIA H200`).
    pub device: String,
    /// The checkpoint it serves or is about to load.
    pub serving: Option<String>,
    /// The checkpoint whose weights are on its device.
    pub warm: Option<String>,
    /// True once it takes no more jobs.
    pub draining: bool,
    /// Rows in its running batch.
    pub rows: u32,
    /// Jobs it has finished since it started.
    pub done: u64,
    /// Jobs it has failed since it started.
    pub failed: u64,
    /// Checkpoints it has loaded since it started.
    pub loads: u64,
    /// What its text encoders do and take.
    #[serde(flatten)]
    pub text: TextStatus,
}

/// What a worker's text encoders, and the embeddings of prompts that it remembers, do and take.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct TextStatus {
    /// Embeddings that were remembered, since the worker started.
    pub embedding_hits: u64,
    /// Embeddings that had to be computed, since the worker started.
    pub embedding_misses: u64,
    /// Bytes of embeddings that are remembered now.
    pub embedding_bytes: u64,
    /// How often a text encoder's weights were read, since the worker started.
    pub encoder_reads: u64,
    /// About how many bytes of text encoders' weights are in memory now.
    pub encoder_bytes: u64,
}

/// A worker as the store knows it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct WorkerView {
    /// What it last said.
    #[serde(flatten)]
    pub status: WorkerStatus,
    /// When it was first heard of.
    pub started_at: DateTime<Utc>,
    /// When it was last heard of.
    pub last_seen: DateTime<Utc>,
    /// False once it has been silent for too long or has said goodbye.
    pub alive: bool,
}

/// Work that waits, of one checkpoint and lane.
#[derive(Clone, Debug, PartialEq)]
pub struct Demand {
    /// The checkpoint and lane.
    pub queue: QueueKey,
    /// Jobs waiting (pending or queued and due), counted up to a bound of [`DEMAND_BOUND`].
    pub waiting: u64,
    /// Of those, how many are queued.
    pub queued: u64,
    /// When the longest-waiting of them was accepted.
    pub oldest: DateTime<Utc>,
}

/// How far the store counts; beyond it, `waiting` means "at least so many".
pub const DEMAND_BOUND: u64 = 10_000;
