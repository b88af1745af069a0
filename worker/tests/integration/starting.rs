//! Jobs that start from pictures, and from what other jobs have left.

use std::io::Cursor;
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;

use farm::artifact::{ArtifactKey, UploadFormat};
use farm::job::{FailureKind, JobState};
use farm::latent::LatentFile;
use farm::spec::{FamilyOptions, InitImage, Mask, MaskedContent, RenderSpec};
use image::{ImageFormat, Rgb, RgbImage};

use crate::support::{Stage, TestFarm, fake, wait_for};

/// Stores a picture of one colour; its key.
async fn upload(farm: &TestFarm, name: &str, colour: [u8; 3]) -> String {
    let mut bytes = Cursor::new(Vec::new());
    RgbImage::from_pixel(30, 20, Rgb(colour)).write_to(&mut bytes, ImageFormat::Png).unwrap();
    let key = ArtifactKey::Upload { sha256: name.into(), format: UploadFormat::Png };
    farm.worker.artifacts.put(&key, bytes.into_inner().into()).await.unwrap();
    key.path()
}

fn from(prompt: &str, key: &str) -> RenderSpec {
    let init_image = Some(InitImage { key: key.into(), strength: Some(0.5), mask: None });
    RenderSpec { init_image, ..TestFarm::spec(prompt) }
}

#[tokio::test]
async fn a_job_starts_from_its_picture_and_says_so() {
    let (farm, stage) = (TestFarm::new().await, Stage::held());
    let (orange, mask) = (upload(&farm, "orange", [250, 120, 10]).await, upload(&farm, "mask", [255; 3]).await);
    let mut masked = from("masked", &orange);
    let mask = Mask { key: mask, blur: 2.0, content: MaskedContent::Noise };
    masked.init_image.as_mut().unwrap().mask = Some(mask);
    let plain = RenderSpec { steps: 1000, ..TestFarm::spec("plain") };
    let jobs = farm.submit([from("orange", &orange), masked, plain.clone()]).await;
    let running = farm.start(&stage);
    wait_for("both to be done while the other still runs", async || {
        stage.allow(1);
        farm.job(jobs[0]).await.state == JobState::Done && farm.job(jobs[1]).await.state == JobState::Done
    })
    .await;
    stage.run_free();
    farm.wait_for_state(&jobs, JobState::Done).await;
    running.stop().await;
    // Neither picture nor mask is a reason to render alone.
    let largest = stage.state().passes.iter().map(Vec::len).max();
    assert_eq!(largest, Some(3));
    for job in &jobs[..2] {
        let view = farm.job(*job).await;
        let picture =
            image::load_from_memory(&farm.object(view.image_key.as_deref().unwrap()).await).unwrap().to_rgb8();
        assert_eq!(picture, RgbImage::from_pixel(16, 8, Rgb([250, 120, 10])));
        let sidecar: serde_json::Value =
            serde_json::from_slice(&farm.object(view.sidecar_key.as_deref().unwrap()).await).unwrap();
        assert_eq!(sidecar["spec"]["init_image"]["key"], orange);
        assert_eq!(sidecar["spec"]["init_image"]["strength"], 0.5);
    }
    let view = farm.job(jobs[2]).await;
    let picture = image::load_from_memory(&farm.object(view.image_key.as_deref().unwrap()).await).unwrap().to_rgb8();
    assert_eq!(picture, fake::picture(&plain));
}

#[tokio::test]
async fn a_picture_that_is_not_there_or_is_none_fails_its_job_alone_and_at_once() {
    let (farm, stage) = (TestFarm::new().await, Arc::default());
    let red = upload(&farm, "red", [200, 0, 0]).await;
    let text = ArtifactKey::Upload { sha256: "text".into(), format: UploadFormat::Png };
    farm.worker.artifacts.put(&text, b"no picture".to_vec().into()).await.unwrap();
    let specs = [from("missing", "uploads/missing.png"), from("text", &text.path()), from("red", &red)];
    let jobs = farm.submit(specs).await;
    let running = farm.start(&stage);
    farm.wait_for_state(&jobs[..2], JobState::Failed).await;
    farm.wait_for_state(&jobs[2..], JobState::Done).await;
    running.stop().await;
    for (job, key) in jobs.iter().zip(["uploads/missing.png", "uploads/text.png"]) {
        let error = farm.job(*job).await.error.unwrap();
        assert_eq!(error.kind, FailureKind::Invalid);
        assert!(error.message.starts_with("`init_image` must be a picture in the artifact store"), "{}", error.message);
        assert!(error.message.contains(key), "{}", error.message);
    }
}

