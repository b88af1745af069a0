//! `kiln bench engine`, as a script uses it. What it measures is nobody's business here.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

fn demo() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../demo/model")
}

/// `kiln bench engine` with `arguments`, given `input` on standard input.
fn bench_engine(home: &Path, arguments: &[&str], input: &str) -> Output {
    let mut child = Command::new(env!("CARGO_BIN_EXE_kiln"))
        .args(["bench", "engine"])
        .args(arguments)
        .env_clear()
        .env("HOME", home)
        .current_dir(home)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // It may have ended already, with what is looked at below.
    let _refused = child.stdin.take().unwrap().write_all(input.as_bytes());
    child.wait_with_output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn its_help_shows_examples_and_every_part() {
    let home = tempfile::tempdir().unwrap();
    let output = bench_engine(home.path(), &["--help"], "");
    let help = text(&output.stdout);
    assert!(output.status.success(), "{}", text(&output.stderr));
    for words in ["Examples:", "--on-demand", "unet", "vae", "picture", "--cold", "ops", "load"] {
        assert!(help.contains(words), "{words}: {help}");
    }
}

#[test]
fn on_demand_it_is_ready_and_then_runs_once_for_each_line() {
    let home = tempfile::tempdir().unwrap();
    let (model, out) = (demo(), home.path().join("star.png"));
    let (model, out) = (model.to_str().unwrap(), out.to_str().unwrap());
    for part in ["unet", "vae", "picture"] {
        let arguments = [
            "--model",
            model,
            "--dtype",
            "bf16",
            "--on-demand",
            "--part",
            part,
            "--size",
            "64",
            "--steps",
            "2",
            "--out",
            out,
        ];
        let output = bench_engine(home.path(), &arguments, "run\nrun\n");
        assert!(output.status.success(), "{}", text(&output.stderr));
        let lines: Vec<serde_json::Value> =
            text(&output.stdout).lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(lines.len(), 3, "{lines:?}");
        assert_eq!((&lines[0]["ready"], &lines[0]["dtype"]), (&true.into(), &"bf16".into()));
        assert!(lines[1..].iter().all(|line| line["seconds"].as_f64().unwrap() > 0.0), "{lines:?}");
        assert_eq!(Path::new(out).exists(), part == "picture");
    }
}

#[test]
fn bad_input_is_answered_with_its_name_its_limit_and_its_value() {
    let home = tempfile::tempdir().unwrap();
    let model = demo();
    let model = model.to_str().unwrap();
    let refused = |arguments: &[&str], input: &str, words: &[&str]| {
        let output = bench_engine(home.path(), arguments, input);
        let error = text(&output.stderr);
        assert!(!output.status.success(), "{arguments:?}");
        for word in words {
            assert!(error.contains(word), "{word}: {error}");
        }
    };
    refused(&["--runs", "0"], "", &["--runs", "0 is not in 1.."]);
    refused(&["--on-demand"], "", &["--model"]);
    refused(&["--dtype", "f64"], "", &["worker.dtype", "f64"]);
    refused(&["--only", "load"], "", &["--model must name a checkpoint's folder", "missing"]);
    refused(&["--on-demand", "--model", model, "--size", "100"], "", &["`width` must be a multiple of", "100"]);
    refused(&["--on-demand", "--model", "nowhere"], "", &["nowhere", "model_index.json"]);
    refused(&["--on-demand", "--model", model], "walk\n", &["must be `run`, but is `walk`"]);
    let picture =
        ["--on-demand", "--model", model, "--part", "picture", "--steps", "1", "--size", "64", "--out", "no/where.png"];
    refused(&picture, "run\n", &["--out must be a PNG file", "no/where.png"]);
}
