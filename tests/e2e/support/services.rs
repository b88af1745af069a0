//! The real servers, as `infra/services.sh` started them.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::LazyLock;

use tokio::sync::{Mutex, MutexGuard};

/// Where the servers are.
pub struct Services {
    /// A Postgres database that other databases can be made from.
    pub store_url: String,
    /// RabbitMQ.
    pub broker_url: String,
    /// A bucket: `s3://NAME`.
    pub artifacts_url: String,
    /// Held for the test's life: one test at a time.
    _turn: MutexGuard<'static, ()>,
}

static TURN: LazyLock<Mutex<()>> = LazyLock::new(Mutex::default);

/// Waits for this test's turn and reads where the servers are.
///
/// # Panics
/// If they have not been started.
pub async fn services() -> Services {
    let turn = TURN.lock().await;
    let environment = farm::config::Environment::of_this_process();
    let variable = |name: &str| match environment.get(name) {
        Some(value) => value.to_owned(),
        None => panic!("{name} is not set: run `infra/services.sh up` and `eval \"$(infra/services.sh env)\"` first"),
    };
    Services {
        store_url: variable("KILN_STORE_URL"),
        broker_url: variable("KILN_BROKER_URL"),
        artifacts_url: variable("KILN_ARTIFACTS_URL"),
        _turn: turn,
    }
}

/// The checkout.
pub fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the package lies in the repository").to_owned()
}

/// Runs `infra/services.sh VERB SERVICE`, for instance `restart rabbitmq`.
pub fn control(verb: &str, service: &str) {
    let script = repository().join("infra/services.sh");
    let output = Command::new(&script).args([verb, service]).output().expect("the script can be run");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "services.sh {verb} {service}: {said}");
}
