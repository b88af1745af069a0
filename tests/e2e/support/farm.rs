//! One scheduler and some workers over the real servers, with a database, queues and objects that no
//! other test touches.

use std::net::TcpListener;
use std::path::PathBuf;
use std::time::Duration;

use sqlx::{Connection, Executor, PgConnection};

use super::process::{Process, kiln};
use super::services::{Services, repository};
use super::{Client, eventually};

/// A farm, torn down when dropped.
pub struct Farm {
    /// The API.
    pub client: Client,
    /// The scheduler's process.
    pub scheduler: Process,
    /// The workers' processes, in the order they were started.
    pub workers: Vec<Process>,
    /// This farm's database.
    pub store_url: String,
    /// Prefix of this farm's queues.
    pub prefix: String,
    /// What every process of this farm is started with.
    pub environment: Vec<(String, String)>,
    /// The servers.
    pub services: Services,
    folder: tempfile::TempDir,
}

/// A checkpoint of random weights, loaded and run in milliseconds.
pub fn tiny_checkpoint() -> PathBuf {
    let folder = repository().join("engine/tests/fixtures/checkpoints/sd1");
    assert!(folder.join("model_index.json").exists(), "{} is a checkpoint", folder.display());
    folder
}

impl Farm {
    /// A scheduler and `workers` workers that know the checkpoints `demo` and `tiny`.
    pub async fn start(services: Services, workers: usize) -> Self {
        Self::start_with(services, workers, &[]).await
    }

    /// The same with `more` variables, which win over the usual ones.
    pub async fn start_with(services: Services, workers: usize, more: &[(&str, String)]) -> Self {
        let prefix = format!("e2e-{}", uuid::Uuid::now_v7().simple());
        let store_url = create_database(&services.store_url, &prefix.replace('-', "_")).await;
        let artifacts_url = format!("{}/{prefix}", services.artifacts_url);
        let folder = tempfile::tempdir().expect("a temporary folder");
        let port = free_port();
        let mut environment = inherited(&["KILN_ARTIFACTS_"]);
        for (name, value) in [
            ("KILN_STORE_URL", store_url.clone()),
            ("KILN_BROKER_URL", services.broker_url.clone()),
            ("KILN_BROKER_PREFIX", prefix.clone()),
            ("KILN_ARTIFACTS_URL", artifacts_url),
            ("KILN_API_LISTEN", format!("127.0.0.1:{port}")),
            ("KILN_DATA_DIR", folder.path().display().to_string()),
            ("KILN_MODELS", format!("tiny={}", tiny_checkpoint().display())),
            ("KILN_STORE_BACKOFF_SECONDS", "0.2".into()),
            ("KILN_STORE_WORKER_TIMEOUT_SECONDS", "5".into()),
            ("KILN_WORKER_LEASE_SECONDS", "8".into()),
            ("KILN_WORKER_HEARTBEAT_SECONDS", "1".into()),
            ("KILN_WORKER_BULK_WAIT_SECONDS", "20".into()),
            ("KILN_SCHEDULER_REAP_INTERVAL_SECONDS", "0.5".into()),
            ("KILN_SCHEDULER_RECONCILE_INTERVAL_SECONDS", "1".into()),
            ("KILN_SCHEDULER_RECONCILE_GRACE_SECONDS", "5".into()),
            ("KILN_SCHEDULER_LEFTOVER_GRACE_SECONDS", "2".into()),
            ("KILN_LOG", "info".into()),
        ]
        .into_iter()
        .chain(more.iter().cloned())
        {
            environment.retain(|(known, _)| known != name);
            environment.push((name.into(), value));
        }
        let scheduler = start_role("scheduler", "scheduler", &environment, &folder);
        let client = Client::new(format!("http://127.0.0.1:{port}"));
        let mut farm =
            Self { client, scheduler, workers: Vec::new(), store_url, prefix, environment, services, folder };
        farm.wait_until_ready().await;
        for _ in 0..workers {
            farm.add_worker();
        }
        farm
    }

    /// Starts one more worker.
    pub fn add_worker(&mut self) {
        let name = format!("worker-{}", self.workers.len());
        self.workers.push(start_role("worker", &name, &self.environment, &self.folder));
    }

    /// Ends the scheduler without warning and starts it anew.
    pub async fn restart_scheduler(&mut self) {
        self.scheduler.kill_9();
        self.scheduler = start_role("scheduler", "scheduler", &self.environment, &self.folder);
        self.wait_until_ready().await;
    }

    async fn wait_until_ready(&self) {
        eventually("the scheduler is ready", Duration::from_secs(60), || async {
            self.client.try_get("/readyz").await.filter(|(status, _)| status.is_success())
        })
        .await;
    }

    /// Waits until a counter of a submission has reached a value.
    ///
    /// # Panics
    /// If a job fails, with its error.
    pub async fn wait_for(&self, submission: &str, counter: &str, at_least: u64, limit: Duration) {
        eventually(&format!("{at_least} jobs of the submission are {counter}"), limit, || async {
            if self.client.counter(submission, "failed").await? > 0 {
                let page = self.client.get(&format!("/v1/jobs?submission_id={submission}&state=failed&limit=1")).await;
                panic!("a job failed: {}", page["jobs"][0]["error"]);
            }
            self.client.counter(submission, counter).await.filter(|&count| count >= at_least)
        })
        .await;
    }

    /// A connection to this farm's database.
    pub async fn database(&self) -> PgConnection {
        PgConnection::connect(&self.store_url).await.expect("the database answers")
    }
}

/// Starts `kiln ROLE` with a log in the farm's folder.
fn start_role(role: &str, name: &str, environment: &[(String, String)], folder: &tempfile::TempDir) -> Process {
    let mut command = kiln(environment);
    command.arg(role).current_dir(folder.path());
    Process::start(command, &folder.path().join(format!("{name}.log")))
}

/// This process's variables with one of the prefixes.
fn inherited(prefixes: &[&str]) -> Vec<(String, String)> {
    let all = farm::config::Environment::of_this_process().0;
    all.into_iter().filter(|(name, _)| prefixes.iter().any(|prefix| name.starts_with(prefix))).collect()
}

/// A port that was free a moment ago.
fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).expect("a free port").port()
}

/// Makes a database and answers its URL.
async fn create_database(server: &str, name: &str) -> String {
    let mut connection = PgConnection::connect(server).await.expect("Postgres answers");
    let statement = format!("CREATE DATABASE {name}");
    connection.execute(sqlx::AssertSqlSafe(statement)).await.expect("a database can be made");
    let (base, _) = server.rsplit_once('/').expect("the URL names a database");
    format!("{base}/{name}")
}
