//! Who may know whom: the rules of the README's code map, held against `cargo metadata`.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;

/// Direct dependencies by crate of the workspace; those for tests alone are left out.
fn dependencies() -> BTreeMap<String, BTreeSet<String>> {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--no-deps", "--offline", "--format-version", "1", "--manifest-path"])
        .arg(workspace().join("Cargo.toml"))
        .output()
        .expect("cargo can be run");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout).expect("cargo writes JSON");
    let packages = metadata["packages"].as_array().expect("there are packages");
    let text = |value: &serde_json::Value| value.as_str().expect("text").to_owned();
    let ordinary = |package: &serde_json::Value| {
        let all = package["dependencies"].as_array().expect("a list").iter();
        all.filter(|dependency| dependency["kind"] != "dev").map(|dependency| text(&dependency["name"])).collect()
    };
    packages.iter().map(|package| (text(&package["name"]), ordinary(package))).collect()
}

fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the crate lies in the workspace").to_owned()
}

/// Fails if `crate_name` depends on a crate whose name begins with one of `forbidden`.
fn never(crate_name: &str, forbidden: &[&str]) {
    let all = dependencies();
    let found = &all[crate_name];
    assert!(!found.is_empty() || crate_name == "demo", "{crate_name} has dependencies");
    for dependency in found {
        let hit = forbidden.iter().find(|word| dependency == *word || dependency.starts_with(&format!("{word}-")));
        assert!(hit.is_none(), "`{crate_name}` must not depend on `{dependency}`");
    }
}

const OURS: [&str; 7] = ["farm", "engine", "scheduler", "worker", "kiln", "demo", "tests"];

#[test]
fn farm_knows_no_tensors_no_http_routing_and_none_of_us() {
    never(
        "farm",
        &["candle", "tokenizers", "axum", "hf-hub", "engine", "scheduler", "worker", "kiln", "demo", "tests"],
    );
}

#[test]
fn the_engine_knows_no_network_no_database_and_none_of_us() {
    never("engine", &["tokio", "sqlx", "lapin", "aws", "hf-hub", "reqwest", "axum"]);
    never("engine", &OURS);
}

#[test]
fn the_scheduler_knows_no_tensors_and_no_worker() {
    never("scheduler", &["candle", "tokenizers", "engine", "worker", "kiln", "demo", "lapin", "aws", "sqlx"]);
}

#[test]
fn the_worker_knows_no_http_routing_and_no_scheduler() {
    never("worker", &["axum", "scheduler", "kiln", "demo", "candle", "lapin", "aws", "sqlx"]);
}

#[test]
fn the_demo_checkpoint_knows_nobody() {
    assert!(dependencies()["demo"].is_empty());
}

#[test]
fn farms_pure_modules_never_import_its_ports() {
    let source = workspace().join("farm/src");
    for module in ["batch_key", "catalog", "clock", "fleet", "id", "job", "latent", "message", "placement", "spec"] {
        let path = source.join(format!("{module}.rs"));
        let text = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        for port in ["broker", "artifact", "store"] {
            for import in [format!("use crate::{port}"), format!("crate::{port}::"), format!("super::{port}")] {
                assert!(!text.contains(&import), "farm::{module} imports {port}");
            }
        }
    }
}