#[tokio::test]
async fn a_job_that_ends_early_leaves_a_latent_and_another_goes_on_from_it() {
    let (farm, stage) = (TestFarm::new().await, Arc::default());
    let options = FamilyOptions { denoising_end: Some(0.8), ..FamilyOptions::default() };
    let base = farm.submit([RenderSpec { options, seed: 77, ..TestFarm::spec("base") }, TestFarm::spec("other")]).await;
    let running = farm.start(&stage);
    farm.wait_for_state(&base, JobState::Done).await;
    let (view, other) = (farm.job(base[0]).await, farm.job(base[1]).await);
    let key = view.image_key.unwrap();
    assert!(key.contains("/latents/") && key.ends_with(".1x1.safetensors"), "{key}");
    assert!(other.image_key.unwrap().ends_with(".png"));
    assert_eq!(LatentFile::read(&farm.object(&key).await).unwrap().values, [77.0]);
    let sidecar: serde_json::Value =
        serde_json::from_slice(&farm.object(view.sidecar_key.as_deref().unwrap()).await).unwrap();
    assert_eq!(
        (&sidecar["image_key"], &sidecar["spec"]["options"]["denoising_end"]),
        (&key.clone().into(), &0.8.into())
    );

    let options = FamilyOptions { denoising_start: Some(0.8), ..FamilyOptions::default() };
    let init_image = Some(InitImage { key, strength: None, mask: None });
    let broken = ArtifactKey::Upload { sha256: "x".into(), format: UploadFormat::Latent { width: 1, height: 1 } };
    farm.worker.artifacts.put(&broken, b"no latent".to_vec().into()).await.unwrap();
    let refined = RenderSpec { options, init_image, seed: 5, ..TestFarm::spec("refined") };
    let jobs = farm.submit([refined, from("broken", &broken.path())]).await;
    farm.wait_for_state(&jobs[..1], JobState::Done).await;
    farm.wait_for_state(&jobs[1..], JobState::Failed).await;
    running.stop().await;
    let key = farm.job(jobs[0]).await.image_key.unwrap();
    let picture = image::load_from_memory(&farm.object(&key).await).unwrap().to_rgb8();
    assert_eq!(picture, RgbImage::from_pixel(16, 8, Rgb([77, 0, 0])));
    let error = farm.job(jobs[1]).await.error.unwrap();
    assert_eq!(error.kind, FailureKind::Invalid);
    assert_eq!(
        error.message,
        "`init_image` must be a latent in the artifact store: `uploads/x.1x1.safetensors` is no safetensors file, or a \
         broken one"
    );
}

#[tokio::test]
async fn an_artifact_store_that_is_away_is_waited_for() {
    let (farm, stage) = (TestFarm::new().await, Arc::default());
    let red = upload(&farm, "red", [200, 0, 0]).await;
    farm.faults.reads_fail.store(true, SeqCst);
    let jobs = farm.submit([from("red", &red), TestFarm::spec("plain")]).await;
    let running = farm.start(&stage);
    farm.wait_for_state(&jobs[1..], JobState::Done).await;
    wait_for("the picture to be asked for", async || !farm.faults.noted("get").is_empty()).await;
    assert_eq!(farm.job(jobs[0]).await.state, JobState::Leased);
    farm.faults.reads_fail.store(false, SeqCst);
    farm.wait_for_state(&jobs, JobState::Done).await;
    let summary = running.stop().await;
    assert_eq!((summary.done, summary.failed), (2, 0));
}

#[tokio::test]
async fn a_worker_that_stops_meanwhile_gives_the_job_back_unspent() {
    let (farm, stage) = (TestFarm::new().await, Arc::default());
    let red = upload(&farm, "red", [200, 0, 0]).await;
    farm.faults.reads_fail.store(true, SeqCst);
    let jobs = farm.submit([from("red", &red)]).await;
    let running = farm.start(&stage);
    wait_for("the picture to be asked for", async || !farm.faults.noted("get").is_empty()).await;
    let summary = running.stop().await;
    assert_eq!((summary.released, summary.failed), (1, 0));
    let job = farm.job(jobs[0]).await;
    assert_eq!((job.state, job.attempts), (JobState::Pending, 0));
}

#[tokio::test]
async fn a_job_that_is_cancelled_meanwhile_is_not_rendered() {
    let (farm, stage): (_, Arc<Stage>) = (TestFarm::new().await, Arc::default());
    let red = upload(&farm, "red", [200, 0, 0]).await;
    farm.faults.reads_fail.store(true, SeqCst);
    let jobs = farm.submit([from("red", &red)]).await;
    let running = farm.start(&stage);
    wait_for("the picture to be asked for", async || !farm.faults.noted("get").is_empty()).await;
    farm.store.cancel_job(jobs[0]).await.unwrap();
    wait_for("many heartbeats", async || farm.faults.noted("get").len() > 3).await;
    farm.faults.reads_fail.store(false, SeqCst);
    farm.wait_for_state(&jobs, JobState::Cancelled).await;
    running.stop().await;
    let passes = stage.state().passes.clone();
    assert!(passes.is_empty(), "{passes:?}");
}
