//! A base checkpoint's latent, handed over to a refiner through the API, the queue and the bucket; and on the command line.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use farm::latent::LatentFile;
use serde_json::{Value, json};

use crate::support::golden::{self, checkpoint, picture};
use crate::support::{Farm, eventually, kiln, services};

const LIMIT: Duration = Duration::from_secs(180);

/// Goldens whose base starts from noise, and the picture that the refiner makes of its latent.
const PAIRS: [&str; 5] = ["refined-00", "refined-01", "refined-03", "refined-06", "refined-07"];

/// The rows that diffusers made, by the name of what they end in.
fn rows() -> BTreeMap<String, Value> {
    let name = |row: &Value| row["file"].as_str().or(row["latent"].as_str()).expect("a name").to_owned();
    golden::list("handed_over.json").into_iter().map(|row| (name(&row), row)).collect()
}

async fn start() -> Farm {
    let models = golden::models(&["sdxl", "sdxl_refiner", "sd1"]);
    let more = [("KILN_MODELS", models), ("KILN_WORKER_DTYPE", "f32".to_owned())];
    Farm::start_with(services().await, 1, &more).await
}

/// The jobs of a submission once all of them are in a state.
async fn jobs(farm: &Farm, jobs: Vec<Value>, state: &str) -> Vec<Value> {
    let count = jobs.len() as u64;
    let submission = farm.client.submit(jobs).await;
    eventually(&format!("{count} jobs are {state}"), LIMIT, || async {
        (farm.client.counter(&submission, state).await == Some(count)).then_some(())
    })
    .await;
    let page = farm.client.get(&format!("/v1/jobs?submission_id={submission}&limit=1000")).await;
    page["jobs"].as_array().expect("a list of jobs").clone()
}

