//! A scheduler for each test, on a port of its own, over a folder of its own.

mod events;
mod faulty;
mod worker;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use farm::artifact::SharedArtifacts;
use farm::artifact::folder::FolderArtifacts;
use farm::catalog::{Catalog, ModelFacts};
use farm::clock::SystemClock;
use farm::config::{ApiConfig, SchedulerConfig};
use farm::spec::Limits;
use farm::store::{SharedStore, StoreSettings};
use reqwest::{Method, RequestBuilder, Response, StatusCode};
use scheduler::Scheduler;
use serde_json::Value;
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

pub use self::events::Events;
pub use self::faulty::{Fault, FaultyArtifacts, FaultyBroker, FaultyStore};
pub use self::worker::png;

/// What nothing in a test should take longer than.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// A running scheduler and everything beneath it.
pub struct Farm {
    pub address: SocketAddr,
    pub store: SharedStore,
    pub broker: Arc<FaultyBroker>,
    pub artifacts: SharedArtifacts,
    /// Switches that make the scheduler's view of the store fail. The tests' own view, `store`, never does.
    pub store_faults: Arc<FaultyStore>,
    pub artifact_faults: Arc<FaultyArtifacts>,
    http: reqwest::Client,
    stop: Option<oneshot::Sender<()>>,
    running: JoinHandle<anyhow::Result<()>>,
    _folder: tempfile::TempDir,
}

/// What a test may want otherwise.
#[derive(Clone, Debug)]
pub struct Settings {
    pub limits: Limits,
    pub api: ApiConfig,
    pub config: SchedulerConfig,
}

impl Default for Settings {
    fn default() -> Self {
        let config = SchedulerConfig {
            dispatch_interval_ms: 20,
            reap_interval_seconds: 0.05,
            reconcile_interval_seconds: 0.1,
            reconcile_grace_seconds: 0.2,
            leftover_grace_seconds: 0.0,
            shutdown_seconds: 5.0,
            ..SchedulerConfig::default()
        };
        Self { limits: Limits::default(), api: ApiConfig::default(), config }
    }
}

/// `demo` (128×128) and `large` (512×512).
pub fn catalog() -> Catalog {
    let demo = ModelFacts { width: 128, height: 128, steps: 20, ..ModelFacts::assumed("demo-folder") };
    let models = BTreeMap::from([("demo".to_owned(), demo), ("large".to_owned(), ModelFacts::assumed("large-folder"))]);
    Catalog::new(models, "demo").expect("the default is in the catalog")
}

impl Farm {
    pub async fn start() -> Self {
        Self::start_with(Settings::default()).await
    }

    pub async fn start_with(settings: Settings) -> Self {
        Self::start_on(settings, TcpListener::bind("127.0.0.1:0").await.unwrap()).await
    }

    /// Why a scheduler does not start.
    pub async fn refused(settings: Settings, listener: TcpListener) -> String {
        let mut farm = Self::start_on(settings, listener).await;
        let ended = tokio::time::timeout(PATIENCE, &mut farm.running).await.expect("it gives up at once");
        format!("{:#}", ended.unwrap().expect_err("it must not start"))
    }

    async fn start_on(settings: Settings, listener: TcpListener) -> Self {
        // Fails from the second test on: it is installed already.
        let _installed = rustls::crypto::ring::default_provider().install_default();
        let folder = tempfile::tempdir().unwrap();
        let store_settings =
            StoreSettings { backoff: Duration::ZERO, backoff_max: Duration::ZERO, ..StoreSettings::default() };
        let url = format!("sqlite:{}", folder.path().join("store.db").display());
        let store = farm::store::connect(&url, &store_settings, Arc::new(SystemClock)).await.unwrap();
        let artifacts: SharedArtifacts = Arc::new(FolderArtifacts::open(&folder.path().join("artifacts")).unwrap());
        let broker = Arc::new(FaultyBroker::new());
        let store_faults = Arc::new(FaultyStore::over(store.clone()));
        let artifact_faults = Arc::new(FaultyArtifacts::over(artifacts.clone()));
        let address = listener.local_addr().unwrap();
        let scheduler = Scheduler {
            store: store_faults.clone(),
            broker: broker.clone(),
            artifacts: artifact_faults.clone(),
            catalog: Arc::new(catalog()),
            limits: settings.limits,
            api: settings.api,
            config: settings.config,
            clock: Arc::new(SystemClock),
        };
        let (stop, stopped) = oneshot::channel::<()>();
        let running = tokio::spawn(scheduler::run(scheduler, listener, stopped));
        let http = reqwest::Client::builder().redirect(reqwest::redirect::Policy::none()).no_proxy().build().unwrap();
        let stop = Some(stop);
        Self { address, store, broker, artifacts, store_faults, artifact_faults, http, stop, running, _folder: folder }
    }

