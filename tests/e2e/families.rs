//! Every family through the API, the queue and the bucket: the pictures are diffusers', and their files say what was asked.

use std::path::Path;
use std::time::Duration;

use image::RgbImage;
use serde_json::{Value, json};

use crate::support::{Farm, eventually, repository, services};

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

/// What a request and its golden have in common.
const FIELDS: [&str; 12] = [
    "prompt",
    "negative_prompt",
    "width",
    "height",
    "steps",
    "guidance_scale",
    "sampler",
    "schedule",
    "seed",
    "max_sequence_length",
    "true_cfg_scale",
    "skip_layer_guidance",
];

struct Golden {
    job: Value,
    picture: RgbImage,
}

/// The golden's request as a client would send it.
fn job(golden: &Value) -> Value {
    let asked = FIELDS.iter().filter(|field| !golden[**field].is_null());
    let mut job: serde_json::Map<String, Value> =
        asked.map(|field| ((*field).to_owned(), golden[*field].clone())).collect();
    job.insert("model".to_owned(), golden["checkpoint"].clone());
    let sizes = ["original_size", "crop", "target_size"].into_iter().filter(|field| !golden[*field].is_null());
    let sizes: serde_json::Map<String, Value> = sizes.map(|field| (field.to_owned(), golden[field].clone())).collect();
    if !sizes.is_empty() {
        job.insert("micro_conditioning".to_owned(), sizes.into());
    }
    job.into()
}

fn goldens(fixtures: &Path) -> Vec<Golden> {
    let read = |(checkpoint, list): &(&str, &str)| {
        let list = std::fs::read_to_string(fixtures.join(list)).expect("a list of pictures");
        let list: Vec<Value> = serde_json::from_str(&list).expect("JSON");
        let own: Vec<Value> = list.into_iter().filter(|golden| golden["checkpoint"] == *checkpoint).collect();
        assert!(own.len() >= PICTURES, "{checkpoint} has only {} pictures", own.len());
        own.into_iter().take(PICTURES)
    };
    let golden = |golden: Value| {
        let file = fixtures.join("pictures").join(golden["file"].as_str().expect("a file's name"));
        Golden { job: job(&golden), picture: image::open(file).expect("a picture").into_rgb8() }
    };
    CHECKPOINTS.iter().flat_map(read).map(golden).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn every_family_renders_diffusers_pictures_with_complete_metadata() {
    let fixtures = repository().join("engine/tests/fixtures");
    let folder = |name: &str| fixtures.join("checkpoints").join(name).display().to_string();
    let models = CHECKPOINTS.map(|(name, _)| format!("{name}={}", folder(name))).join(",");
    let more = [
        ("KILN_MODELS", models),
        ("KILN_WORKER_DTYPE", "f32".to_owned()),
        // Every encoder is read anew for prompts that are new; that must not show.
        ("KILN_WORKER_TEXT_ENCODERS", "drop".to_owned()),
    ];
    let farm = Farm::start_with(services().await, 1, &more).await;

    let goldens = goldens(&fixtures);
    let submission = farm.client.submit(goldens.iter().map(|golden| golden.job.clone()).collect()).await;
    farm.wait_for(&submission, "done", goldens.len() as u64, Duration::from_secs(300)).await;

    let page = farm.client.get(&format!("/v1/jobs?submission_id={submission}&limit=1000")).await;
    let jobs = page["jobs"].as_array().expect("a list of jobs");
    assert_eq!(jobs.len(), goldens.len());
    for (golden, job) in goldens.iter().zip(jobs) {
        let id = job["job_id"].as_str().expect("an id");
        let png = farm.client.bytes(&format!("/v1/jobs/{id}/image")).await;
        let got = image::load_from_memory(&png).expect("a PNG").into_rgb8();
        assert_eq!(got.dimensions(), golden.picture.dimensions(), "{}", golden.job);
        let off = got.as_raw().iter().zip(golden.picture.as_raw()).map(|(a, b)| a.abs_diff(*b)).max();
        assert!(off <= Some(1), "{} is off by {off:?}", golden.job);

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
