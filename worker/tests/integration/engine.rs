//! The worker with the real engine and the checkpoint that comes with the binary.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use engine::{Checkpoint, Device, DeviceChoice, Precision};
use farm::catalog::{Catalog, ModelFacts};
use farm::config::WorkerConfig;
use farm::fleet::TextStatus;
use farm::id::JobId;
use farm::job::{JobState, Lane};
use farm::spec::{RenderSpec, Sampler, Schedule};
use worker::WorkerSummary;

use crate::support::{TestFarm, wait_for};

/// A farm that renders with the demo checkpoint, and where its weights are.
async fn demo_farm(change: impl FnOnce(&mut WorkerConfig)) -> (TestFarm, PathBuf) {
    let mut farm = TestFarm::with(|config| {
        config.device = Some("cpu".into());
        change(config);
    })
    .await;
    let weights = demo::unpack(farm.folder.path()).unwrap();
    let facts = ModelFacts { width: 128, height: 128, ..ModelFacts::assumed(weights.to_string_lossy()) };
    farm.worker.catalog = Arc::new(Catalog::new(BTreeMap::from([("demo".to_owned(), facts)]), "demo").unwrap());
    (farm, weights)
}

fn demo_spec(prompt: &str) -> RenderSpec {
    RenderSpec { model: "demo".into(), width: 64, height: 64, lane: Lane::Bulk, ..TestFarm::spec(prompt) }
}

/// Renders so many jobs that wait, until the store has heard of all.
async fn serve(farm: &TestFarm, jobs: u64) -> WorkerSummary {
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let running = tokio::spawn(worker::run(farm.worker.clone(), async move { drop(stopped.await) }));
    let heard = async || farm.store.workers().await.unwrap().first().map_or(0, |worker| worker.status.done);
    wait_for("all to be done", async || running.is_finished() || heard().await == jobs).await;
    drop(stop);
    running.await.unwrap().unwrap()
}

/// The jobs' pictures are those that the engine renders with nobody beside them.
async fn assert_rendered_as_alone(farm: &TestFarm, weights: &Path, jobs: Vec<JobId>, specs: Vec<RenderSpec>) {
    let device = Device::open(DeviceChoice::Cpu).unwrap();
    let checkpoint = Arc::new(Checkpoint::load(weights, &device, Precision::F32).unwrap());
    for (job, spec) in jobs.into_iter().zip(specs) {
        let view = farm.job(job).await;
        assert_eq!(view.state, JobState::Done);
        let png = farm.object(view.image_key.as_deref().unwrap()).await;
        let picture = image::load_from_memory(&png).unwrap().to_rgb8();
        let alone = engine::render(&checkpoint, &worker::row_request(&spec).unwrap(), |_, _| {}).unwrap();
        assert!(picture == alone, "`{}` differs from the picture rendered alone", spec.prompt);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn text_encoders_that_are_let_go_change_no_picture_and_are_read_once_for_many_rows() {
    let (farm, weights) = demo_farm(|config| {
        (config.max_batch, config.window, config.text_encoders) = (1, 9, "drop".into());
    })
    .await;
    let specs: Vec<_> = (0..10).map(|number| demo_spec(&format!("a star number {}", number % 5))).collect();
    let jobs = farm.submit(specs.clone()).await;
    let summary = serve(&farm, 10).await;
    assert_eq!((summary.done, summary.loads), (10, 1));
    assert_rendered_as_alone(&farm, &weights, jobs, specs).await;

    // Five prompts and the empty one are new; each job asks for two.
    let TextStatus { embedding_hits, embedding_misses, embedding_bytes, encoder_reads, encoder_bytes } =
        farm.store.workers().await.unwrap()[0].status.text;
    assert_eq!((embedding_misses, embedding_hits, encoder_bytes), (6, 14, 0));
    assert!(embedding_bytes > 0);
    // One reading for all that had been claimed by then, where each new prompt alone would have had one.
    assert!((1..=3).contains(&encoder_reads), "{encoder_reads} readings");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pictures_of_a_mixed_batch_are_those_that_the_engine_renders_alone() {
    let (farm, weights) = demo_farm(|config| config.max_batch = 3).await;
    let spec = |prompt: &str, steps, sampler, schedule, guidance_scale, seed| RenderSpec {
        steps,
        sampler: Some(sampler),
        schedule: Some(schedule),
        guidance_scale,
        seed,
        ..demo_spec(prompt)
    };
    let specs = vec![
        spec(
            "a small red star left of a blue heart on an orange background",
            3,
            Sampler::Euler,
            Schedule::Karras,
            5.0,
            1,
        ),
        spec("a large green circle", 5, Sampler::EulerAncestral, Schedule::Normal, 1.0, 2),
        spec("a yellow square", 4, Sampler::Dpmpp2m, Schedule::Karras, 7.5, 3),
        spec("a blue triangle", 2, Sampler::Ddim, Schedule::Normal, 3.0, 4),
    ];
    let jobs = farm.submit(specs.clone()).await;
    let summary = serve(&farm, 4).await;
    assert_eq!((summary.done, summary.loads), (4, 1));
    assert_rendered_as_alone(&farm, &weights, jobs, specs).await;
}
