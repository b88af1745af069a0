//! Health, metrics, models, workers.

use std::collections::BTreeMap;
use std::time::Duration;

use farm::id::WorkerId;
use farm::job::Lane;
use farm::store::{TextStatus, WorkerStatus};
use reqwest::StatusCode;
use serde_json::json;

use crate::support::{Farm, Fault, eventually};

fn worker(name: &str) -> WorkerStatus {
    WorkerStatus {
        worker_id: WorkerId(name.into()),
        host: "host".into(),
        device: "cpu".into(),
        serving: Some("demo".into()),
        warm: None,
        draining: false,
        rows: 2,
        done: 7,
        failed: 1,
        loads: 1,
        text: TextStatus {
            embedding_hits: 90,
            embedding_misses: 10,
            embedding_bytes: 4096,
            encoder_reads: 3,
            encoder_bytes: 1 << 30,
        },
    }
}

#[tokio::test]
async fn the_process_is_healthy_whatever_its_parts_do_and_ready_only_with_all_of_them() {
    let farm = Farm::start().await;
    let ready = farm.get("/readyz").await.with_status(StatusCode::OK).json;
    assert_eq!(ready, json!({"ready": true, "store": {"ok": true}, "broker": {"ok": true}, "artifacts": {"ok": true}}));
    farm.broker.set_down(true);
    farm.artifact_faults.set_down(true);
    farm.store_faults.set(Some(Fault::Unavailable));
    // An answer may be a second old.
    eventually("the parts are missed", async || farm.get("/readyz").await.status == StatusCode::SERVICE_UNAVAILABLE)
        .await;
    let ready = farm.get("/readyz").await.json;
    for part in ["store", "broker", "artifacts"] {
        assert_eq!(ready[part]["ok"], false, "{part}");
        assert!(ready[part]["error"].as_str().unwrap().contains("pulled the plug"), "{ready}");
    }
    assert_eq!(farm.get("/healthz").await.with_status(StatusCode::OK).json, json!({"ok": true}));
}

#[tokio::test]
async fn models_are_listed_with_their_facts_and_the_default() {
    let farm = Farm::start().await;
    let models = farm.get("/v1/models").await.with_status(StatusCode::OK).json;
    assert_eq!(models["default"], "demo");
    assert_eq!(models["models"][0]["name"], "demo");
    assert_eq!((&models["models"][0]["width"], &models["models"][1]["width"]), (&json!(128), &json!(512)));
}

#[tokio::test]
async fn workers_are_listed_the_live_ones_first() {
    let farm = Farm::start().await;
    assert_eq!(farm.get("/v1/workers").await.with_status(StatusCode::OK).json, json!({"workers": []}));
    farm.store.heartbeat(&worker("gone"), &[], Duration::from_secs(60)).await.unwrap();
    farm.store.goodbye(&WorkerId("gone".into())).await.unwrap();
    farm.store.heartbeat(&worker("here"), &[], Duration::from_secs(60)).await.unwrap();
    let workers = farm.get("/v1/workers").await.json["workers"].take();
    let seen: Vec<_> = workers
        .as_array()
        .unwrap()
        .iter()
        .map(|worker| (worker["worker_id"].as_str().unwrap(), worker["alive"].as_bool().unwrap()))
        .collect();
    assert_eq!(seen, [("here", true), ("gone", false)]);
    assert_eq!(workers[0]["done"], 7);
}

/// Samples by name and labels; panics at a line that is none.
fn samples(text: &str) -> BTreeMap<String, f64> {
    assert!(text.ends_with("# EOF\n"), "{text}");
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    lines
        .map(|line| {
            let (name, value) = line.rsplit_once(' ').unwrap_or_else(|| panic!("no sample: {line}"));
            (name.to_owned(), value.parse().unwrap_or_else(|_| panic!("no number: {line}")))
        })
        .collect()
}

#[tokio::test]
async fn metrics_count_requests_jobs_queues_and_workers() {
    let farm = Farm::start().await;
    for name in ["here", "gone"] {
        farm.store.heartbeat(&worker(name), &[], Duration::from_secs(60)).await.unwrap();
    }
    farm.store.goodbye(&WorkerId("gone".into())).await.unwrap();
    let job = farm.submit(json!({"prompt": "a", "model": "large"})).await;
    farm.take("large", Lane::Interactive).await.finish().await;
    farm.submit(json!({"prompt": "b", "lane": "bulk"})).await;
    farm.get("/no/such/path").await.problem(404);
    eventually("the second job is queued", async || farm.store.totals().await.unwrap().queued == 1).await;

    let answer = farm.get("/metrics").await.with_status(StatusCode::OK);
    assert!(
        answer.header("content-type").starts_with("application/openmetrics-text"),
        "{}",
        answer.header("content-type")
    );
    let samples = samples(std::str::from_utf8(&answer.bytes).unwrap());
    let expected = [
        ("kiln_http_requests_total{method=\"POST\",route=\"/v1/jobs\",status=\"202\"}", 2.0),
        ("kiln_http_requests_total{method=\"GET\",route=\"unmatched\",status=\"404\"}", 1.0),
        ("kiln_http_request_seconds_count{method=\"POST\",route=\"/v1/jobs\"}", 2.0),
        ("kiln_jobs_submitted_total", 2.0),
        ("kiln_jobs_dispatched_total{model=\"large\",lane=\"interactive\"}", 1.0),
        ("kiln_jobs{state=\"done\"}", 1.0),
        ("kiln_jobs{state=\"queued\"}", 1.0),
        ("kiln_jobs{state=\"failed\"}", 0.0),
        ("kiln_queue_waiting{model=\"demo\",lane=\"bulk\"}", 1.0),
        ("kiln_queue_queued{model=\"demo\",lane=\"bulk\"}", 1.0),
        ("kiln_queue_ready{model=\"demo\",lane=\"bulk\"}", 1.0),
        ("kiln_workers_alive", 1.0),
        ("kiln_worker_embedding_hits_total{worker=\"here\"}", 90.0),
        ("kiln_worker_embedding_misses_total{worker=\"here\"}", 10.0),
        ("kiln_worker_embedding_bytes{worker=\"here\"}", 4096.0),
        ("kiln_worker_encoder_reads_total{worker=\"here\"}", 3.0),
        ("kiln_worker_encoder_bytes{worker=\"here\"}", 1_073_741_824.0),
        ("kiln_unread{name=\"queues\"}", 0.0),
    ];
    for (name, value) in expected {
        assert_eq!(samples.get(name), Some(&value), "{name} in {samples:#?}");
    }
    assert!(!samples.contains_key("kiln_queue_waiting{model=\"large\",lane=\"interactive\"}"), "nothing waits there");
    assert!(!samples.contains_key("kiln_worker_embedding_hits_total{worker=\"gone\"}"), "it has left");
    farm.wait_for(&job, "done").await;
}

#[tokio::test]
async fn metrics_can_be_read_while_the_store_is_away() {
    let farm = Farm::start().await;
    farm.store_faults.set(Some(Fault::Unavailable));
    eventually("the dispatcher has failed", async || {
        let answer = farm.get("/metrics").await.with_status(StatusCode::OK);
        let samples = samples(std::str::from_utf8(&answer.bytes).unwrap());
        samples["kiln_unread{name=\"jobs\"}"] == 1.0
            && samples.get("kiln_loop_errors_total{name=\"dispatcher\"}").is_some_and(|errors| *errors >= 1.0)
    })
    .await;
}
