//! Affinity: one warm checkpoint, and moves that are worth a load.

use std::time::Duration;

use farm::job::JobState;
use farm::spec::RenderSpec;

use crate::support::{Stage, TestFarm, wait_for};

fn of(model: &str, count: usize) -> Vec<RenderSpec> {
    (0..count)
        .map(|number| RenderSpec { model: model.into(), ..TestFarm::spec(&format!("{model} {number}")) })
        .collect()
}

#[tokio::test]
async fn a_worker_empties_one_queue_before_it_loads_for_the_next() {
    let farm = TestFarm::new().await;
    let stage: std::sync::Arc<Stage> = std::sync::Arc::default();
    // Mixed, as they come in.
    let mixed: Vec<_> = of("a", 20).into_iter().zip(of("b", 20)).flat_map(|(a, b)| [a, b]).collect();
    let jobs = farm.submit(mixed).await;
    let running = farm.start(&stage);
    farm.wait_for_state(&jobs, JobState::Done).await;
    let summary = running.stop().await;
    assert_eq!((summary.done, summary.loads), (40, 2));
    assert_eq!(stage.state().loads.len(), 2);
    // No picture was painted with another checkpoint's weights.
    let first = stage.state().loads[0].clone();
    assert!(stage.state().passes[..10].iter().flatten().all(|prompt| prompt.starts_with(&first)));
}

#[tokio::test]
async fn two_workers_take_a_checkpoint_each() {
    let farm = TestFarm::new().await;
    let stages = [Stage::held(), Stage::held()];
    farm.submit(of("a", 12)).await;
    farm.submit(of("b", 12)).await;
    let workers = [farm.start(&stages[0]), farm.start(&stages[1])];
    wait_for("both to load", async || stages.iter().all(|stage| stage.state().loads.len() == 1)).await;
    let mut loads: Vec<_> = stages.iter().flat_map(|stage| stage.state().loads.clone()).collect();
    loads.sort();
    assert_eq!(loads, ["a", "b"]);
    stages.iter().for_each(|stage| stage.run_free());
    wait_for("all to be done", async || farm.totals().await.done == 24).await;
    let mut sum = 0;
    for running in workers {
        sum += running.stop().await.loads;
    }
    assert!(sum <= 3, "{sum} loads");
}

#[tokio::test]
async fn an_overdue_checkpoint_calls_a_busy_worker_away_and_waiting_rows_go_back() {
    let farm = TestFarm::with(|config| config.lease_seconds = 1000.0).await;
    let stage = Stage::held();
    let flood = farm.submit(of("a", 12).into_iter().map(|spec| RenderSpec { steps: 1000, ..spec })).await;
    let running = farm.start(&stage);
    wait_for("the flood to be served", async || farm.totals().await.leased == 8).await;
    let other = farm.submit(of("b", 1)).await;
    farm.clock.advance(Duration::from_secs_f64(farm.config.bulk_wait_seconds) + Duration::from_secs(1));
    wait_for("the waiting rows to go back", async || {
        stage.allow(1);
        farm.totals().await.pending == 4
    })
    .await;
    // The rows that run are finished before anything is loaded.
    assert_eq!((farm.totals().await.leased, stage.state().loads.len()), (4, 1));
    stage.run_free();
    farm.wait_for_state(&other, JobState::Done).await;
    assert_eq!(stage.state().loads[..2], ["a", "b"]);
    // And back: the flood is all that waits.
    wait_for("the flood to be done", async || {
        farm.dispatch().await;
        farm.totals().await.done == 13
    })
    .await;
    for job in flood {
        assert_eq!(farm.job(job).await.attempts, 1);
    }
    assert_eq!(running.stop().await.loads, 3);
}

#[tokio::test]
async fn a_warm_checkpoint_is_not_loaded_again() {
    let farm = TestFarm::new().await;
    let stage: std::sync::Arc<Stage> = std::sync::Arc::default();
    let running = farm.start(&stage);
    for round in 0..3 {
        let jobs = farm.submit(of("a", 2)).await;
        farm.wait_for_state(&jobs, JobState::Done).await;
        assert_eq!(stage.state().loads.len(), 1, "round {round}");
    }
    assert_eq!(running.stop().await.loads, 1);
}
