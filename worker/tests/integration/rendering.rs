//! Claiming, batching, cancelling, announcing.

use farm::job::{JobState, Lane};
use farm::message::Progress;
use farm::spec::RenderSpec;
use futures_util::StreamExt;
use worker::WorkerSummary;

use crate::support::{Stage, TestFarm, wait_for};

#[tokio::test]
async fn every_job_is_rendered_once_and_nothing_is_left_behind() {
    let farm = TestFarm::new().await;
    let specs = (0..50).map(|number| RenderSpec { steps: 1 + number % 5, ..TestFarm::spec(&format!("job {number}")) });
    let jobs = farm.submit(specs).await;
    let running = farm.start(&Stage::default().into());
    farm.wait_for_state(&jobs, JobState::Done).await;
    let WorkerSummary { done, failed, released, lost, loads, .. } = running.stop().await;
    assert_eq!((done, failed, released, lost, loads), (50, 0, 0, 0, 1));
    assert_eq!(farm.totals().await.done, 50);
    assert_eq!(farm.queued("a").await, 0);
    assert_eq!(farm.objects().await.len(), 100);
    for job in jobs {
        assert_eq!(farm.job(job).await.attempts, 1);
    }
}

#[tokio::test]
async fn a_window_of_deliveries_is_claimed_in_one_statement() {
    let farm = TestFarm::new().await;
    let stage = Stage::held();
    farm.submit_prompts(&["1", "2", "3", "4", "5", "6", "7", "8", "9", "10"]).await;
    let running = farm.start(&stage);
    wait_for("the window to be claimed", async || farm.totals().await.leased > 0).await;
    // Four rows for the batch and four beside it.
    assert_eq!(farm.faults.noted("claim"), ["claim 8"]);
    stage.run_free();
    wait_for("all to be done", async || farm.totals().await.done == 10).await;
    running.stop().await;
}

#[tokio::test]
async fn a_job_that_comes_later_joins_the_batch_that_is_running() {
    let farm = TestFarm::new().await;
    let stage = Stage::held();
    let running = farm.start(&stage);
    let first = farm.submit([RenderSpec { steps: 1000, ..TestFarm::spec("first") }]).await;
    stage.allow(2);
    wait_for("two passes", async || stage.state().passes.len() == 2).await;
    let second = farm.submit([TestFarm::spec("second")]).await;
    wait_for("the second to be done while the first still runs", async || {
        stage.allow(1);
        farm.job(second[0]).await.state == JobState::Done
    })
    .await;
    assert_eq!(farm.job(first[0]).await.state, JobState::Leased);
    stage.run_free();
    farm.wait_for_state(&first, JobState::Done).await;
    let passes = stage.state().passes.clone();
    assert!(passes.contains(&vec!["first".to_owned(), "second".to_owned()]), "{passes:?}");
    assert_eq!(passes[0], ["first"]);
    running.stop().await;
}

#[tokio::test]
async fn pictures_of_different_sizes_do_not_share_a_pass() {
    let farm = TestFarm::new().await;
    let stage: std::sync::Arc<Stage> = std::sync::Arc::default();
    let jobs = farm.submit(["1", "2"].map(TestFarm::spec)).await;
    let large = farm.submit([RenderSpec { width: 32, ..TestFarm::spec("large") }]).await;
    let running = farm.start(&stage);
    farm.wait_for_state(&[jobs[0], jobs[1], large[0]], JobState::Done).await;
    running.stop().await;
    assert!(stage.state().passes.iter().all(|pass| pass.len() == 1 || !pass.contains(&"large".to_owned())));
}

#[tokio::test]
async fn an_interactive_job_joins_before_bulk_jobs_that_wait() {
    let farm = TestFarm::with(|config| config.max_batch = 1).await;
    let stage = Stage::held();
    let bulk =
        farm.submit(["bulk 1", "bulk 2"].map(|prompt| RenderSpec { steps: 100, ..TestFarm::spec(prompt) })).await;
    let running = farm.start(&stage);
    farm.wait_for_state(&bulk, JobState::Leased).await;
    let urgent = farm.submit([RenderSpec { lane: Lane::Interactive, ..TestFarm::spec("urgent") }]).await;
    wait_for("the urgent job to be done", async || {
        stage.allow(1);
        farm.job(urgent[0]).await.state == JobState::Done
    })
    .await;
    stage.run_free();
    farm.wait_for_state(&bulk, JobState::Done).await;
    running.stop().await;
    let first_seen = |prompt: &str| stage.state().passes.iter().position(|pass| pass[0] == prompt).unwrap();
    assert!(first_seen("urgent") < first_seen("bulk 2"));
}