    pub fn request(&self, method: Method, path: &str) -> RequestBuilder {
        self.http.request(method, format!("http://{}{path}", self.address)).timeout(PATIENCE)
    }

    pub async fn get(&self, path: &str) -> Answer {
        Answer::of(self.request(Method::GET, path)).await
    }

    pub async fn post(&self, path: &str, body: Value) -> Answer {
        Answer::of(self.request(Method::POST, path).json(&body)).await
    }

    pub async fn post_lines(&self, path: &str, body: impl Into<reqwest::Body>) -> Answer {
        let request = self.request(Method::POST, path).header("content-type", "application/x-ndjson").body(body);
        Answer::of(request).await
    }

    pub async fn delete(&self, path: &str) -> Answer {
        Answer::of(self.request(Method::DELETE, path)).await
    }

    /// Submits one job and returns its id.
    pub async fn submit(&self, body: Value) -> String {
        let answer = self.post("/v1/jobs", body).await.with_status(StatusCode::ACCEPTED);
        answer.json["job_id"].as_str().unwrap().to_owned()
    }

    /// Waits until a job is in a state.
    pub async fn wait_for(&self, job: &str, state: &str) {
        eventually(&format!("job {job} is {state}"), async || {
            self.get(&format!("/v1/jobs/{job}")).await.json["state"] == state
        })
        .await;
    }

    /// How many jobs there are.
    pub async fn jobs_stored(&self) -> u64 {
        self.store.totals().await.unwrap().total()
    }

    /// Asks the scheduler to stop and waits until it has.
    pub async fn stop(mut self) {
        self.stop.take().expect("it is stopped once").send(()).expect("it still runs");
        tokio::time::timeout(PATIENCE, &mut self.running).await.expect("it stops in time").unwrap().unwrap();
    }

    /// Asks the scheduler to stop.
    pub fn begin_stop(&mut self) {
        self.stop.take().expect("it is stopped once").send(()).expect("it still runs");
    }

    /// Waits until it has stopped.
    pub async fn stopped(mut self) {
        tokio::time::timeout(PATIENCE, &mut self.running).await.expect("it stops in time").unwrap().unwrap();
    }
}

impl Drop for Farm {
    fn drop(&mut self) {
        self.running.abort();
    }
}

/// An answer, read whole.
#[derive(Debug)]
pub struct Answer {
    pub status: StatusCode,
    pub headers: reqwest::header::HeaderMap,
    pub bytes: bytes::Bytes,
    /// The body as JSON; `null` if it is none.
    pub json: Value,
}

impl Answer {
    pub async fn of(request: RequestBuilder) -> Self {
        Self::read(request.send().await.expect("the scheduler answers")).await
    }

    async fn read(response: Response) -> Self {
        let (status, headers) = (response.status(), response.headers().clone());
        let bytes = response.bytes().await.expect("the answer is whole");
        let json = serde_json::from_slice(&bytes).unwrap_or(Value::Null);
        Self { status, headers, bytes, json }
    }

    #[track_caller]
    pub fn with_status(self, status: StatusCode) -> Self {
        assert_eq!(self.status, status, "{}", String::from_utf8_lossy(&self.bytes));
        self
    }

    /// A problem document of that status; returns (field, limit, value).
    #[track_caller]
    pub fn problem(&self, status: u16) -> (String, String, String) {
        assert_eq!(self.status.as_u16(), status, "{}", String::from_utf8_lossy(&self.bytes));
        assert_eq!(self.headers["content-type"], "application/problem+json");
        assert_eq!(self.json["status"], status);
        for member in ["type", "title", "detail"] {
            assert!(self.json[member].as_str().is_some_and(|text| !text.is_empty()), "{member} of {}", self.json);
        }
        let text = |member: &str| self.json[member].as_str().unwrap_or_default().to_owned();
        (text("field"), text("limit"), text("value"))
    }

    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |value| value.to_str().unwrap())
    }
}

/// Waits until something holds.
pub async fn eventually(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let waiting = async {
        while !holds().await {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(PATIENCE, waiting).await.unwrap_or_else(|_| panic!("waited in vain until {what}"));
}
