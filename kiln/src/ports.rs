//! Opens the three ports that the configuration names: store, broker, artifacts.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use farm::artifact::SharedArtifacts;
use farm::broker::SharedBroker;
use farm::clock::{Clock, SystemClock};
use farm::config::{ArtifactsConfig, Config, Secret, StoreConfig, redact_url, seconds};
use farm::store::{SharedStore, StoreError, StoreSettings};
use farm::{artifact, broker, store};

use crate::catalog::data_dir;

/// How long a store that does not answer is waited for at the start: servers that are started
/// together come up in any order.
const STORE_PATIENCE: Duration = Duration::from_secs(60);

/// Prefix of queue names where the configuration gives none.
const PREFIX: &str = "kiln";

/// What scheduler and worker stand on.
#[derive(Clone)]
pub struct Ports {
    /// The store.
    pub store: SharedStore,
    /// The broker.
    pub broker: SharedBroker,
    /// The artifact store.
    pub artifacts: SharedArtifacts,
    /// The time.
    pub clock: Arc<dyn Clock>,
}

impl Ports {
    /// Opens what the configuration names; what it leaves open lies in the data folder or in this
    /// process. The store's tables are brought to this build's version.
    pub async fn open(config: &Config) -> Result<Self> {
        let clock: Arc<dyn Clock> = Arc::new(SystemClock);
        let url = store_url(config)?;
        let store = open_store(&url, &config.store, Arc::clone(&clock))
            .await
            .with_context(|| format!("the store {} cannot be used", redact_url(&url)))?;
        let prefix = config.broker.prefix.as_deref().unwrap_or(PREFIX);
        let broker = broker::connect(&config.broker.url.0, prefix).context("the broker cannot be used")?;
        let artifacts = open_artifacts(config)?;
        Ok(Self { store, broker, artifacts, clock })
    }
}

/// The store's address; SQLite in the data folder where the configuration gives none.
pub fn store_url(config: &Config) -> Result<String> {
    let Secret(url) = &config.store.url;
    if !url.is_empty() {
        return Ok(url.clone());
    }
    let data_dir = data_dir(config)?;
    std::fs::create_dir_all(&data_dir)
        .with_context(|| format!("the data folder {} cannot be made; set KILN_DATA_DIR", data_dir.display()))?;
    Ok(format!("sqlite:{}", data_dir.join("kiln.db").display()))
}

async fn open_store(url: &str, config: &StoreConfig, clock: Arc<dyn Clock>) -> Result<SharedStore> {
    let settings = StoreSettings {
        backoff: seconds(config.backoff_seconds),
        backoff_max: seconds(config.backoff_max_seconds),
        worker_timeout: seconds(config.worker_timeout_seconds),
        connections: config.connections,
    };
    let start = tokio::time::Instant::now();
    loop {
        match store::connect(url, &settings, Arc::clone(&clock)).await {
            Err(error @ StoreError::Unavailable(_)) if start.elapsed() < STORE_PATIENCE => {
                tracing::warn!("{error}; trying again");
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
            outcome => return Ok(outcome?),
        }
    }
}

fn open_artifacts(config: &Config) -> Result<SharedArtifacts> {
    let folder = match &config.artifacts {
        ArtifactsConfig { url, .. } if url.is_empty() => data_dir(config)?.join("artifacts"),
        _ => Default::default(),
    };
    artifact::open(&config.artifacts, &folder).with_context(|| {
        let url = &config.artifacts.url;
        format!(
            "the artifact store {} cannot be used",
            if url.is_empty() { folder.display().to_string() } else { url.clone() }
        )
    })
}

/// Refuses what only one process can use, for commands that share the farm with others.
pub fn require_servers(config: &Config, command: &str) -> Result<()> {
    let mut missing = Vec::new();
    let Secret(store) = &config.store.url;
    if !store.starts_with("postgres") {
        missing.push("KILN_STORE_URL must be postgres://… (a SQLite file serves one machine's `kiln up`)");
    }
    if !config.broker.url.0.starts_with("amqp") {
        missing.push("KILN_BROKER_URL must be amqp://… (the broker in memory serves one process)");
    }
    if config.artifacts.url.is_empty() {
        missing.push("KILN_ARTIFACTS_URL must be s3://BUCKET, or a folder that every process sees");
    }
    if missing.is_empty() {
        return Ok(());
    }
    bail!(
        "`kiln {command}` shares a farm with other processes, so:\n  {}\nFor servers of your own: `infra/services.sh up` \
         and `eval \"$(infra/services.sh env)\"`. For a farm in one process: `kiln up`.",
        missing.join("\n  ")
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn separate_processes_need_servers_and_are_told_all_that_is_missing() {
        let mut config = Config::default();
        config.store.url.0 = "sqlite:kiln.db".into();
        let error = require_servers(&config, "worker").unwrap_err().to_string();
        for word in ["kiln worker", "KILN_STORE_URL", "KILN_BROKER_URL", "KILN_ARTIFACTS_URL", "kiln up"] {
            assert!(error.contains(word), "{word}: {error}");
        }
        config.store.url.0 = "postgres://db/kiln".into();
        config.broker.url.0 = "amqp://mq".into();
        config.artifacts.url = "s3://pictures".into();
        assert!(require_servers(&config, "worker").is_ok());
    }

    #[test]
    fn without_a_store_the_data_folder_holds_one() {
        let folder = tempfile::tempdir().unwrap();
        let config = Config { data_dir: Some(folder.path().join("new")), ..Config::default() };
        assert_eq!(store_url(&config).unwrap(), format!("sqlite:{}", folder.path().join("new/kiln.db").display()));
        assert!(folder.path().join("new").is_dir());
    }
}
