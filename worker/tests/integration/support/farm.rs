//! A farm of one process for each test: SQLite, the in-process broker, a folder, and a clock that stands
//! still.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use chrono::Utc;
use farm::artifact::folder::FolderArtifacts;
use farm::broker::memory::MemoryBroker;
use farm::catalog::{Catalog, ModelFacts};
use farm::clock::MockClock;
use farm::config::WorkerConfig;
use farm::id::{JobId, SubmissionId};
use farm::job::{Counters, JobState, JobView, Lane, NewJob, NewSubmission};
use farm::message::QueueKey;
use farm::spec::{Limits, RenderSpec};
use farm::store::{SharedStore, StoreSettings};
use futures_util::stream;
use tempfile::TempDir;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use worker::{Worker, WorkerSummary};

use super::fake::{FakeRenderer, Stage};
use super::faults::Faults;
use super::ports::{FaultyArtifacts, FaultyBroker, FaultyStore};

/// No wait in these tests takes longer, unless something is wrong.
const PATIENCE: Duration = Duration::from_secs(30);

/// Waits until `condition` holds, or fails with what was waited for.
pub async fn wait_for(what: &str, mut condition: impl AsyncFnMut() -> bool) {
    let waiting = async {
        while !condition().await {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    assert!(tokio::time::timeout(PATIENCE, waiting).await.is_ok(), "waited in vain for: {what}");
}

pub struct TestFarm {
    /// Not through the switches: what the test asks is always answered.
    pub store: SharedStore,
    pub faults: Arc<Faults>,
    pub clock: MockClock,
    pub config: WorkerConfig,
    pub folder: TempDir,
    pub worker: Worker,
}

impl TestFarm {
    pub async fn new() -> Self {
        Self::with(|_| {}).await
    }

    /// With settings of the test's own.
    pub async fn with(change: impl FnOnce(&mut WorkerConfig)) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let clock = MockClock::new(Utc::now());
        let url = format!("sqlite:{}", folder.path().join("kiln.db").display());
        let store = farm::store::connect(&url, &StoreSettings::default(), Arc::new(clock.clone())).await.unwrap();
        let faults = Arc::new(Faults::default());
        let models = ["a", "b"].map(|name| {
            let weights = folder.path().join(name);
            std::fs::create_dir(&weights).unwrap();
            (name.to_owned(), ModelFacts::assumed(weights.to_string_lossy()))
        });
        let mut config = WorkerConfig {
            name: Some("test".into()),
            max_batch: 4,
            window: 4,
            heartbeat_seconds: 0.02,
            shutdown_seconds: 20.0,
            ..WorkerConfig::default()
        };
        change(&mut config);
        let artifacts = Arc::new(FolderArtifacts::open(&folder.path().join("artifacts")).unwrap());
        let worker = Worker {
            store: Arc::new(FaultyStore { inner: Arc::clone(&store), faults: Arc::clone(&faults) }),
            broker: Arc::new(FaultyBroker { inner: Arc::new(MemoryBroker::new()), faults: Arc::clone(&faults) }),
            artifacts: Arc::new(FaultyArtifacts { inner: artifacts, faults: Arc::clone(&faults) }),
            catalog: Arc::new(Catalog::new(BTreeMap::from(models), "a").unwrap()),
            config: config.clone(),
            limits: Limits::default(),
            clock: Arc::new(clock.clone()),
        };
        Self { store, faults, clock, config, folder, worker }
    }

    /// A bulk job of two steps for checkpoint `a`; its seed is its prompt's length.
    pub fn spec(prompt: &str) -> RenderSpec {
        RenderSpec {
            model: "a".into(),
            prompt: prompt.into(),
            negative_prompt: String::new(),
            width: 16,
            height: 8,
            steps: 2,
            guidance_scale: 7.5,
            sampler: None,
            schedule: None,
            seed: prompt.len() as u64,
            init_image: None,
            lane: Lane::Bulk,
            tags: vec![],
            metadata: serde_json::Map::new(),
            options: farm::spec::FamilyOptions::default(),
        }
    }

    /// Puts jobs on the broker as the scheduler does.
    pub async fn submit(&self, specs: impl IntoIterator<Item = RenderSpec>) -> Vec<JobId> {
        let jobs: Vec<_> = specs.into_iter().map(|spec| NewJob { id: JobId::new(), spec }).collect();
        let ids = jobs.iter().map(|job| job.id).collect();
        let submission = NewSubmission {
            id: SubmissionId::new(),
            idempotency: None,
            name: None,
            max_attempts: 3,
            failure_limit: None,
        };
        self.store.submit(&submission, Box::pin(stream::iter(jobs.into_iter().map(Ok)))).await.unwrap();
        self.dispatch().await;
        ids
    }

    pub async fn submit_prompts(&self, prompts: &[&str]) -> Vec<JobId> {
        self.submit(prompts.iter().map(|prompt| Self::spec(prompt))).await
    }

    pub async fn dispatch(&self) {
        for demand in self.store.demand().await.unwrap() {
            self.store.dispatch(&demand.queue, 1000, &*self.worker.broker).await.unwrap();
        }
    }

    pub fn start(&self, stage: &Arc<Stage>) -> Running {
        let (stop, stopped) = oneshot::channel::<()>();
        let (worker, renderer) = (self.worker.clone(), FakeRenderer(Arc::clone(stage)));
        let shutdown = async move { drop(stopped.await) };
        Running { stop, task: tokio::spawn(worker::run_with(worker, renderer, shutdown)) }
    }

    pub async fn job(&self, job: JobId) -> JobView {
        self.store.job(job).await.unwrap().expect("the job exists")
    }

    pub async fn wait_for_state(&self, jobs: &[JobId], state: JobState) {
        for job in jobs {
            wait_for(&format!("job {job} to be {}", state.as_str()), async || self.job(*job).await.state == state)
                .await;
        }
    }

    pub async fn totals(&self) -> Counters {
        self.store.totals().await.unwrap()
    }

    /// The stored object that a job's row names.
    pub async fn object(&self, path: &str) -> Bytes {
        self.worker.artifacts.get(path).await.unwrap()
    }

    /// Every stored object.
    pub async fn objects(&self) -> Vec<String> {
        self.worker.artifacts.list("").await.unwrap()
    }

    /// Messages on the broker, of both lanes.
    pub async fn queued(&self, model: &str) -> u64 {
        let mut sum = 0;
        for lane in Lane::ALL {
            sum += self.worker.broker.depth(&QueueKey { model: model.into(), lane }).await.unwrap();
        }
        sum
    }
}

/// A worker at work.
pub struct Running {
    stop: oneshot::Sender<()>,
    task: JoinHandle<anyhow::Result<WorkerSummary>>,
}

impl Running {
    /// Asks the worker to stop and waits until it has.
    pub async fn stop(self) -> WorkerSummary {
        drop(self.stop);
        finish(self.task).await.expect("the worker stops in order")
    }

    /// Waits until the worker stops by itself.
    pub async fn ended(self) -> anyhow::Result<WorkerSummary> {
        let _running = self.stop;
        finish(self.task).await
    }
}

async fn finish(task: JoinHandle<anyhow::Result<WorkerSummary>>) -> anyhow::Result<WorkerSummary> {
    tokio::time::timeout(PATIENCE, task).await.expect("the worker stops in time").expect("the worker does not panic")
}
