//! The configuration: one struct per concern, read once at the start and handed down. Every key is
//! also an environment variable: `[store] url` is `KILN_STORE_URL`.

mod check;
mod environment;
mod keys;
mod load;

pub use check::redact_url;
pub use environment::Environment;
pub use keys::{Key, Kind, keys};
pub use load::{ConfigError, Loaded, load};

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::catalog::ModelConfig;
use crate::spec::Limits;

/// Everything that can be set.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Where this machine's own data lies: the embedded farm's store and artifacts, the unpacked demo
    /// checkpoint. Default: `$XDG_DATA_HOME/kiln`.
    pub data_dir: Option<PathBuf>,
    /// The store.
    pub store: StoreConfig,
    /// The broker.
    pub broker: BrokerConfig,
    /// The artifact store.
    pub artifacts: ArtifactsConfig,
    /// The scheduler's HTTP API.
    pub api: ApiConfig,
    /// The scheduler's loops.
    pub scheduler: SchedulerConfig,
    /// A worker.
    pub worker: WorkerConfig,
    /// What a request may ask for at most.
    pub limits: Limits,
    /// The checkpoint for jobs that name none. Default: `demo`.
    pub default_model: Option<String>,
    /// Checkpoints by name. `demo` is always there.
    pub models: BTreeMap<String, ModelConfig>,
}

/// A value that never shows itself in logs or in `kiln config`.
#[derive(Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Secret(pub String);

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("***")
    }
}

/// The store.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct StoreConfig {
    /// `postgres://USER:PASSWORD@HOST/DATABASE` or `sqlite:PATH`. Empty: SQLite in the data folder.
    pub url: Secret,
    /// Connections of the pool.
    pub connections: u32,
    /// Seconds before a failed job is tried again; doubles with each attempt.
    pub backoff_seconds: f64,
    /// The longest such wait in seconds.
    pub backoff_max_seconds: f64,
    /// Seconds of silence after which a worker counts as dead.
    pub worker_timeout_seconds: f64,
}

impl Default for StoreConfig {
    fn default() -> Self {
        Self {
            url: Secret::default(),
            connections: 10,
            backoff_seconds: 2.0,
            backoff_max_seconds: 300.0,
            worker_timeout_seconds: 30.0,
        }
    }
}

/// The broker.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct BrokerConfig {
    /// `amqp://USER:PASSWORD@HOST/VHOST` or `amqps://…`. Empty: in this process.
    pub url: Secret,
    /// Prefix of every exchange and queue name, so that farms can share a broker. Default: `kiln`.
    pub prefix: Option<String>,
}

/// The artifact store.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ArtifactsConfig {
    /// `s3://BUCKET[/PREFIX]` or `file:FOLDER`. Empty: a folder in the data folder.
    pub url: String,
    /// The S3 server, for others than AWS: `http://127.0.0.1:9000`.
    pub endpoint: Option<String>,
    /// The server's address as clients of the API reach it, if it differs: goes into presigned URLs.
    pub public_endpoint: Option<String>,
    /// The region to sign for.
    pub region: String,
    /// The access key's id.
    pub access_key_id: Option<String>,
    /// The access key's secret.
    pub secret_access_key: Option<Secret>,
}

impl Default for ArtifactsConfig {
    fn default() -> Self {
        Self {
            url: String::new(),
            endpoint: None,
            public_endpoint: None,
            region: "us-east-1".into(),
            access_key_id: None,
            secret_access_key: None,
        }
    }
}

/// The scheduler's HTTP API.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ApiConfig {
    /// Where to listen. Without API keys, loopback addresses only.
    pub listen: SocketAddr,
    /// Who may call: SHA-256 (hex) of each key, by the caller's name. `kiln key` makes one.
    pub key_hashes: BTreeMap<String, String>,
    /// Seconds a presigned image URL is valid.
    pub image_url_seconds: u64,
    /// The folder in which a streamed submission waits until it is whole. Default: the system's folder for
    /// temporary files.
    pub spool_dir: Option<PathBuf>,
}

impl Default for ApiConfig {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from(([127, 0, 0, 1], 8600)),
            key_hashes: BTreeMap::new(),
            image_url_seconds: 3600,
            spool_dir: None,
        }
    }
}