#[tokio::test]
async fn a_cancelled_job_leaves_at_the_next_step_and_its_mates_go_on() {
    let farm = TestFarm::new().await;
    let stage = Stage::held();
    let jobs =
        farm.submit(["stays", "leaves"].map(|prompt| RenderSpec { steps: 1000, ..TestFarm::spec(prompt) })).await;
    let running = farm.start(&stage);
    stage.allow(2);
    wait_for("two passes", async || stage.state().passes.len() == 2).await;
    assert_eq!(farm.store.cancel_job(jobs[1]).await.unwrap(), Some(JobState::Leased));
    wait_for("a step without the cancelled job", async || {
        stage.allow(1);
        stage.state().passes.last().is_some_and(|pass| pass == &["stays"])
    })
    .await;
    farm.wait_for_state(&jobs[1..], JobState::Cancelled).await;
    stage.run_free();
    farm.wait_for_state(&jobs[..1], JobState::Done).await;
    let summary = running.stop().await;
    assert_eq!((summary.done, summary.cancelled), (1, 1));
    assert_eq!(farm.queued("a").await, 0);
}

#[tokio::test]
async fn the_renderer_is_told_who_joins_and_who_waits_and_may_fail_at_that() {
    let farm = TestFarm::with(|config| (config.max_batch, config.window) = (2, 3)).await;
    let stage: std::sync::Arc<Stage> = Stage::default().into();
    let jobs = farm.submit_prompts(&["1", "2", "3 unready", "4"]).await;
    let running = farm.start(&stage);
    farm.wait_for_state(&jobs, JobState::Done).await;
    let heard = async || farm.store.workers().await.unwrap()[0].status.done;
    wait_for("a heartbeat after that", async || heard().await == 4).await;
    running.stop().await;
    let prepared = stage.state().prepared.clone();
    assert_eq!(prepared, [[vec!["1".to_owned(), "2".into()], vec!["3 unready".into(), "4".into()]]]);
    let text = farm.store.workers().await.unwrap()[0].status.text;
    assert_eq!(text.embedding_misses, 2, "what the renderer says of itself is in the heartbeat");
}

#[tokio::test]
async fn every_step_of_an_interactive_job_is_announced_and_its_end() {
    let farm = TestFarm::new().await;
    let stage = Stage::held();
    let job = farm.submit([RenderSpec { steps: 5, lane: Lane::Interactive, ..TestFarm::spec("watched") }]).await[0];
    let news = farm.worker.broker.watch(job).await.unwrap();
    let running = farm.start(&stage);
    stage.run_free();
    let left = |event: &farm::message::ProgressEvent| event.progress == Progress::Left;
    let mut seen = Vec::new();
    let mut news = std::pin::pin!(news);
    let watching = async {
        while let Some(event) = news.next().await {
            let is_last = left(&event);
            seen.push(event.progress);
            if is_last {
                return;
            }
        }
    };
    tokio::time::timeout(std::time::Duration::from_secs(30), watching).await.expect("the job's end is announced");
    let step = |step| Progress::Step { step, total: 5 };
    assert_eq!(seen, [step(1), step(2), step(3), step(4), step(5), Progress::Left]);
    // Told after the store knew.
    assert_eq!(farm.job(job).await.state, JobState::Done);
    running.stop().await;
}

#[tokio::test]
async fn a_stale_delivery_is_acked_at_once_and_a_job_delivered_twice_is_rendered_once() {
    let farm = TestFarm::new().await;
    let stage: std::sync::Arc<Stage> = Stage::default().into();
    let jobs = farm.submit_prompts(&["cancelled before", "published twice"]).await;
    farm.store.cancel_job(jobs[0]).await.unwrap();
    // A reconciler that was too quick: the same job once more.
    farm.store
        .requeue(
            &farm::message::QueueKey { model: "a".into(), lane: Lane::Bulk },
            chrono::Utc::now() + chrono::TimeDelta::days(1),
        )
        .await
        .unwrap();
    farm.dispatch().await;
    assert_eq!(farm.queued("a").await, 3);
    let running = farm.start(&stage);
    farm.wait_for_state(&jobs[1..], JobState::Done).await;
    wait_for("all three to be acked", async || farm.faults.noted("ack").len() == 3).await;
    running.stop().await;
    assert_eq!(farm.queued("a").await, 0);
    assert_eq!(stage.state().passes, [["published twice"], ["published twice"]]);
}

#[tokio::test]
async fn the_worker_tells_the_store_what_it_does() {
    let farm = TestFarm::new().await;
    let stage = Stage::held();
    farm.submit_prompts(&["1", "2"]).await;
    let running = farm.start(&stage);
    wait_for("two rows in the fleet's view", async || {
        let workers = farm.store.workers().await.unwrap();
        workers.first().is_some_and(|view| view.alive && view.status.rows == 2 && view.status.loads == 1)
    })
    .await;
    let status = farm.store.workers().await.unwrap().remove(0).status;
    assert_eq!((status.serving.as_deref(), status.warm.as_deref()), (Some("a"), Some("a")));
    assert!(status.worker_id.0.starts_with("test-"));
    stage.run_free();
    running.stop().await;
    assert!(!farm.store.workers().await.unwrap()[0].alive);
}
