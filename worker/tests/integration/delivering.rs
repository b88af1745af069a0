//! What is stored, and in which order.

use std::io::Cursor;
use std::sync::Arc;

use farm::config::seconds;
use farm::job::JobState;
use farm::spec::RenderSpec;
use sha2::{Digest, Sha256};

use crate::support::{Stage, TestFarm, fake, wait_for};

#[tokio::test]
async fn a_picture_is_stored_with_its_texts_and_its_sidecar() {
    let (farm, stage) = (TestFarm::new().await, Arc::default());
    let spec = RenderSpec {
        prompt: "a small red star ★".into(),
        negative_prompt: "blue".into(),
        seed: 0x0003_02ff,
        metadata: serde_json::json!({"order": 7}).as_object().unwrap().clone(),
        ..TestFarm::spec("")
    };
    let job = farm.submit([spec.clone()]).await[0];
    let running = farm.start(&stage);
    farm.wait_for_state(&[job], JobState::Done).await;
    let summary = running.stop().await;

    let view = farm.job(job).await;
    let png = farm.object(view.image_key.as_deref().unwrap()).await;
    let hash: String = Sha256::digest(&png).iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(view.sha256.as_deref(), Some(hash.as_str()));
    let mut reader = png::Decoder::new(Cursor::new(&png[..])).read_info().unwrap();
    let mut pixels = vec![0; reader.output_buffer_size().unwrap()];
    reader.next_frame(&mut pixels).unwrap();
    assert_eq!(pixels, *fake::picture(&spec).as_raw());
    let text = |keyword: &str| {
        let chunk = reader.info().utf8_text.iter().find(|chunk| chunk.keyword == keyword).unwrap();
        chunk.get_text().unwrap()
    };
    let expected =
        "a small red star ★\nNegative prompt: blue\nSteps: 2, CFG scale: 7.5, Seed: 197375, Size: 16x8, Model: a";
    assert_eq!(text("parameters"), expected);
    let kiln: serde_json::Value = serde_json::from_str(&text("kiln")).unwrap();
    assert_eq!(serde_json::from_value::<RenderSpec>(kiln["spec"].clone()).unwrap(), spec);
    assert_eq!((&kiln["device"], &kiln["dtype"], &kiln["attempt"]), (&"fake".into(), &"f32".into(), &1.into()));

    let sidecar = farm.object(view.sidecar_key.as_deref().unwrap()).await;
    let sidecar: serde_json::Value = serde_json::from_slice(&sidecar).unwrap();
    assert_eq!(sidecar["sha256"], hash);
    assert_eq!(sidecar["image_bytes"], png.len());
    assert_eq!(sidecar["image_key"], view.image_key.unwrap());
    assert_eq!(sidecar["job_id"], job.to_string());
    assert_eq!(sidecar["submission_id"], view.submission_id.to_string());
    assert_eq!(sidecar["worker"], summary.worker_id.to_string());
    assert_eq!(sidecar["spec"]["metadata"]["order"], 7);
    assert_eq!(sidecar["batch"]["largest"], 1);
    for name in ["queued", "wait", "load", "denoise", "decode", "encode", "upload"] {
        assert!(sidecar["timings"][format!("{name}_ms")].is_u64(), "{name}: {}", sidecar["timings"]);
    }
}

#[tokio::test]
async fn a_delivery_is_acked_only_after_its_result_is_committed() {
    let (farm, stage) = (TestFarm::new().await, Arc::default());
    let jobs = farm.submit_prompts(&["1", "2", "3", "4", "5", "6"]).await;
    let running = farm.start(&stage);
    farm.wait_for_state(&jobs, JobState::Done).await;
    running.stop().await;
    for job in jobs {
        let committed = farm.faults.place_of(&format!("finish {job}")).expect("the job was finished");
        let acked = farm.faults.place_of(&format!("ack {job}")).expect("the delivery was acked");
        assert!(committed < acked);
    }
}

