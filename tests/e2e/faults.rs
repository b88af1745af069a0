//! Things break while jobs render. Afterwards: every job done exactly once.

use std::time::Duration;

use farm::job::Lane;
use farm::message::QueueKey;
use serde_json::{Value, json};

use crate::support::{Farm, audit, control, services};

const JOBS: u64 = 400;
const LIMIT: Duration = Duration::from_secs(300);

fn jobs() -> Vec<Value> {
    (0..JOBS)
        .map(|index| {
            let prompt = "a small blue heart on a white background";
            if index % 4 == 0 {
                json!({ "model": "tiny", "prompt": prompt, "steps": 4, "seed": index })
            } else {
                json!({ "model": "demo", "prompt": prompt, "steps": 6, "seed": index, "width": 64, "height": 64 })
            }
        })
        .collect()
}

/// A farm in the middle of its work: some jobs done, most not.
async fn busy_farm(workers: usize) -> (Farm, String) {
    let farm = Farm::start(services().await, workers).await;
    let submission = farm.client.submit(jobs()).await;
    farm.wait_for(&submission, "done", JOBS / 10, LIMIT).await;
    let done = farm.client.counter(&submission, "done").await.expect("the scheduler answers");
    assert!(done < JOBS, "the fault must come while rendering");
    (farm, submission)
}

async fn all_is_well(farm: &Farm, submission: &str) {
    farm.wait_for(submission, "done", JOBS, LIMIT).await;
    audit(farm, submission, JOBS).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_killed_while_rendering_loses_nothing() {
    let (mut farm, submission) = busy_farm(2).await;
    farm.workers[0].kill_9();
    all_is_well(&farm, &submission).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restart_of_rabbitmq_while_rendering_loses_nothing() {
    let (farm, submission) = busy_farm(2).await;
    control("restart", "rabbitmq");
    all_is_well(&farm, &submission).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_rabbitmq_that_comes_back_loses_nothing() {
    let (farm, submission) = busy_farm(1).await;
    control("kill", "rabbitmq");
    tokio::time::sleep(Duration::from_secs(3)).await;
    control("start", "rabbitmq");
    all_is_well(&farm, &submission).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restart_of_postgres_while_rendering_loses_nothing() {
    let (farm, submission) = busy_farm(2).await;
    control("restart", "postgres");
    all_is_well(&farm, &submission).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restart_of_the_object_storage_while_rendering_loses_nothing() {
    let (farm, submission) = busy_farm(2).await;
    control("kill", "s3");
    tokio::time::sleep(Duration::from_secs(3)).await;
    control("start", "s3");
    all_is_well(&farm, &submission).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_purged_queue_while_rendering_loses_nothing() {
    let (farm, submission) = busy_farm(1).await;
    let broker = farm::broker::connect(&farm.services.broker_url, &farm.prefix).expect("RabbitMQ answers");
    let mut purged = 0;
    for model in ["demo", "tiny"] {
        purged +=
            broker.purge(&QueueKey { model: model.into(), lane: Lane::Bulk }).await.expect("a queue can be purged");
    }
    assert!(purged > 0, "there was something to lose");
    all_is_well(&farm, &submission).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_scheduler_that_comes_back_loses_nothing() {
    let (mut farm, submission) = busy_farm(1).await;
    farm.restart_scheduler().await;
    all_is_well(&farm, &submission).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_told_to_stop_gives_back_what_it_holds() {
    let (mut farm, submission) = busy_farm(1).await;
    let status = farm.workers[0].terminate(Duration::from_secs(60));
    assert!(status.success(), "an orderly stop is no failure: {status}\n{}", farm.workers[0].log());
    let leased = farm.client.counter(&submission, "leased").await;
    assert_eq!(leased, Some(0), "nothing waits for a lease to expire");
    farm.add_worker();
    all_is_well(&farm, &submission).await;
    let attempts = farm.client.get(&format!("/v1/jobs?submission_id={submission}&limit=1000")).await;
    let most = attempts["jobs"].as_array().expect("jobs").iter().filter_map(|job| job["attempts"].as_u64()).max();
    assert_eq!(most, Some(1), "what was given back did not cost an attempt");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_submission_stops_while_rendering() {
    let (farm, submission) = busy_farm(1).await;
    farm.client.delete(&format!("/v1/submissions/{submission}")).await;
    let total = async || {
        let view = farm.client.get(&format!("/v1/submissions/{submission}")).await;
        view["counters"].clone()
    };
    farm.wait_for(&submission, "cancelled", 1, LIMIT).await;
    crate::support::eventually("running rows are dropped", LIMIT, || async {
        let counters = total().await;
        (counters["leased"] == 0 && counters["queued"] == 0 && counters["pending"] == 0).then_some(())
    })
    .await;
    let counters = total().await;
    let sum = counters["done"].as_u64().expect("a number") + counters["cancelled"].as_u64().expect("a number");
    assert_eq!(sum, JOBS, "every job is done or cancelled: {counters}");
}
