//! Orderly stops.

use farm::job::JobState;

use crate::support::{Stage, TestFarm, wait_for};

#[tokio::test]
async fn a_stop_finishes_running_rows_and_gives_the_rest_back_unspent() {
    let farm = TestFarm::new().await;
    let stage = Stage::held();
    let prompts: Vec<_> = (0..12).map(|number| number.to_string()).collect();
    let jobs = farm.submit(prompts.iter().map(|prompt| TestFarm::spec(prompt))).await;
    let running = farm.start(&stage);
    wait_for("the batch to run", async || {
        farm.store.workers().await.unwrap().first().is_some_and(|view| view.status.rows == 4)
    })
    .await;
    let stopping = tokio::spawn(running.stop());
    wait_for("the worker to drain", async || farm.store.workers().await.unwrap()[0].status.draining).await;
    stage.run_free();
    let summary = stopping.await.unwrap();
    assert_eq!((summary.done, summary.released, summary.failed, summary.lost), (4, 4, 0, 0));
    let totals = farm.totals().await;
    assert_eq!((totals.done, totals.leased), (4, 0));
    // Four released, four never claimed and given back to the broker.
    assert_eq!((totals.pending, totals.queued, farm.queued("a").await), (4, 4, 4));
    for job in &jobs {
        let view = farm.job(*job).await;
        assert_eq!(view.attempts, u32::from(view.state == JobState::Done));
    }
    // Another worker does the rest.
    farm.dispatch().await;
    let other = farm.start(&stage);
    farm.wait_for_state(&jobs, JobState::Done).await;
    assert_eq!(other.stop().await.done, 8);
}

#[tokio::test]
async fn a_stop_that_takes_too_long_gives_running_rows_back() {
    let farm = TestFarm::with(|config| config.shutdown_seconds = 0.1).await;
    let stage = Stage::held();
    let jobs = farm.submit_prompts(&["slow 1", "slow 2"]).await;
    let running = farm.start(&stage);
    wait_for("the batch to run", async || {
        farm.store.workers().await.unwrap().first().is_some_and(|view| view.status.rows == 2)
    })
    .await;
    let stopping = tokio::spawn(running.stop());
    farm.wait_for_state(&jobs, JobState::Pending).await;
    stage.run_free();
    let summary = stopping.await.unwrap();
    assert_eq!((summary.done, summary.released), (0, 2));
    assert_eq!(farm.objects().await, Vec::<String>::new());
}

#[tokio::test]
async fn an_idle_worker_stops_at_once_and_says_goodbye() {
    let farm = TestFarm::new().await;
    let running = farm.start(&Stage::default().into());
    wait_for("the worker to register", async || !farm.store.workers().await.unwrap().is_empty()).await;
    let summary = running.stop().await;
    assert_eq!((summary.done, summary.loads), (0, 0));
    assert!(!farm.store.workers().await.unwrap()[0].alive);
}

#[tokio::test]
async fn a_stop_during_an_outage_of_everything_ends_all_the_same() {
    let farm = TestFarm::with(|config| config.shutdown_seconds = 0.1).await;
    let stage = Stage::held();
    farm.submit_prompts(&["1", "2"]).await;
    let running = farm.start(&stage);
    wait_for("the jobs to be leased", async || farm.totals().await.leased == 2).await;
    farm.faults.store_down.store(true, std::sync::atomic::Ordering::SeqCst);
    farm.faults.broker_down.send_replace(true);
    stage.run_free();
    // Nobody could be told: the leases are the reaper's.
    assert_eq!(running.stop().await.done, 0);
    assert_eq!(farm.totals().await.leased, 2);
}