/// The scheduler's loops.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SchedulerConfig {
    /// Jobs of one queue on the broker at most; the rest waits in the store.
    pub queue_bound: u64,
    /// Milliseconds between looks for jobs to dispatch, when nothing nudges.
    pub dispatch_interval_ms: u64,
    /// Seconds between sweeps of the reaper.
    pub reap_interval_seconds: f64,
    /// Seconds between looks of the reconciler.
    pub reconcile_interval_seconds: f64,
    /// Seconds a queued job may be unknown to the broker before it is published again.
    pub reconcile_grace_seconds: f64,
    /// Seconds before what a lost attempt left behind is deleted.
    pub leftover_grace_seconds: f64,
    /// Attempts of a job.
    pub max_attempts: u32,
    /// Seconds an orderly stop waits for open requests.
    pub shutdown_seconds: f64,
}

impl Default for SchedulerConfig {
    fn default() -> Self {
        Self {
            queue_bound: 2000,
            dispatch_interval_ms: 250,
            reap_interval_seconds: 5.0,
            reconcile_interval_seconds: 10.0,
            reconcile_grace_seconds: 30.0,
            leftover_grace_seconds: 60.0,
            max_attempts: 4,
            shutdown_seconds: 10.0,
        }
    }
}

/// A worker.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct WorkerConfig {
    /// Its name; a unique suffix is added at each start. Default: the host's name.
    pub name: Option<String>,
    /// `cpu`, `cuda`, `cuda:N` or `metal`. Default: the best there is.
    pub device: Option<String>,
    /// `f32`, `f16` or `bf16`. Default: f32 on a CPU, bf16 on a GPU.
    pub dtype: Option<String>,
    /// Bytes that the VAE may take for a picture's activations; larger maps are computed in bands, which takes longer.
    /// On a CPU that shows in no bit of a picture; on a GPU it may show in the last one, so all workers of a farm
    /// should have the same. Default: half of the memory that is free on a CPU, four gigabytes on a GPU.
    pub vae_bytes: Option<u64>,
    /// `keep`, `drop` or `auto`: whether text encoders stay in memory while rows are denoised. One that was let go is
    /// read again when a prompt comes whose embedding is not remembered; prompts that wait are encoded along with it.
    /// `auto` keeps those that leave room for pictures.
    pub text_encoders: String,
    /// Bytes of prompts' embeddings that are remembered.
    pub embedding_bytes: u64,
    /// Rows of a batch at most.
    pub max_batch: u32,
    /// Leases held beside the running batch, so that the device never waits.
    pub window: u32,
    /// Seconds a lease lasts unless renewed.
    pub lease_seconds: f64,
    /// Seconds between heartbeats.
    pub heartbeat_seconds: f64,
    /// Seconds an interactive job of another checkpoint waits before a warm worker moves to it.
    pub interactive_wait_seconds: f64,
    /// Seconds a bulk job of another checkpoint waits before a warm worker moves to it.
    pub bulk_wait_seconds: f64,
    /// Failures in a row after which the worker drains itself.
    pub max_failures: u32,
    /// Seconds an orderly stop waits for running rows; what is left then is released.
    pub shutdown_seconds: f64,
    /// Never ask the hub; use what its cache holds.
    pub offline: bool,
    /// The hub's address. Default: `HF_ENDPOINT`, else the public hub.
    pub hub_endpoint: Option<String>,
    /// The hub's cache folder. Default: `HF_HOME`, else `~/.cache/huggingface`.
    pub hub_cache: Option<PathBuf>,
    /// The hub's access token. Default: `HF_TOKEN`.
    pub hub_token: Option<Secret>,
}

impl Default for WorkerConfig {
    fn default() -> Self {
        Self {
            name: None,
            device: None,
            dtype: None,
            vae_bytes: None,
            text_encoders: "auto".into(),
            embedding_bytes: 256 << 20,
            max_batch: 8,
            window: 16,
            lease_seconds: 60.0,
            heartbeat_seconds: 3.0,
            interactive_wait_seconds: 5.0,
            bulk_wait_seconds: 60.0,
            max_failures: 10,
            shutdown_seconds: 30.0,
            offline: false,
            hub_endpoint: None,
            hub_cache: None,
            hub_token: None,
        }
    }
}

/// Seconds as a duration; negative and absurd values become zero and a century.
pub fn seconds(value: f64) -> Duration {
    Duration::try_from_secs_f64(value.clamp(0.0, 3e9)).unwrap_or(Duration::ZERO)
}
