//! Where the farms under test stand: nothing that existed before is touched, nothing stays behind.
//!
//! What the configuration names is used where it is a server: a scratch database on that Postgres, queues and objects
//! below names of their own. Everything else lies in a temporary folder or in this process.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result};
use farm::artifact;
use farm::broker::amqp::AmqpBroker;
use farm::catalog::{Catalog, DEMO, ModelConfig};
use farm::config::{ApiConfig, ArtifactsConfig, BrokerConfig, Config, Secret, StoreConfig};
use farm::job::Lane;
use farm::message::QueueKey;
use farm::spec::Limits;
use farm::store::scratch;
use futures_util::{StreamExt, stream};
use serde::Serialize;
use tempfile::TempDir;
use uuid::Uuid;

use super::machine;
use super::rig::Rig;
use crate::catalog;
use crate::ports::Ports;

/// The demo checkpoint under a second name: for the farm another checkpoint.
pub const TWIN: &str = "demo-twin";

/// Deletions that are under way at once.
const DELETIONS: usize = 16;

/// What the farm under test stands on.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Footing {
    /// `postgres` or `sqlite`.
    pub store: &'static str,
    /// `amqp` or `memory`.
    pub broker: &'static str,
    /// `s3` or `folder`.
    pub artifacts: &'static str,
    /// What the temporary folder lies on.
    pub file_system: Option<String>,
}

/// A place for farms.
pub struct Site {
    config: Config,
    /// What the demo checkpoint and its twin are.
    pub catalog: Arc<Catalog>,
    folder: TempDir,
    /// Every name on a server begins with it.
    name: String,
    rigs: AtomicU32,
}

impl Site {
    /// Takes from `config` where the servers are and how a worker is set.
    pub async fn prepare(config: &Config) -> Result<Self> {
        let folder = tempfile::Builder::new().prefix("kiln-bench-").tempdir().context("no temporary folder")?;
        let mut config = Config {
            data_dir: Some(folder.path().to_owned()),
            store: StoreConfig { url: only_with("postgres", &config.store.url), ..config.store.clone() },
            broker: BrokerConfig { url: only_with("amqp", &config.broker.url), prefix: None },
            artifacts: match config.artifacts.url.starts_with("s3:") {
                true => config.artifacts.clone(),
                false => ArtifactsConfig::default(),
            },
            api: ApiConfig { spool_dir: config.api.spool_dir.clone(), ..ApiConfig::default() },
            limits: Limits { submission_jobs: u64::MAX, ..Limits::default() },
            default_model: None,
            models: BTreeMap::new(),
            ..config.clone()
        };
        let demo = catalog::build(&config).await?.find(Some(DEMO))?.1.source.clone();
        config.models.insert(TWIN.to_owned(), ModelConfig { source: demo, ..ModelConfig::default() });
        let catalog = Arc::new(catalog::build(&config).await?);
        let name = format!("kiln_bench_{}", Uuid::now_v7().simple());
        Ok(Self { config, catalog, folder, name, rigs: AtomicU32::new(0) })
    }

    /// The configuration of every farm here.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// What farms here stand on.
    pub fn footing(&self) -> Footing {
        Footing {
            store: if self.has_postgres() { "postgres" } else { "sqlite" },
            broker: if self.config.broker.url.0.is_empty() { "memory" } else { "amqp" },
            artifacts: if self.config.artifacts.url.is_empty() { "folder" } else { "s3" },
            file_system: machine::file_system(self.folder.path()),
        }
    }

    /// An empty farm of which nothing runs yet.
    pub async fn rig(&self) -> Result<Rig> {
        let number = self.rigs.fetch_add(1, Ordering::Relaxed);
        let config = self.names_of(number);
        if self.has_postgres() {
            let Secret(server) = &self.config.store.url;
            scratch::create(server, &self.scoped(number)).await.context("no scratch database can be made")?;
        }
        let ports = Ports::open(&config).await?;
        Ok(Rig::new(config, Arc::clone(&self.catalog), ports))
    }

