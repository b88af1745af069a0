//! What fails, and what does not fail with it.

use std::sync::Arc;

use farm::job::{FailureKind, JobState};
use farm::spec::RenderSpec;
use worker::RenderError;

use crate::support::{Stage, TestFarm, wait_for};

/// Renders `prompts`; the state and failure kind of each. A job that gets another attempt is pending.
async fn outcomes(farm: &TestFarm, stage: &Arc<Stage>, prompts: &[&str]) -> Vec<(JobState, Option<FailureKind>)> {
    let jobs = farm.submit_prompts(prompts).await;
    let running = farm.start(stage);
    wait_for("every attempt to end", async || {
        let totals = farm.totals().await;
        totals.queued + totals.leased == 0
    })
    .await;
    running.stop().await;
    let mut outcomes = Vec::new();
    for job in jobs {
        let view = farm.job(job).await;
        outcomes.push((view.state, view.error.map(|error| error.kind)));
    }
    outcomes
}

const DONE: (JobState, Option<FailureKind>) = (JobState::Done, None);

/// The attempt failed; another one is due later.
fn again(kind: FailureKind) -> (JobState, Option<FailureKind>) {
    (JobState::Pending, Some(kind))
}

#[tokio::test]
async fn a_poisoned_row_fails_alone() {
    let (farm, stage) = (TestFarm::new().await, Arc::default());
    let outcomes = outcomes(&farm, &stage, &["a", "b", "poison", "c"]).await;
    assert_eq!(outcomes, [DONE, DONE, again(FailureKind::Poison), DONE]);
    // All four, then halves, then the culprit alone.
    let passes = stage.state().passes.clone();
    let sizes: Vec<_> = passes.iter().map(Vec::len).collect();
    assert_eq!(sizes[..5], [4, 2, 2, 1, 1], "{passes:?}");
}

#[tokio::test]
async fn a_refused_request_fails_at_once_and_for_good() {
    let (farm, stage) = (TestFarm::new().await, Arc::default());
    let outcomes = outcomes(&farm, &stage, &["a", "refused"]).await;
    assert_eq!(outcomes, [DONE, (JobState::Failed, Some(FailureKind::Invalid))]);
}

#[tokio::test]
async fn out_of_memory_halves_the_batch_and_remembers_what_fits() {
    let farm = TestFarm::with(|config| config.max_batch = 8).await;
    let stage: Arc<Stage> = Arc::default();
    stage.set(|state| state.memory = Some(3));
    let prompts = ["1", "2", "3", "4", "5", "6", "7", "8", "9", "10", "11", "12"];
    let outcomes = outcomes(&farm, &stage, &prompts).await;
    assert_eq!(outcomes, [DONE; 12]);
    let sizes: Vec<_> = stage.state().passes.iter().map(Vec::len).collect();
    let too_large = sizes.iter().filter(|size| **size > 3).count();
    // Eight, four and four do not fit; from then on nothing larger than two is tried.
    assert_eq!((sizes[0], too_large), (8, 3), "{sizes:?}");
    assert!(
        sizes.iter().rposition(|size| *size > 3) < sizes.iter().position(|size| *size == 2).map(|at| at + 4),
        "{sizes:?}"
    );
}

#[tokio::test]
async fn a_row_that_does_not_fit_alone_fails_as_out_of_memory() {
    let (farm, stage) = (TestFarm::new().await, Arc::default());
    let outcomes = outcomes(&farm, &stage, &["a", "huge", "b"]).await;
    assert_eq!(outcomes, [DONE, again(FailureKind::OutOfMemory), DONE]);
}

#[tokio::test]
async fn pictures_that_do_not_decode_together_decode_apart() {
    let (farm, stage): (_, Arc<Stage>) = (TestFarm::new().await, Arc::default());
    stage.set(|state| state.decode_memory = Some(1));
    let outcomes = outcomes(&farm, &stage, &["a", "undecodable", "b", "c"]).await;
    assert_eq!(outcomes, [DONE, again(FailureKind::Poison), DONE, DONE]);
}

#[tokio::test]
async fn a_panic_fails_the_culprit_and_the_others_start_anew() {
    let (farm, stage) = (TestFarm::new().await, Arc::default());
    let outcomes = outcomes(&farm, &stage, &["a", "panic", "b"]).await;
    assert_eq!(outcomes, [DONE, again(FailureKind::Poison), DONE]);
    let passes = stage.state().passes.clone();
    assert_eq!(passes[0].len(), 3);
    // Both steps again, alone: what the panic left half done counts for nothing.
    for prompt in ["a", "b"] {
        assert_eq!(passes.iter().filter(|pass| pass[..] == [prompt]).count(), 2, "{passes:?}");
    }
}

