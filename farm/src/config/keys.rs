//! Every key of the configuration and the environment variable that sets it.

use std::collections::BTreeMap;
use std::path::PathBuf;

use super::{ApiConfig, ArtifactsConfig, BrokerConfig, Config, SchedulerConfig, Secret, StoreConfig, WorkerConfig};
use crate::spec::Limits;

/// What a key's value looks like in an environment variable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Text, taken as it is.
    Text,
    /// A whole number.
    Whole,
    /// A number.
    Number,
    /// `true` or `false` (also `1`, `0`, `yes`, `no`, `on`, `off`).
    Switch,
    /// `NAME=TEXT,NAME2=TEXT2`.
    Pairs,
    /// `NAME=SOURCE,NAME2=SOURCE2`: checkpoints and where they come from.
    Models,
}

impl Kind {
    /// The kind in words, for messages.
    pub fn describe(self) -> &'static str {
        match self {
            Self::Text => "text",
            Self::Whole => "a whole number",
            Self::Number => "a number",
            Self::Switch => "true or false",
            Self::Pairs => "NAME=VALUE pairs with commas between",
            Self::Models => "NAME=SOURCE pairs with commas between",
        }
    }
}

/// One key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Key {
    /// Its place in the TOML file: section by section.
    pub path: Vec<String>,
    /// What its value looks like.
    pub kind: Kind,
}

impl Key {
    /// Its place in words: `worker.max_batch`.
    pub fn name(&self) -> String {
        self.path.join(".")
    }

    /// Its environment variable: `KILN_WORKER_MAX_BATCH`.
    pub fn variable(&self) -> String {
        format!("KILN_{}", self.path.join("_").to_uppercase())
    }
}

/// Every key there is, in the order of the file.
pub fn keys() -> Vec<Key> {
    let all = toml::Table::try_from(every_key()).expect("a configuration can be written as TOML");
    let mut keys = Vec::new();
    collect(&all, &mut Vec::new(), &mut keys);
    keys
}

fn collect(table: &toml::Table, path: &mut Vec<String>, keys: &mut Vec<Key>) {
    for (name, value) in table {
        path.push(name.clone());
        let kind = match value {
            _ if path == &["models"] => Some(Kind::Models),
            _ if path == &["api", "key_hashes"] => Some(Kind::Pairs),
            toml::Value::Table(section) => {
                collect(section, path, keys);
                None
            }
            toml::Value::Integer(_) => Some(Kind::Whole),
            toml::Value::Float(_) => Some(Kind::Number),
            toml::Value::Boolean(_) => Some(Kind::Switch),
            _ => Some(Kind::Text),
        };
        keys.extend(kind.map(|kind| Key { path: path.clone(), kind }));
        path.pop();
    }
}

/// A configuration with every key present (TOML has no way to write an absent one). No `..`: a new
/// field does not compile until it stands here.
fn every_key() -> Config {
    let text = || Some(String::new());
    let secret = || Some(Secret::default());
    let (api, artifacts) = (ApiConfig::default(), ArtifactsConfig::default());
    let worker = WorkerConfig::default();
    Config {
        data_dir: Some(PathBuf::new()),
        store: StoreConfig::default(),
        broker: BrokerConfig { url: Secret::default(), prefix: text() },
        artifacts: ArtifactsConfig {
            url: String::new(),
            endpoint: text(),
            public_endpoint: text(),
            region: artifacts.region,
            access_key_id: text(),
            secret_access_key: secret(),
        },
        api: ApiConfig {
            listen: api.listen,
            key_hashes: BTreeMap::new(),
            image_url_seconds: api.image_url_seconds,
            spool_dir: Some(PathBuf::new()),
        },
        scheduler: SchedulerConfig::default(),
        worker: WorkerConfig {
            name: text(),
            device: text(),
            dtype: text(),
            vae_bytes: Some(0),
            text_encoders: worker.text_encoders,
            embedding_bytes: worker.embedding_bytes,
            max_batch: worker.max_batch,
            window: worker.window,
            lease_seconds: worker.lease_seconds,
            heartbeat_seconds: worker.heartbeat_seconds,
            interactive_wait_seconds: worker.interactive_wait_seconds,
            bulk_wait_seconds: worker.bulk_wait_seconds,
            max_failures: worker.max_failures,
            shutdown_seconds: worker.shutdown_seconds,
            offline: worker.offline,
            hub_endpoint: text(),
            hub_cache: Some(PathBuf::new()),
            hub_token: secret(),
        },
        limits: Limits::default(),
        default_model: text(),
        models: BTreeMap::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_key_has_its_own_variable() {
        let mut variables: Vec<_> = keys().iter().map(Key::variable).collect();
        for expected in
            ["KILN_STORE_URL", "KILN_WORKER_HUB_TOKEN", "KILN_API_KEY_HASHES", "KILN_DATA_DIR", "KILN_MODELS"]
        {
            assert!(variables.iter().any(|variable| variable == expected), "{expected}");
        }
        let all = variables.len();
        variables.sort();
        variables.dedup();
        assert_eq!(variables.len(), all);
    }

    #[test]
    fn a_variable_knows_what_its_value_looks_like() {
        let kind = |name: &str| keys().into_iter().find(|key| key.name() == name).map(|key| key.kind);
        assert_eq!(kind("worker.max_batch"), Some(Kind::Whole));
        assert_eq!(kind("worker.lease_seconds"), Some(Kind::Number));
        assert_eq!(kind("worker.offline"), Some(Kind::Switch));
        assert_eq!(kind("api.listen"), Some(Kind::Text));
        assert_eq!(kind("models"), Some(Kind::Models));
    }
}
