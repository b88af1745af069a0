//! The HTTP API.
//!
//! Reading order: `router` (every route, and what each passes through), `auth` (who may call),
//! `observe` (log, metrics, panics, time limits), `error` (what goes wrong, as a problem document), `body`, `query` and
//! `idempotency` (how requests are read); then a file per resource: `jobs`, `submissions`, `intake` (JSON
//! Lines), `stream` (one job's news), `image`, `artifacts`, `models`, `workers`, `health`, `scrape` (metrics), and `openapi`.
//!
//! Handlers hold no state of their own: what a client was told is in the store.

mod router;

mod auth;
mod observe;

mod body;
mod error;
mod idempotency;
mod query;

mod artifacts;
mod health;
mod image;
mod intake;
mod jobs;
mod models;
mod openapi;
mod scrape;
mod stream;
mod submissions;
mod workers;

use std::sync::Arc;

use farm::artifact::SharedArtifacts;
use farm::broker::SharedBroker;
use farm::catalog::Catalog;
use farm::config::ApiConfig;
use farm::spec::Limits;
use farm::store::SharedStore;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

pub use self::artifacts::ArtifactStored;
pub(crate) use self::auth::Keys;
pub use self::error::Problem;
pub use self::health::{Part, Ready};
pub use self::jobs::{JobAccepted, JobPage, JobStateView};
pub use self::models::{ModelView, Models};
pub use self::openapi::document;
pub(crate) use self::router::router;
pub use self::stream::StreamEvent;
pub use self::submissions::{SubmissionAccepted, SubmissionCountersView, SubmissionPage, SubmissionRetried};
pub use self::workers::Workers;
use crate::Scheduler;
use crate::metrics::Metrics;

/// What the handlers share.
pub(crate) struct Api {
    pub(crate) store: SharedStore,
    pub(crate) broker: SharedBroker,
    pub(crate) artifacts: SharedArtifacts,
    pub(crate) catalog: Arc<Catalog>,
    pub(crate) limits: Limits,
    pub(crate) config: ApiConfig,
    /// Attempts of a job, unless its submission says otherwise.
    pub(crate) max_attempts: u32,
    pub(crate) keys: Keys,
    pub(crate) metrics: Metrics,
    /// Wakes the dispatcher: there are new pending jobs.
    pub(crate) nudge: Arc<Notify>,
    /// Cancelled when the process is about to stop.
    pub(crate) stop: CancellationToken,
    pub(crate) readiness: health::Readiness,
}

/// How handlers hold it.
pub(crate) type SharedApi = Arc<Api>;

impl Api {
    pub(crate) fn new(
        scheduler: Scheduler,
        keys: Keys,
        metrics: Metrics,
        nudge: Arc<Notify>,
        stop: CancellationToken,
    ) -> SharedApi {
        let Scheduler { store, broker, artifacts, catalog, limits, api, config, clock: _ } = scheduler;
        Arc::new(Self {
            store,
            broker,
            artifacts,
            catalog,
            limits,
            config: api,
            max_attempts: config.max_attempts,
            keys,
            metrics,
            nudge,
            stop,
            readiness: health::Readiness::default(),
        })
    }
}
