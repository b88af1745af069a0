//! The command line as a user types it.

use std::io::Write;
use std::path::Path;
use std::process::{Command, Output};
use std::time::Duration;

use serde_json::Value;

use crate::support::{Farm, Process, audit, kiln, services, tiny_checkpoint};

fn succeed(command: &mut Command) -> Output {
    let output = command.output().expect("the binary can be run");
    let (said, complaint) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{command:?}: {}\n{said}\n{complaint}", output.status);
    output
}

fn complain(command: &mut Command) -> String {
    let output = command.output().expect("the binary can be run");
    assert!(!output.status.success(), "{command:?} succeeded");
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn alone(folder: &Path) -> Vec<(String, String)> {
    vec![("KILN_DATA_DIR".into(), folder.join("data").display().to_string())]
}

#[test]
fn render_draws_what_the_prompt_says() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("star.png");
    let mut command = kiln(&alone(folder.path()));
    command.args(["render", "a large red circle on a blue background", "--seed", "3", "--out"]).arg(&path);
    succeed(&mut command);
    let picture = image::open(&path).expect("a PNG").into_rgb8();
    assert_eq!(picture.dimensions(), (128, 128), "the demo checkpoint's native size");
    let [red, _, blue] = picture.get_pixel(64, 64).0;
    assert!(red > 150 && blue < 110, "the middle is red: {:?}", picture.get_pixel(64, 64));
    let [red, _, blue] = picture.get_pixel(4, 4).0;
    assert!(blue > 150 && red < 110, "the corner is blue: {:?}", picture.get_pixel(4, 4));
}

#[test]
fn render_makes_as_many_pictures_as_asked_for_and_the_same_ones_again() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let render = |out: &str, count: &str| -> Vec<Value> {
        let mut command = kiln(&alone(folder.path()));
        command.args(["render", "a ring", "--model"]).arg(tiny_checkpoint());
        command.args(["--steps", "3", "--seed", "7", "--count", count, "--json", "--out"]).arg(folder.path().join(out));
        let output = succeed(&mut command);
        let answer: Value = serde_json::from_slice(&output.stdout).expect("JSON on standard output");
        answer["images"].as_array().expect("a list of images").clone()
    };
    let (many, one) = (render("many", "3"), render("one", "1"));
    assert_eq!((many.len(), one.len()), (3, 1));
    let pixels =
        |image: &Value| image::open(image["path"].as_str().expect("a path")).expect("a PNG").into_rgb8().into_raw();
    assert_eq!(pixels(&many[0]), pixels(&one[0]), "a picture does not depend on its company");
    assert_ne!(pixels(&many[0]), pixels(&many[1]), "another seed is another picture");
}

#[test]
fn bad_input_is_answered_with_field_limit_and_value() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    for (arguments, expected) in [
        (vec!["--steps", "1000000000"], vec!["steps", "1000"]),
        (vec!["--width", "100"], vec!["width", "multiple of 8", "100"]),
        (vec!["--model", "no-such-model"], vec!["model", "no-such-model"]),
        (vec!["--sampler", "magic"], vec!["sampler", "dpmpp_2m", "magic"]),
        (vec!["--guidance", "-3"], vec!["guidance", "-3"]),
    ] {
        let mut command = kiln(&alone(folder.path()));
        command.args(["render", "a ring"]).args(&arguments).arg("--out").arg(folder.path().join("x.png"));
        let complaint = complain(&mut command);
        for word in expected {
            assert!(complaint.contains(word), "{arguments:?} must be answered with `{word}`: {complaint}");
        }
        assert!(!folder.path().join("x.png").exists(), "nothing is written for {arguments:?}");
    }
}

/// Writes a JSON Lines file of `count` jobs.
fn jobs_file(folder: &Path, count: usize) -> std::path::PathBuf {
    let path = folder.join("jobs.jsonl");
    let mut file = std::fs::File::create(&path).expect("a file");
    for seed in 0..count {
        writeln!(
            file,
            r#"{{"model": "demo", "prompt": "a green cross on a pink background", "steps": 4, "seed": {seed}}}"#
        )
        .expect("a line");
    }
    path
}

#[tokio::test(flavor = "multi_thread")]
async fn submit_waits_through_a_restart_of_the_scheduler_and_fetch_brings_every_picture() {
    let mut farm = Farm::start(services().await, 1).await;
    let folder = tempfile::tempdir().expect("a temporary folder");
    let file = jobs_file(folder.path(), 150);
    let api = farm.client.base().to_owned();

    let log = folder.path().join("submit.log");
    let mut command = kiln(&farm.environment);
    command.args(["submit", "--wait", "--json", "--api", &api]).arg(&file);
    let mut submit = Process::start(command, &log);
    let submission = crate::support::eventually("the submission is there", Duration::from_secs(60), || async {
        let page = farm.client.get("/v1/submissions").await;
        page["submissions"][0]["submission_id"].as_str().map(str::to_owned)
    })
    .await;
    farm.wait_for(&submission, "done", 10, Duration::from_secs(120)).await;
    farm.restart_scheduler().await;
    farm.wait_for(&submission, "done", 150, Duration::from_secs(300)).await;
    audit(&farm, &submission, 150).await;
    crate::support::eventually("submit --wait ends", Duration::from_secs(60), || {
        let ended = !submit.is_running();
        async move { ended.then_some(()) }
    })
    .await;
    assert!(submit.log().contains(&submission), "it names the submission:\n{}", submit.log());

    let out = folder.path().join("pictures");
    let mut command = kiln(&farm.environment);
    command.args(["fetch", &submission, "--api", &api, "--out"]).arg(&out);
    tokio::task::spawn_blocking(move || succeed(&mut command)).await.expect("fetch ends");
    let pictures = std::fs::read_dir(&out).expect("the folder").filter(|entry| {
        entry.as_ref().is_ok_and(|entry| entry.path().extension().is_some_and(|extension| extension == "png"))
    });
    assert_eq!(pictures.count(), 150, "one picture each");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_with_a_bad_line_is_rejected_whole() {
    let farm = Farm::start(services().await, 0).await;
    let folder = tempfile::tempdir().expect("a temporary folder");
    let file = jobs_file(folder.path(), 50_000);
    let text = std::fs::read_to_string(&file).expect("the file");
    let mut lines: Vec<&str> = text.lines().collect();
    lines[48_212] = r#"{"prompt": "a ring", "steps": }"#;
    std::fs::write(&file, lines.join("\n")).expect("the file can be written");
    let mut command = kiln(&farm.environment);
    command.args(["submit", "--api", farm.client.base()]).arg(&file);
    let complaint = tokio::task::spawn_blocking(move || complain(&mut command)).await.expect("submit ends");
    assert!(complaint.contains("48213") || complaint.contains("48,213"), "the line is named: {complaint}");
    let page = farm.client.get("/v1/submissions").await;
    assert_eq!(page["submissions"], serde_json::json!([]), "nothing was stored");
}
