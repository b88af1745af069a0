//! Thousands of mixed jobs: every picture once, few loads, and a picture that depends on its job alone.

use std::time::Duration;

use serde_json::{Value, json};

use crate::support::{Farm, audit, services};

const JOBS: usize = 2_000;

/// Job `index` of a mix of checkpoints, sizes, steps, samplers, guidance and lanes. The second half
/// repeats the first, so that every picture is rendered twice among other batch mates.
fn mixed_job(index: usize) -> Value {
    let kind = index % (JOBS / 2);
    let samplers = ["ddim", "euler", "euler_ancestral", "dpmpp_2m", "pndm"];
    let colors = ["red", "green", "blue", "yellow", "purple"];
    let sampler = samplers[kind % samplers.len()];
    // PNDM's Runge-Kutta beginning takes four.
    let steps = if sampler == "pndm" { 4 } else { 1 + kind % 4 };
    let mut job = json!({
        "prompt": format!("a {} star on a gray background", colors[kind % colors.len()]),
        "seed": kind,
        "steps": steps,
        "guidance_scale": if kind.is_multiple_of(3) { 1.0 } else { 4.0 },
        "sampler": sampler,
        "lane": if index.is_multiple_of(20) { "interactive" } else { "bulk" },
    });
    if kind.is_multiple_of(2) {
        job["model"] = json!("demo");
        job["width"] = json!(if kind.is_multiple_of(4) { 64 } else { 96 });
        job["height"] = json!(64);
    } else {
        job["model"] = json!("tiny");
    }
    job
}

fn pixels(png: &[u8]) -> Vec<u8> {
    image::load_from_memory(png).expect("a PNG").into_rgb8().into_raw()
}

#[tokio::test(flavor = "multi_thread")]
async fn two_thousand_mixed_jobs_on_two_checkpoints_and_two_workers() {
    let farm = Farm::start(services().await, 2).await;
    let submission = farm.client.submit((0..JOBS).map(mixed_job).collect()).await;
    farm.wait_for(&submission, "done", JOBS as u64, Duration::from_secs(900)).await;
    audit(&farm, &submission, JOBS as u64).await;

    let workers = farm.client.get("/v1/workers").await;
    let workers = workers["workers"].as_array().expect("a list of workers").clone();
    let loads: u64 = workers.iter().map(|worker| worker["loads"].as_u64().expect("a number")).sum();
    // Two checkpoints, two workers: one load each, and a few moves at the end or when a lane's bound is hit.
    assert!((2..=12).contains(&loads), "{loads} loads for two checkpoints: {workers:?}");

    same_job_same_picture(&farm, &submission).await;
}

/// Compares some pictures of the first half with their twins of the second, pixel for pixel.
async fn same_job_same_picture(farm: &Farm, submission: &str) {
    let mut ids: Vec<String> = Vec::with_capacity(JOBS);
    let mut after = String::new();
    while ids.len() < JOBS {
        let page = farm.client.get(&format!("/v1/jobs?submission_id={submission}&limit=1000{after}")).await;
        let jobs = page["jobs"].as_array().expect("a page of jobs");
        assert!(!jobs.is_empty(), "the listing ends early, after {} jobs", ids.len());
        ids.extend(jobs.iter().map(|job| job["job_id"].as_str().expect("an id").to_owned()));
        after = format!("&after={}", ids.last().expect("at least one"));
    }
    for kind in (0..JOBS / 2).step_by(37) {
        let first = farm.client.bytes(&format!("/v1/jobs/{}/image", ids[kind])).await;
        let second = farm.client.bytes(&format!("/v1/jobs/{}/image", ids[kind + JOBS / 2])).await;
        assert_eq!(pixels(&first), pixels(&second), "the picture of job {kind} depends on its company");
    }
}
