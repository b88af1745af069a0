//! Dispatcher, reaper, reconciler and leftover sweeper, as a whole farm sees them.

use std::time::Duration;

use farm::broker::Broker;
use farm::fleet::{TextStatus, WorkerStatus};
use farm::id::WorkerId;
use farm::job::Lane;
use farm::message::QueueKey;
use reqwest::StatusCode;
use serde_json::json;

use crate::support::{Farm, Fault, Settings, eventually};

fn queue(model: &str, lane: Lane) -> QueueKey {
    QueueKey { model: model.into(), lane }
}

async fn submit_bulk(farm: &Farm, jobs: u64) {
    let body = json!({"defaults": {"prompt": "a"}, "sweep": {"seed": {"start": 0, "count": jobs}}});
    farm.post("/v1/submissions", body).await.with_status(StatusCode::ACCEPTED);
}

#[tokio::test]
async fn a_queue_is_topped_up_to_its_bound_and_the_rest_waits_in_the_store() {
    let mut settings = Settings::default();
    settings.config.queue_bound = 30;
    let farm = Farm::start_with(settings).await;
    submit_bulk(&farm, 100).await;
    eventually("the queue is full", async || farm.store.totals().await.unwrap().queued == 30).await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    let totals = farm.store.totals().await.unwrap();
    assert_eq!((totals.queued, totals.pending), (30, 70));
    assert_eq!(farm.broker.depth(&queue("demo", Lane::Bulk)).await.unwrap(), 30);
    for _ in 0..5 {
        farm.take("demo", Lane::Bulk).await.finish().await;
    }
    eventually("the queue is full again", async || {
        let totals = farm.store.totals().await.unwrap();
        (totals.done, totals.queued, totals.pending) == (5, 30, 65)
    })
    .await;
}

#[tokio::test]
async fn a_submission_wakes_the_dispatcher_at_once() {
    let mut settings = Settings::default();
    settings.config.dispatch_interval_ms = 3_600_000;
    let farm = Farm::start_with(settings).await;
    tokio::time::sleep(Duration::from_millis(50)).await;
    let job = farm.submit(json!({"prompt": "a"})).await;
    farm.wait_for(&job, "queued").await;
}

#[tokio::test]
async fn a_dead_broker_loses_nothing_and_is_served_again_when_it_is_back() {
    let farm = Farm::start().await;
    farm.broker.set_down(true);
    submit_bulk(&farm, 20).await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!(farm.store.totals().await.unwrap().pending, 20);
    farm.broker.set_down(false);
    eventually("all are queued", async || farm.store.totals().await.unwrap().queued == 20).await;
}

#[tokio::test]
async fn the_loops_outlive_a_store_that_is_away_and_one_that_panics() {
    let farm = Farm::start().await;
    for fault in [Fault::Unavailable, Fault::Panic] {
        farm.store_faults.set(Some(fault));
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    farm.store_faults.set(None);
    let job = farm.submit(json!({"prompt": "a"})).await;
    farm.take("demo", Lane::Interactive).await.finish().await;
    farm.wait_for(&job, "done").await;
}

#[tokio::test]
async fn a_job_of_a_silent_worker_is_rendered_by_another() {
    let farm = Farm::start().await;
    let job = farm.submit(json!({"prompt": "a"})).await;
    let _silent = farm.take_for("demo", Lane::Interactive, Duration::from_millis(50)).await;
    let next = farm.take("demo", Lane::Interactive).await;
    assert_eq!((next.id(), next.job.lease.attempt), (job.clone(), 2));
    next.finish().await;
    farm.wait_for(&job, "done").await;
}

#[tokio::test]
async fn what_a_lost_attempt_left_behind_is_deleted_as_soon_as_the_artifact_store_answers() {
    let farm = Farm::start().await;
    farm.artifact_faults.set_down(true);
    let job = farm.submit(json!({"prompt": "a"})).await;
    let silent = farm.take_for("demo", Lane::Interactive, Duration::from_millis(50)).await;
    let (image, sidecar) = silent.upload().await;
    farm.take("demo", Lane::Interactive).await.finish().await;
    farm.wait_for(&job, "done").await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    let objects = farm.artifacts.list("").await.unwrap();
    assert!(objects.contains(&image) && objects.contains(&sidecar), "{objects:?}");
    farm.artifact_faults.set_down(false);
    eventually("the leftovers are deleted and the winner's objects are not", async || {
        let objects = farm.artifacts.list("").await.unwrap();
        !objects.contains(&image) && !objects.contains(&sidecar) && objects.len() == 2
    })
    .await;
    farm.get(&format!("/v1/jobs/{job}/image")).await.with_status(StatusCode::OK);
}

#[tokio::test]
async fn jobs_that_a_purged_queue_lost_are_published_again() {
    let farm = Farm::start().await;
    submit_bulk(&farm, 40).await;
    eventually("all are queued", async || farm.store.totals().await.unwrap().queued == 40).await;
    assert_eq!(farm.broker.purge(&queue("demo", Lane::Bulk)).await.unwrap(), 40);
    eventually("the broker holds them again", async || {
        farm.broker.depth(&queue("demo", Lane::Bulk)).await.unwrap() >= 40
    })
    .await;
    for _ in 0..40 {
        farm.take("demo", Lane::Bulk).await.finish().await;
    }
    assert_eq!(farm.store.totals().await.unwrap().done, 40);
}

#[tokio::test]
async fn a_queue_that_has_lost_nothing_is_left_alone() {
    let farm = Farm::start().await;
    submit_bulk(&farm, 40).await;
    eventually("all are queued", async || farm.store.totals().await.unwrap().queued == 40).await;
    // Several looks of the reconciler after the grace.
    tokio::time::sleep(Duration::from_millis(700)).await;
    assert_eq!(farm.broker.depth(&queue("demo", Lane::Bulk)).await.unwrap(), 40);
}

#[tokio::test]
async fn deliveries_that_a_live_worker_holds_unclaimed_are_not_taken_for_lost() {
    let farm = Farm::start().await;
    let bulk = queue("demo", Lane::Bulk);
    let worker = WorkerStatus {
        worker_id: WorkerId("holder".into()),
        host: "here".into(),
        device: "cpu".into(),
        serving: Some("demo".into()),
        warm: Some("demo".into()),
        draining: false,
        rows: 0,
        done: 0,
        failed: 0,
        loads: 1,
        text: TextStatus::default(),
    };
    farm.store.heartbeat(&worker, &[], Duration::from_secs(60)).await.unwrap();
    submit_bulk(&farm, 40).await;
    eventually("all are queued", async || farm.store.totals().await.unwrap().queued == 40).await;
    let mut consumer = farm.broker.consume(&bulk, 5).await.unwrap();
    for _ in 0..5 {
        consumer.next().await.unwrap().expect("a delivery");
    }
    // Several looks of the reconciler after the grace.
    tokio::time::sleep(Duration::from_millis(700)).await;
    assert_eq!(farm.broker.depth(&bulk).await.unwrap(), 35, "nothing was published twice");

    farm.store.goodbye(&worker.worker_id).await.unwrap();
    eventually("without a worker that could hold them they are lost", async || {
        farm.broker.depth(&bulk).await.unwrap() > 35
    })
    .await;
}
