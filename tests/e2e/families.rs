//! Every family through the API, the queue and the bucket: the pictures are diffusers', and their files say what was asked.

use std::time::Duration;

use image::RgbImage;
use serde_json::{Value, json};

use crate::support::{Farm, eventually, golden, services};

/// Each with the list that has its pictures.
const CHECKPOINTS: [(&str, &str); 8] = [
    ("sd1", "pictures.json"),
    ("sd2", "pictures.json"),
    ("sdxl", "pictures/sdxl.json"),
    ("sdxl_turbo", "pictures/sdxl.json"),
    ("sd3", "pictures/sd3.json"),
    ("sd35_medium", "pictures/sd3.json"),
    ("flux_dev", "flux_pictures.json"),
    ("flux_schnell", "flux_pictures.json"),
];

/// Pictures of each checkpoint.
const PICTURES: usize = 3;

struct Golden {
    job: Value,
    picture: RgbImage,
}

fn goldens() -> Vec<Golden> {
    let read = |(checkpoint, list): &(&str, &str)| {
        let own: Vec<Value> =
            golden::list(list).into_iter().filter(|golden| golden["checkpoint"] == *checkpoint).collect();
        assert!(own.len() >= PICTURES, "{checkpoint} has only {} pictures", own.len());
        own.into_iter().take(PICTURES)
    };
    let golden = |entry: Value| {
        let picture = golden::picture(entry["file"].as_str().expect("a file's name"));
        Golden { job: golden::job(&entry), picture }
    };
    CHECKPOINTS.iter().flat_map(read).map(golden).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn every_family_renders_diffusers_pictures_with_complete_metadata() {
    let more = [
        ("KILN_MODELS", golden::models(&CHECKPOINTS.map(|(name, _)| name))),
        ("KILN_WORKER_DTYPE", "f32".to_owned()),
        // Every encoder is read anew for prompts that are new; that must not show.
        ("KILN_WORKER_TEXT_ENCODERS", "drop".to_owned()),
    ];
    let farm = Farm::start_with(services().await, 1, &more).await;

    let goldens = goldens();
    let submission = farm.client.submit(goldens.iter().map(|golden| golden.job.clone()).collect()).await;
    farm.wait_for(&submission, "done", goldens.len() as u64, Duration::from_secs(300)).await;

    let page = farm.client.get(&format!("/v1/jobs?submission_id={submission}&limit=1000")).await;
    let jobs = page["jobs"].as_array().expect("a list of jobs");
    assert_eq!(jobs.len(), goldens.len());
    for (golden, job) in goldens.iter().zip(jobs) {
        let id = job["job_id"].as_str().expect("an id");
        let png = farm.client.bytes(&format!("/v1/jobs/{id}/image")).await;
        let got = image::load_from_memory(&png).expect("a PNG").into_rgb8();
        golden::compare(&got, &golden.picture, &golden.job);

        let sidecar: Value =
            serde_json::from_slice(&farm.client.bytes(&format!("/v1/jobs/{id}/sidecar")).await).expect("JSON");
        check_sidecar(&golden.job, &sidecar["spec"]);
    }
    check_metrics(&farm).await;
}

/// What the worker's text encoders did is seen by who watches the scheduler.
async fn check_metrics(farm: &Farm) {
    let [hits, misses, reads] = ["embedding_hits_total", "embedding_misses_total", "encoder_reads_total"];
    eventually("a heartbeat says that all prompts were encoded", Duration::from_secs(30), || async {
        let text = String::from_utf8(farm.client.bytes("/metrics").await).expect("text");
        let sample = |name: &str| -> f64 {
            let name = format!("kiln_worker_{name}{{");
            let line = text.lines().find(|line| line.starts_with(&name)).unwrap_or_else(|| panic!("{name}: {text}"));
            line.rsplit(' ').next().and_then(|value| value.parse().ok()).expect("a number")
        };
        assert!(sample(reads) <= sample(misses), "{text}");
        // Prompts of one picture are new to at least one encoder; some pictures of a checkpoint share prompts.
        let all = sample(misses) >= CHECKPOINTS.len() as f64 && sample(hits) >= 1.0 && sample(reads) >= 8.0;
        (all && sample("encoder_bytes") == 0.0 && sample("embedding_bytes") > 0.0).then_some(())
    })
    .await;
}

/// The sidecar's spec must hold all that was asked for.
fn check_sidecar(asked: &Value, spec: &Value) {
    let options = ["max_sequence_length", "true_cfg_scale", "skip_layer_guidance", "micro_conditioning"];
    for (field, value) in asked.as_object().expect("a request") {
        let recorded = if options.contains(&field.as_str()) { &spec["options"][field] } else { &spec[field] };
        let same = match (value.as_f64(), recorded.as_f64()) {
            (Some(value), Some(recorded)) => value == recorded,
            _ => value == recorded || (*value == json!({}) && recorded.is_null()),
        };
        assert!(same, "`{field}` was {value}, and is recorded as {recorded} in {spec}");
    }
}
