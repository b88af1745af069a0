//! The store, the broker and the artifact store go away and come back: nothing is lost, nothing happens
//! twice.

use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;

use farm::job::JobState;
use farm::spec::RenderSpec;

use crate::support::{Stage, TestFarm, wait_for};

#[tokio::test]
async fn a_full_disk_costs_no_picture_and_no_attempt() {
    let (farm, stage): (_, Arc<Stage>) = (TestFarm::new().await, Arc::default());
    farm.faults.disk_full.store(true, SeqCst);
    let prompts: Vec<_> = (0..30).map(|number| number.to_string()).collect();
    let jobs = farm.submit(prompts.iter().map(|prompt| TestFarm::spec(prompt))).await;
    let running = farm.start(&stage);
    wait_for("several uploads to fail", async || farm.faults.noted("put").len() > 10).await;
    // It holds what it may hold, and takes no more.
    let totals = farm.totals().await;
    assert_eq!((totals.leased, totals.failed, totals.done), (8, 0, 0));
    farm.faults.disk_full.store(false, SeqCst);
    farm.wait_for_state(&jobs, JobState::Done).await;
    let summary = running.stop().await;
    assert_eq!((summary.done, summary.failed), (30, 0));
    for job in jobs {
        assert_eq!(farm.job(job).await.attempts, 1);
    }
}

#[tokio::test]
async fn a_store_that_goes_away_is_waited_for() {
    let farm = TestFarm::new().await;
    let stage = Stage::held();
    let jobs = farm.submit_prompts(&["1", "2", "3", "4", "5", "6", "7", "8", "9", "10", "11", "12"]).await;
    let running = farm.start(&stage);
    wait_for("a window to be leased", async || farm.totals().await.leased == 8).await;
    farm.faults.store_down.store(true, SeqCst);
    stage.run_free();
    wait_for("the window to be stored", async || farm.objects().await.len() == 16).await;
    assert_eq!(farm.totals().await.done, 0);
    farm.faults.store_down.store(false, SeqCst);
    farm.wait_for_state(&jobs, JobState::Done).await;
    let summary = running.stop().await;
    assert_eq!((summary.done, summary.failed, summary.lost), (12, 0, 0));
}

#[tokio::test]
async fn a_store_that_is_away_at_the_start_is_waited_for() {
    let (farm, stage) = (TestFarm::new().await, Arc::default());
    farm.faults.store_down.store(true, SeqCst);
    let jobs = farm.submit_prompts(&["patient"]).await;
    let running = farm.start(&stage);
    tokio::task::yield_now().await;
    farm.faults.store_down.store(false, SeqCst);
    farm.wait_for_state(&jobs, JobState::Done).await;
    running.stop().await;
}

#[tokio::test]
async fn a_result_whose_commit_was_not_answered_is_kept() {
    let (farm, stage) = (TestFarm::new().await, Arc::default());
    farm.faults.lose_next_answer.store(true, SeqCst);
    let jobs = farm.submit_prompts(&["said twice"]).await;
    let running = farm.start(&stage);
    wait_for("the delivery to be acked", async || farm.faults.noted("ack").len() == 1).await;
    let summary = running.stop().await;
    assert_eq!((summary.done, summary.lost), (1, 0));
    assert_eq!(farm.job(jobs[0]).await.state, JobState::Done);
    assert_eq!(farm.objects().await.len(), 2);
    assert_eq!(farm.faults.noted("delete"), Vec::<String>::new());
}

#[tokio::test]
async fn leases_outlive_a_broker_that_goes_away() {
    let farm = TestFarm::new().await;
    let stage = Stage::held();
    let jobs = farm.submit_prompts(&["1", "2", "3", "4", "5", "6", "7", "8", "9", "10"]).await;
    let running = farm.start(&stage);
    wait_for("a window to be leased", async || farm.totals().await.leased == 8).await;
    farm.faults.broker_down.send_replace(true);
    stage.run_free();
    wait_for("the window to be done without the broker", async || farm.totals().await.done == 8).await;
    // The connection took the deliveries with it: all ten lie in the queue again.
    assert_eq!(farm.queued("a").await, 10);
    farm.faults.broker_down.send_replace(false);
    farm.wait_for_state(&jobs, JobState::Done).await;
    wait_for("the stale deliveries to be acked away", async || farm.queued("a").await == 0).await;
    let summary = running.stop().await;
    assert_eq!((summary.done, summary.failed, summary.lost), (10, 0, 0));
    let renders = stage.state().passes.iter().map(Vec::len).sum::<usize>();
    assert_eq!(renders, 2 * 10, "every job made its two steps once");
}

#[tokio::test]
async fn a_broker_that_goes_away_again_and_again_loses_and_doubles_nothing() {
    let (farm, stage): (_, Arc<Stage>) = (TestFarm::new().await, Arc::default());
    let specs = (0..200).map(|number| RenderSpec { steps: 3, ..TestFarm::spec(&number.to_string()) });
    farm.submit(specs).await;
    let running = farm.start(&stage);
    for done in [20, 80, 140] {
        wait_for("some progress", async || farm.totals().await.done >= done).await;
        farm.faults.broker_down.send_replace(true);
        tokio::task::yield_now().await;
        farm.faults.broker_down.send_replace(false);
    }
    wait_for("all to be done", async || farm.totals().await.done == 200).await;
    wait_for("nothing left in the queue", async || farm.queued("a").await == 0).await;
    assert_eq!(running.stop().await.done, 200);
    assert_eq!(stage.state().passes.iter().map(Vec::len).sum::<usize>(), 600);
}