    /// Removes what the farms have left on servers. They must have been stopped.
    pub async fn clear(self) -> Result<()> {
        for number in 0..self.rigs.load(Ordering::Relaxed) {
            let config = self.names_of(number);
            if self.has_postgres() {
                let Secret(server) = &self.config.store.url;
                scratch::remove(server, &self.scoped(number)).await.context("a scratch database stays behind")?;
            }
            if let Some(prefix) = &config.broker.prefix {
                let broker = AmqpBroker::new(&config.broker.url.0, prefix)?;
                broker.dismantle(&self.queues()).await.context("queues stay behind")?;
            }
            if !config.artifacts.url.is_empty() {
                delete_objects(&config).await.context("objects stay behind")?;
            }
        }
        Ok(())
    }

    fn has_postgres(&self) -> bool {
        !self.config.store.url.0.is_empty()
    }

    fn queues(&self) -> Vec<QueueKey> {
        let models = self.catalog.models().map(|(model, _)| model.to_owned());
        models.flat_map(|model| Lane::ALL.map(|lane| QueueKey { model: model.clone(), lane })).collect()
    }

    fn scoped(&self, number: u32) -> String {
        format!("{}_{number}", self.name)
    }

    /// The configuration of one farm: the same servers, names of its own.
    fn names_of(&self, number: u32) -> Config {
        let name = self.scoped(number);
        let mut config = self.config.clone();
        if self.has_postgres() {
            config.store.url.0 = scratch::url_of(&self.config.store.url.0, &name);
        } else {
            config.store.url.0 = format!("sqlite:{}", self.folder.path().join(format!("{name}.db")).display());
        }
        if !config.broker.url.0.is_empty() {
            config.broker.prefix = Some(name.clone());
        }
        if !config.artifacts.url.is_empty() {
            config.artifacts.url = format!("{}/{name}", config.artifacts.url.trim_end_matches('/'));
        }
        config
    }
}

/// A URL with that scheme, or none.
fn only_with(scheme: &str, url: &Secret) -> Secret {
    if url.0.starts_with(scheme) { url.clone() } else { Secret::default() }
}

async fn delete_objects(config: &Config) -> Result<()> {
    let artifacts = artifact::open(&config.artifacts, std::path::Path::new(""))?;
    let paths = artifacts.list("").await?;
    let mut deletions = stream::iter(&paths).map(|path| artifacts.delete(path)).buffer_unordered(DELETIONS);
    while let Some(deleted) = deletions.next().await {
        deleted?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn site(config: Config) -> Site {
        Site::prepare(&config).await.unwrap()
    }

    #[tokio::test]
    async fn without_servers_everything_lies_in_a_folder_that_goes_away() {
        let mut config = Config::default();
        config.store.url.0 = "sqlite:/somebody/else.db".into();
        config.artifacts.url = "file:/somebody/pictures".into();
        let site = site(config).await;
        let rig = site.names_of(3);
        let folder = site.folder.path().to_owned();
        assert!(rig.store.url.0.starts_with(&format!("sqlite:{}", folder.display())), "{}", rig.store.url.0);
        assert!(rig.artifacts.url.is_empty() && rig.broker.url.0.is_empty());
        assert_eq!(rig.data_dir.as_deref(), Some(&*folder));
        let footing = site.footing();
        assert_eq!((footing.store, footing.broker, footing.artifacts), ("sqlite", "memory", "folder"));
        drop(site);
        assert!(!folder.exists());
    }

    #[tokio::test]
    async fn on_servers_each_farm_has_names_of_its_own() {
        let mut config = Config::default();
        config.store.url.0 = "postgres://kiln:secret@db:5433/kiln".into();
        config.broker.url.0 = "amqp://mq".into();
        config.artifacts.url = "s3://pictures/".into();
        let site = site(config).await;
        let (one, two) = (site.names_of(0), site.names_of(1));
        assert_ne!(one.store.url.0, two.store.url.0);
        assert!(one.store.url.0.starts_with("postgres://kiln:secret@db:5433/kiln_bench_"), "{}", one.store.url.0);
        assert_ne!(one.broker.prefix, two.broker.prefix);
        assert!(one.artifacts.url.starts_with("s3://pictures/kiln_bench_"), "{}", one.artifacts.url);
        assert_ne!(one.artifacts.url, two.artifacts.url);
    }

    #[tokio::test]
    async fn the_twin_is_the_demo_checkpoint() {
        let site = site(Config::default()).await;
        let source = |name| site.catalog.find(Some(name)).unwrap().1.source.clone();
        assert_eq!(source(TWIN), source(DEMO));
        assert_eq!(site.queues().len(), 4);
    }
}
