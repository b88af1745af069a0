//! What a configuration must be, beyond its types; and how it is shown without its secrets.

use super::{Config, Secret};
use crate::spec::ValidationError;

impl Config {
    /// Refuses what no part of the farm can work with.
    pub fn check(&self) -> Result<(), ValidationError> {
        self.check_addresses()?;
        self.check_api()?;
        self.check_times()?;
        in_range("store.connections", self.store.connections, 1, 1000)?;
        in_range("scheduler.queue_bound", self.scheduler.queue_bound, 1, 1_000_000)?;
        in_range("scheduler.max_attempts", self.scheduler.max_attempts, 1, 100)?;
        in_range("worker.max_batch", self.worker.max_batch, 1, 1024)?;
        in_range("worker.window", self.worker.window, 1, 4096)?;
        in_range("worker.max_failures", self.worker.max_failures, 1, 1_000_000)?;
        if let Some(dtype) = &self.worker.dtype {
            must("worker.dtype", "f32, f16 or bf16", dtype, ["f32", "f16", "bf16"].contains(&dtype.as_str()))?;
        }
        let text_encoders = self.worker.text_encoders.as_str();
        let known = ["keep", "drop", "auto"].contains(&text_encoders);
        must("worker.text_encoders", "keep, drop or auto", text_encoders, known)?;
        for (name, model) in &self.models {
            must(&format!("models.{name}.source"), "a folder or a hub id", "empty", !model.source.is_empty())?;
        }
        Ok(())
    }

    fn check_addresses(&self) -> Result<(), ValidationError> {
        let starts =
            |url: &str, schemes: &[&str]| url.is_empty() || schemes.iter().any(|scheme| url.starts_with(scheme));
        let store = &self.store.url.0;
        let good = starts(store, &["postgres://", "postgresql://", "sqlite:"]);
        must("store.url", "postgres://… or sqlite:PATH", redact_url(store), good)?;
        let broker = &self.broker.url.0;
        let good = broker == "memory" || starts(broker, &["amqp://", "amqps://", "memory:"]);
        must("broker.url", "amqp://…, amqps://… or memory:", redact_url(broker), good)?;
        let artifacts = &self.artifacts.url;
        let good = !artifacts.contains("://") || starts(artifacts, &["s3://", "file:"]);
        must("artifacts.url", "s3://BUCKET[/PREFIX], file:FOLDER or a folder", artifacts, good)
    }

    fn check_api(&self) -> Result<(), ValidationError> {
        for (name, hash) in &self.api.key_hashes {
            let good = hash.len() == 64 && hash.bytes().all(|byte| byte.is_ascii_hexdigit());
            must(&format!("api.key_hashes.{name}"), "64 hex digits, as `kiln key` prints", hash.len(), good)?;
        }
        // What presigned URLs may last at most.
        in_range("api.image_url_seconds", self.api.image_url_seconds, 1, 7 * 24 * 3600)
    }

    fn check_times(&self) -> Result<(), ValidationError> {
        let (store, scheduler, worker) = (&self.store, &self.scheduler, &self.worker);
        let times = [
            ("store.backoff_seconds", store.backoff_seconds),
            ("store.backoff_max_seconds", store.backoff_max_seconds),
            ("store.worker_timeout_seconds", store.worker_timeout_seconds),
            ("scheduler.reap_interval_seconds", scheduler.reap_interval_seconds),
            ("scheduler.reconcile_interval_seconds", scheduler.reconcile_interval_seconds),
            ("scheduler.reconcile_grace_seconds", scheduler.reconcile_grace_seconds),
            ("scheduler.leftover_grace_seconds", scheduler.leftover_grace_seconds),
            ("scheduler.shutdown_seconds", scheduler.shutdown_seconds),
            ("worker.interactive_wait_seconds", worker.interactive_wait_seconds),
            ("worker.bulk_wait_seconds", worker.bulk_wait_seconds),
            ("worker.shutdown_seconds", worker.shutdown_seconds),
        ];
        for (key, value) in times {
            must(key, "0 to 1000000 seconds", value, (0.0..=1e6).contains(&value))?;
        }
        let (lease, heartbeat) = (worker.lease_seconds, worker.heartbeat_seconds);
        // RabbitMQ takes deliveries back after 30 minutes.
        must("worker.lease_seconds", "0.1 to 1500", lease, (0.1..=1500.0).contains(&lease))?;
        let good = heartbeat >= 0.01 && heartbeat * 2.0 <= lease;
        must("worker.heartbeat_seconds", "above 0.01 and at most half of worker.lease_seconds", heartbeat, good)
    }