#[tokio::test]
async fn what_was_uploaded_under_a_lost_lease_is_deleted() {
    let farm = TestFarm::with(|config| config.heartbeat_seconds = 1000.0).await;
    let stage = Arc::default();
    farm.faults.disk.shut();
    let job = farm.submit_prompts(&["late"]).await[0];
    let running = farm.start(&stage);
    wait_for("the upload to begin", async || !farm.faults.noted("put").is_empty()).await;
    // The worker looks dead: its lease expires, and the job is another's.
    farm.clock.advance(seconds(farm.config.lease_seconds) * 2);
    assert_eq!(farm.store.reap(100).await.unwrap().retried, 1);
    farm.faults.disk.open();
    wait_for("both objects to be deleted", async || farm.faults.noted("delete").len() == 2).await;
    let summary = running.stop().await;
    assert_eq!((summary.done, summary.lost), (0, 1));
    assert_eq!(farm.objects().await, Vec::<String>::new());
    assert_eq!(farm.job(job).await.state, JobState::Pending);
}

#[tokio::test]
async fn a_job_that_comes_back_while_its_lost_attempt_is_in_hand_is_given_back_unspent() {
    let farm = TestFarm::with(|config| config.heartbeat_seconds = 1000.0).await;
    let stage: Arc<Stage> = Arc::default();
    farm.faults.disk.shut();
    let jobs = farm.submit_prompts(&["twice"]).await;
    let running = farm.start(&stage);
    wait_for("the upload to begin", async || !farm.faults.noted("put").is_empty()).await;
    farm.clock.advance(seconds(farm.config.lease_seconds) * 2);
    assert_eq!(farm.store.reap(100).await.unwrap().retried, 1);
    farm.clock.advance(seconds(60.0));
    farm.dispatch().await;
    wait_for("the job to be claimed again", async || farm.faults.noted("claim").len() == 2).await;
    farm.wait_for_state(&jobs, JobState::Pending).await;
    farm.faults.disk.open();
    wait_for("the lost attempt's objects to be deleted", async || farm.faults.noted("delete").len() == 2).await;
    wait_for("the job to be done", async || {
        farm.dispatch().await;
        farm.job(jobs[0]).await.state == JobState::Done
    })
    .await;
    let summary = running.stop().await;
    assert_eq!((summary.done, summary.lost), (1, 1));
    assert_eq!(farm.objects().await.len(), 2);
    let image = farm.job(jobs[0]).await.image_key.unwrap();
    assert!(farm.objects().await.contains(&image));
}

#[tokio::test]
async fn a_heartbeat_that_finds_a_lease_lost_drops_its_row() {
    let farm = TestFarm::new().await;
    let stage = Stage::held();
    let job = farm.submit([RenderSpec { steps: 1000, ..TestFarm::spec("lost") }]).await;
    let running = farm.start(&stage);
    wait_for("the row to run", async || {
        stage.allow(1);
        !stage.state().passes.is_empty()
    })
    .await;
    farm.clock.advance(seconds(farm.config.lease_seconds) * 2);
    // The reaper may come late: a beat has renewed the lease then, and the clock moves again.
    wait_for("the reaper to take the job", async || {
        farm.clock.advance(seconds(farm.config.lease_seconds) * 2);
        farm.store.reap(100).await.unwrap().retried == 1
    })
    .await;
    wait_for("no row in the batch", async || {
        stage.allow(1);
        farm.store.workers().await.unwrap()[0].status.rows == 0
    })
    .await;
    stage.run_free();
    let summary = running.stop().await;
    assert_eq!((summary.lost, summary.done), (1, 0));
    assert_eq!(farm.objects().await, Vec::<String>::new());
    assert_eq!(farm.job(job[0]).await.state, JobState::Pending);
}

#[tokio::test]
async fn a_job_cancelled_while_its_picture_waits_for_storage_is_not_delivered() {
    let (farm, stage) = (TestFarm::new().await, Arc::default());
    farm.faults.disk_full.store(true, std::sync::atomic::Ordering::SeqCst);
    let job = farm.submit_prompts(&["unwanted"]).await;
    let running = farm.start(&stage);
    wait_for("an upload to fail", async || !farm.faults.noted("put").is_empty()).await;
    farm.store.cancel_job(job[0]).await.unwrap();
    farm.wait_for_state(&job, JobState::Cancelled).await;
    let summary = running.stop().await;
    assert_eq!((summary.done, summary.failed, summary.cancelled), (0, 0, 1));
}