#[tokio::test]
async fn jobs_of_a_checkpoint_that_cannot_be_loaded_fail_with_the_reason() {
    let (farm, stage): (_, Arc<Stage>) = (TestFarm::new().await, Arc::default());
    let reason = "unet/diffusion_pytorch_model.safetensors: tensor `conv_in.weight` is missing";
    stage.set(|state| state.load_error = Some(RenderError::Invalid(reason.into())));
    let jobs = farm.submit_prompts(&["1", "2", "3", "4", "5", "6", "7", "8", "9", "10", "11", "12"]).await;
    let running = farm.start(&stage);
    farm.wait_for_state(&jobs, JobState::Failed).await;
    let summary = running.stop().await;
    let error = farm.job(jobs[0]).await.error.unwrap();
    assert_eq!(error.kind, FailureKind::Invalid);
    assert_eq!(error.message, format!("checkpoint `a`: {reason}"));
    // The worker itself is fine: it has not drained.
    assert_eq!((summary.failed, summary.loads), (12, 0));
}

#[tokio::test]
async fn jobs_wait_unspent_for_a_checkpoint_that_cannot_be_had_now() {
    let (farm, stage): (_, Arc<Stage>) = (TestFarm::new().await, Arc::default());
    stage.set(|state| state.load_error = Some(RenderError::Broken("the disk of the cache is full".into())));
    let jobs = farm.submit_prompts(&["1", "2"]).await;
    let running = farm.start(&stage);
    wait_for("two loads to fail", async || stage.state().loads.len() == 2).await;
    assert_eq!(farm.totals().await.queued, 2);
    stage.set(|state| state.load_error = None);
    farm.wait_for_state(&jobs, JobState::Done).await;
    assert_eq!(farm.job(jobs[0]).await.attempts, 1);
    let summary = running.stop().await;
    assert_eq!((summary.done, summary.failed, summary.loads), (2, 0, 1));
}

#[tokio::test]
async fn a_worker_that_can_load_nothing_drains_itself() {
    let farm = TestFarm::with(|config| config.max_failures = 2).await;
    let stage: Arc<Stage> = Arc::default();
    stage.set(|state| state.load_error = Some(RenderError::Broken("no such device any more".into())));
    farm.submit_prompts(&["1"]).await;
    let error = farm.start(&stage).ended().await.unwrap_err().to_string();
    assert!(error.contains("2 failures in a row, the last: retryable: checkpoint `a`: no such device"), "{error}");
    assert_eq!(farm.totals().await.queued, 1);
}

#[tokio::test]
async fn jobs_of_an_unknown_checkpoint_fail_with_the_known_ones() {
    let (farm, stage) = (TestFarm::new().await, Arc::default());
    let jobs = farm.submit([RenderSpec { model: "lost".into(), ..TestFarm::spec("x") }]).await;
    let running = farm.start(&stage);
    farm.wait_for_state(&jobs, JobState::Failed).await;
    running.stop().await;
    let error = farm.job(jobs[0]).await.error.unwrap();
    assert_eq!(error.message, "`model` must be one of a, b, but is `lost`");
}

#[tokio::test]
async fn a_worker_with_too_many_failures_in_a_row_drains_itself() {
    let farm = TestFarm::with(|config| (config.max_failures, config.max_batch) = (3, 1)).await;
    let stage = Arc::default();
    let jobs = farm.submit_prompts(&["poison 1", "poison 2", "poison 3", "4", "5"]).await;
    let error = farm.start(&stage).ended().await.unwrap_err().to_string();
    assert!(error.contains("drained itself after 3 failures in a row, the last: poison: a poisoned row"), "{error}");
    // It leaves nothing leased: what it had not begun is another's.
    let totals = farm.totals().await;
    assert_eq!(totals.leased, 0);
    assert_eq!(totals.done + totals.pending + totals.queued, jobs.len() as u64);
    assert!(!farm.store.workers().await.unwrap()[0].alive);
}

#[tokio::test]
async fn a_success_in_between_shows_that_the_worker_is_fine() {
    let farm = TestFarm::with(|config| (config.max_failures, config.max_batch, config.window) = (3, 1, 1)).await;
    let stage = Stage::held();
    let prompts = ["poison 1", "poison 2", "good", "poison 3", "poison 4"];
    let jobs = farm.submit_prompts(&prompts).await;
    let running = farm.start(&stage);
    // The good job's delivery takes longer than the failures after it: let it arrive first.
    stage.allow(4);
    farm.wait_for_state(&jobs[2..3], JobState::Done).await;
    stage.run_free();
    farm.wait_for_state(&jobs[3..], JobState::Pending).await;
    assert_eq!(running.stop().await.failed, 4);
}