    /// A copy for people's eyes: no password, key or token in it.
    pub fn redacted(&self) -> Self {
        let hide = |secret: &mut Option<Secret>| secret.iter_mut().for_each(|secret| secret.0 = "***".into());
        let mut copy = self.clone();
        copy.store.url.0 = redact_url(&copy.store.url.0);
        copy.broker.url.0 = redact_url(&copy.broker.url.0);
        for url in [&mut copy.artifacts.endpoint, &mut copy.artifacts.public_endpoint, &mut copy.worker.hub_endpoint] {
            *url = url.as_deref().map(redact_url);
        }
        hide(&mut copy.artifacts.secret_access_key);
        hide(&mut copy.worker.hub_token);
        copy
    }
}

fn must(key: &str, limit: &str, value: impl ToString, holds: bool) -> Result<(), ValidationError> {
    if holds {
        return Ok(());
    }
    Err(ValidationError { field: key.to_owned(), limit: limit.to_owned(), value: value.to_string() })
}

fn in_range<T: PartialOrd + ToString>(key: &str, value: T, low: T, high: T) -> Result<(), ValidationError> {
    let limit = format!("{} to {}", low.to_string(), high.to_string());
    let holds = value >= low && value <= high;
    must(key, &limit, value, holds)
}

/// A URL without its password: neither before the host nor as a `password` parameter.
pub fn redact_url(url: &str) -> String {
    // From the first colon to the last `@`, so that a password which was not escaped is hidden too.
    let parts = url.split_once("://").and_then(|(scheme, rest)| {
        let (user, host) = rest.rsplit_once('@')?;
        let (name, _password) = user.split_once(':')?;
        Some(format!("{scheme}://{name}:***@{host}"))
    });
    let shown = parts.unwrap_or_else(|| url.to_owned());
    let Some((address, query)) = shown.split_once('?') else { return shown };
    let part = |part: &str| match part.split_once('=') {
        Some((name, _)) if name.to_ascii_lowercase().contains("password") => format!("{name}=***"),
        _ => part.to_owned(),
    };
    format!("{address}?{}", query.split('&').map(part).collect::<Vec<_>>().join("&"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_defaults_are_valid() {
        assert_eq!(Config::default().check(), Ok(()));
    }

    #[test]
    fn a_url_is_shown_without_its_password() {
        assert_eq!(redact_url("postgres://ann:pa/ss@db:5432/kiln"), "postgres://ann:***@db:5432/kiln");
        assert_eq!(redact_url("postgres://ann:p@ss@db:5432/kiln"), "postgres://ann:***@db:5432/kiln");
        assert_eq!(redact_url("amqp://db/%2f"), "amqp://db/%2f");
        assert_eq!(redact_url("postgres://db/kiln?user=a&password=b"), "postgres://db/kiln?user=a&password=***");
        assert_eq!(redact_url("sqlite:/data/kiln.db"), "sqlite:/data/kiln.db");
    }

    #[test]
    fn a_redacted_configuration_holds_no_secret() {
        let mut config = Config::default();
        config.store.url.0 = "postgres://ann:hunter2@db/kiln".into();
        config.broker.url.0 = "amqp://ann:hunter2@mq".into();
        config.artifacts.secret_access_key = Some(Secret("hunter2".into()));
        config.worker.hub_token = Some(Secret("hunter2".into()));
        let shown = toml::to_string(&config.redacted()).unwrap();
        assert!(!shown.contains("hunter2"), "{shown}");
        assert!(shown.contains("postgres://ann:***@db/kiln"), "{shown}");
    }

    #[test]
    fn a_heartbeat_slower_than_half_a_lease_is_refused() {
        let mut config = Config::default();
        config.worker.heartbeat_seconds = 31.0;
        assert_eq!(config.check().unwrap_err().field, "worker.heartbeat_seconds");
    }

    #[test]
    fn an_unknown_word_for_text_encoders_is_refused() {
        let mut config = Config::default();
        config.worker.text_encoders = "never".into();
        let error = config.check().unwrap_err().to_string();
        assert_eq!(error, "`worker.text_encoders` must be keep, drop or auto, but is never");
    }

    #[test]
    fn an_unknown_kind_of_store_is_refused_without_showing_its_password() {
        let mut config = Config::default();
        config.store.url.0 = "mysql://ann:hunter2@db".into();
        let error = config.check().unwrap_err().to_string();
        assert!(error.starts_with("`store.url` must be postgres://") && !error.contains("hunter2"), "{error}");
    }
}