async fn bytes(farm: &Farm, job: &Value, what: &str) -> Vec<u8> {
    farm.client.bytes(&format!("/v1/jobs/{}/{what}", job["job_id"].as_str().expect("an id"))).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refiner_goes_on_from_the_latents_of_base_jobs_to_diffusers_pictures() {
    let (farm, rows) = (start().await, rows());
    let bases = PAIRS.map(|name| golden::job(&rows[&format!("{name}.base")])).to_vec();
    let bases = jobs(&farm, bases, "done").await;
    let mut refined = Vec::new();
    for (place, (name, base)) in PAIRS.iter().zip(&bases).enumerate() {
        let key = base["image_key"].as_str().expect("a key");
        assert!(key.contains("/latents/") && key.ends_with(".safetensors"), "{key}");
        let latent = bytes(&farm, base, "image").await;
        let read = LatentFile::read(&latent).expect("a latent");
        let row = &rows[&format!("{name}.png")];
        assert_eq!((8 * read.width, 8 * read.height), (size(row, "width"), size(row, "height")), "{name}");
        let sidecar: Value = serde_json::from_slice(&bytes(&farm, base, "sidecar").await).expect("JSON");
        assert_eq!((&sidecar["image_key"], &sidecar["image_bytes"]), (&key.into(), &latent.len().into()));
        assert_eq!(sidecar["spec"]["options"]["denoising_end"], rows[&format!("{name}.base")]["denoising_end"]);
        let mut job = golden::job(row);
        // A key of the farm's and an uploaded file are the same to a job.
        job["init_image"] = match place {
            0 => farm.client.upload_as("application/safetensors", latent).await.into(),
            _ => key.into(),
        };
        // Its size is the latent's, whether or not it is said.
        if place > 1 {
            job.as_object_mut().expect("an object").retain(|field, _| field != "width" && field != "height");
        }
        refined.push(job);
    }
    let refined = jobs(&farm, refined, "done").await;
    for (name, job) in PAIRS.iter().zip(&refined) {
        let got = image::load_from_memory(&bytes(&farm, job, "image").await).expect("a PNG").into_rgb8();
        golden::compare(&got, &picture(&format!("{name}.png")), name);
        assert_eq!(job["spec"]["init_image"]["strength"], Value::Null);
    }
}

fn size(row: &Value, side: &str) -> u32 {
    row[side].as_u64().and_then(|side| u32::try_from(side).ok()).expect("a side")
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_handed_over_is_refused_or_fails_with_the_reason() {
    let farm = start().await;
    let values =
        |channels: u32| LatentFile { channels, height: 8, width: 8, values: vec![0.25; 64 * channels as usize] };
    let upload = async |channels| {
        farm.client.upload_as("application/octet-stream", values(channels).write(BTreeMap::new())).await
    };
    let (latent, narrow) = (upload(4).await, upload(3).await);
    let of = |more: Value| {
        let mut job = json!({"model": "sdxl_refiner", "prompt": "a star", "steps": 10, "denoising_start": 0.8, "init_image": latent});
        job.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
        job
    };
    for (job, field, value) in [
        (of(json!({"width": 128})), "width × height", "128 × 64"),
        (of(json!({"model": "sd1"})), "denoising_start", "present"),
        (of(json!({"model": "sd1", "denoising_start": null})), "init_image", "a latent"),
        (of(json!({"strength": 0.4})), "strength", "0.4"),
        (of(json!({"denoising_end": 0.7})), "denoising_start", "0.8"),
        (
            of(json!({"init_image": "data:application/safetensors;base64,BAAAAAAAAAB7AAAA"})),
            "init_image",
            "a file that",
        ),
        (of(json!({"init_image": null})), "denoising_start", "present"),
    ] {
        let (status, problem) = farm.client.refused("/v1/jobs", &job).await;
        assert_eq!((status, &problem["field"]), (422, &field.into()), "{problem}");
        assert!(problem.to_string().contains(value), "{problem}");
    }
    let (status, problem) = farm.client.refused_upload(b"\x02\0\0\0\0\0\0\0{}".to_vec()).await;
    assert!(status == 422 && problem.to_string().contains("must have one tensor, `latents`"), "{status} {problem}");

    let late = of(json!({"denoising_start": 0.9999}));
    let failing =
        vec![of(json!({"init_image": narrow})), late, of(json!({"init_image": "uploads/none.8x8.safetensors"}))];
    let failed = jobs(&farm, failing, "failed").await;
    let reasons = [
        "a latent of 4 × 8 × 8, as the row's",
        "so little that of 10 steps",
        "`init_image` must be a latent in the artifact store: there is no object",
    ];
    for (job, reason) in failed.iter().zip(reasons) {
        let message = job["error"]["message"].as_str().expect("a message");
        assert!(message.contains(reason), "{message}");
    }
}

/// `kiln render` of the golden base request, with `arguments`.
fn render(folder: &Path, row: &Value, arguments: &[&str]) -> (bool, String) {
    let mut command = kiln(&[
        ("KILN_DATA_DIR".into(), folder.join("data").display().to_string()),
        ("KILN_MODELS".into(), format!("base={},sd1={}", checkpoint("sdxl"), checkpoint("sd1"))),
    ]);
    command.arg("render").arg(row["prompt"].as_str().expect("a prompt"));
    for (option, field) in [
        ("--steps", "steps"),
        ("--guidance", "guidance_scale"),
        ("--seed", "seed"),
        ("--width", "width"),
        ("--height", "height"),
        ("--sampler", "sampler"),
        ("--schedule", "schedule"),
    ] {
        let value = match &row[field] {
            Value::Null => continue,
            Value::String(word) => word.clone(),
            number => number.to_string(),
        };
        command.args([option, &value]);
    }
    command.args(["--dtype", "f32"]).args(arguments);
    let output = command.output().expect("the binary can be run");
    (output.status.success(), String::from_utf8_lossy(&output.stderr).into_owned())
}

#[test]
fn render_refines_in_one_command_or_in_two() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let (rows, path) = (rows(), |name: &str| folder.path().join(name).display().to_string());
    let refiner = checkpoint("sdxl_refiner");
    let row = &rows["refined-03.base"];
    let expected = picture("refined-03.png");
    let (one, two, latent) = (path("one.png"), path("two.png"), path("base.safetensors"));
    let run = |arguments: &[&str]| {
        let (success, complaint) = render(folder.path(), row, arguments);
        assert!(success, "{complaint}");
    };
    run(&["--model", "base", "--refiner", &refiner, "--switch-at", "0.7", "--out", &one]);
    run(&["--model", "base", "--denoising-end", "0.7", "--out", &latent]);
    run(&["--model", &refiner, "--denoising-start", "0.7", "--init", &latent, "--out", &two]);
    for path in [&one, &two] {
        golden::compare(&image::open(path).expect("a PNG").into_rgb8(), &expected, path);
    }
    for (arguments, words) in [
        (&["--model", "base", "--denoising-end", "0.7", "--out", &one][..], &["--out", ".safetensors"][..]),
        (&["--model", "base", "--refiner", "sd1", "--out", &two], &["--refiner", "sd1"]),
        (&["--model", "sd1", "--refiner", &refiner, "--out", &two], &["denoising_end", "sd1"]),
        (&["--model", "base", "--refiner", &refiner, "--switch-at", "1.2", "--out", &two], &["denoising_end", "1.2"]),
        (&["--model", "base", "--refiner", &refiner, "--denoising-end", "0.5"], &["--refiner", "--denoising-end"]),
    ] {
        let (success, complaint) = render(folder.path(), row, arguments);
        assert!(!success && words.iter().all(|word| complaint.contains(word)), "{arguments:?}: {complaint}");
    }
}
