//! The worker with the real engine and the checkpoint that comes with the binary.

use std::collections::BTreeMap;
use std::sync::Arc;

use engine::{Checkpoint, Device, DeviceChoice, Precision};
use farm::catalog::{Catalog, ModelFacts};
use farm::job::{JobState, Lane};
use farm::spec::{RenderSpec, Sampler, Schedule};

use crate::support::{TestFarm, wait_for};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pictures_of_a_mixed_batch_are_those_that_the_engine_renders_alone() {
    let mut farm = TestFarm::with(|config| (config.device, config.max_batch) = (Some("cpu".into()), 3)).await;
    let weights = demo::unpack(farm.folder.path()).unwrap();
    let facts = ModelFacts { width: 128, height: 128, ..ModelFacts::assumed(weights.to_string_lossy()) };
    farm.worker.catalog = Arc::new(Catalog::new(BTreeMap::from([("demo".to_owned(), facts)]), "demo").unwrap());
    let spec = |prompt: &str, steps, sampler, schedule, guidance_scale, seed| RenderSpec {
        model: "demo".into(),
        width: 64,
        height: 64,
        steps,
        sampler: Some(sampler),
        schedule: Some(schedule),
        guidance_scale,
        seed,
        lane: Lane::Bulk,
        ..TestFarm::spec(prompt)
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
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let running = tokio::spawn(worker::run(farm.worker.clone(), async move { drop(stopped.await) }));
    wait_for("all to be done", async || running.is_finished() || farm.totals().await.done == 4).await;
    drop(stop);
    let summary = running.await.unwrap().unwrap();
    assert_eq!((summary.done, summary.loads), (4, 1));

    let device = Device::open(DeviceChoice::Cpu).unwrap();
    let checkpoint = Arc::new(Checkpoint::load(&weights, &device, Precision::F32).unwrap());
    for (job, spec) in jobs.into_iter().zip(specs) {
        let view = farm.job(job).await;
        assert_eq!(view.state, JobState::Done);
        let png = farm.object(view.image_key.as_deref().unwrap()).await;
        let picture = image::load_from_memory(&png).unwrap().to_rgb8();
        let alone = engine::render(&checkpoint, &worker::row_request(&spec).unwrap(), |_, _| {}).unwrap();
        assert!(picture == alone, "`{}` differs from the picture rendered alone", spec.prompt);
    }
}
