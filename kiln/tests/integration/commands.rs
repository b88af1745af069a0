//! The commands that need no farm, as a user types them.

use std::path::Path;
use std::process::{Command, Output};

/// `kiln` with no configuration but what the test says.
fn kiln(home: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kiln"));
    command.env_clear().env("HOME", home).env("PATH", "/usr/bin:/bin").current_dir(home);
    command
}

fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn config_prints_what_is_in_force_without_secrets() {
    let home = tempfile::tempdir().unwrap();
    std::fs::write(home.path().join("kiln.toml"), "[worker]\nmax_batch = 3\n").unwrap();
    let output = kiln(home.path())
        .arg("config")
        .env("KILN_STORE_URL", "postgres://ann:hunter2@db/kiln")
        .env("KILN_WORKER_WINDOW", "7")
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    let text = stdout(&output);
    for line in ["max_batch = 3", "window = 7", "postgres://ann:***@db/kiln", "# from kiln.toml"] {
        assert!(text.contains(line), "{line}: {text}");
    }
    assert!(!text.contains("hunter2"));
    assert!(toml::from_str::<farm::config::Config>(&text).is_ok(), "what it prints can be read");
}

#[test]
fn config_lists_every_variable() {
    let home = tempfile::tempdir().unwrap();
    let text = stdout(&kiln(home.path()).args(["config", "--variables"]).output().unwrap());
    assert!(text.contains("KILN_WORKER_MAX_BATCH") && text.contains("a whole number"), "{text}");
}

#[test]
fn a_wrong_variable_ends_with_its_name_and_what_it_must_be() {
    let home = tempfile::tempdir().unwrap();
    let output = kiln(home.path()).arg("config").env("KILN_WORKER_MAX_BATCH", "lots").output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(stderr(&output), "kiln: the variable KILN_WORKER_MAX_BATCH must be a whole number, but is `lots`\n");
}

#[test]
fn a_misspelt_variable_is_pointed_out() {
    let home = tempfile::tempdir().unwrap();
    let output = kiln(home.path()).arg("config").env("KILN_WORKER_MAXBATCH", "4").output().unwrap();
    assert!(output.status.success());
    assert!(stderr(&output).contains("did you mean KILN_WORKER_MAX_BATCH?"), "{}", stderr(&output));
}

#[test]
fn models_lists_the_demo_checkpoint_and_the_configured_ones() {
    let home = tempfile::tempdir().unwrap();
    let output = kiln(home.path()).arg("models").env("KILN_MODELS", "mine=org/mine").output().unwrap();
    let text = stdout(&output);
    assert!(text.contains("demo (default)") && text.contains("128x128"), "{text}{}", stderr(&output));
    assert!(text.contains("mine") && text.contains("org/mine"), "{text}");
}

#[test]
fn models_inspect_tells_what_a_folder_is_and_refuses_a_pickle() {
    let home = tempfile::tempdir().unwrap();
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../engine/tests/fixtures/checkpoints/sd2");
    let output = kiln(home.path()).args(["models", "inspect", folder, "--json", "--tensors"]).output().unwrap();
    let report: serde_json::Value =
        serde_json::from_str(&stdout(&output)).unwrap_or_else(|_| panic!("{}", stderr(&output)));
    assert_eq!((&report["family"], &report["layout"]), (&"sd2".into(), &"diffusers".into()));
    let file = &report["files"][1];
    let hash = file["sha256"].as_str().unwrap();
    assert!(hash.len() == 64 && hash.starts_with(file["autov2"].as_str().unwrap()), "{hash}");
    assert_eq!(file["tensors"][0]["format"], "F16");
    let brief = kiln(home.path()).args(["models", "inspect", folder, "--json"]).output().unwrap();
    let brief: serde_json::Value = serde_json::from_str(&stdout(&brief)).unwrap();
    assert!(brief["files"][1].get("tensors").is_none() && brief["parts"][1]["tensors"].as_u64().unwrap() > 100);

    std::fs::write(home.path().join("old.ckpt"), b"PK").unwrap();
    let output = kiln(home.path()).args(["models", "inspect", "old.ckpt"]).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("can run code") && stderr(&output).contains("old.ckpt"), "{}", stderr(&output));
}

#[test]
fn key_prints_the_key_alone_on_standard_output_and_its_hash_beside() {
    let home = tempfile::tempdir().unwrap();
    let output = kiln(home.path()).args(["key", "ann"]).output().unwrap();
    let key = stdout(&output);
    assert!(key.starts_with("kiln_") && key.lines().count() == 1, "{key}");
    assert!(stderr(&output).contains("[api.key_hashes]\nann = \""), "{}", stderr(&output));
    assert!(!stderr(&output).contains(key.trim()));
}

#[test]
fn a_worker_of_its_own_refuses_embedded_ports_and_says_what_to_do() {
    let home = tempfile::tempdir().unwrap();
    for command in ["worker", "scheduler"] {
        let output = kiln(home.path()).arg(command).output().unwrap();
        assert_eq!(output.status.code(), Some(1));
        let text = stderr(&output);
        assert!(text.contains("KILN_STORE_URL") && text.contains("infra/services.sh up"), "{text}");
    }
}

#[test]
fn without_a_scheduler_a_client_says_how_to_start_one() {
    let home = tempfile::tempdir().unwrap();
    let output = kiln(home.path()).args(["status", "--api", "http://127.0.0.1:9"]).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("kiln up"), "{}", stderr(&output));
}

#[test]
fn without_certificates_a_client_speaks_to_addresses_that_need_none() {
    let home = tempfile::tempdir().unwrap();
    let complaint = |api: &str| {
        let mut command = kiln(home.path());
        command.args(["status", "--api", api]).env("SSL_CERT_FILE", "/missing").env("SSL_CERT_DIR", "/missing");
        stderr(&command.output().unwrap())
    };
    let plain = complaint("http://127.0.0.1:9");
    assert!(plain.contains("http://127.0.0.1:9") && !plain.contains("certificates"), "{plain}");
    let secure = complaint("https://127.0.0.1:9");
    assert!(secure.contains("certificates"), "{secure}");
}

#[test]
fn render_refuses_bad_input_before_it_loads_anything() {
    let home = tempfile::tempdir().unwrap();
    for (arguments, words) in [
        (["--steps", "1000000000"], ["`steps`", "1 to 1000"]),
        (["--width", "100"], ["`width`", "multiple of 8"]),
        (["--sampler", "magic"], ["`sampler`", "dpmpp_2m"]),
        (["--guidance", "-3"], ["`guidance_scale`", "-3"]),
        (["--model", "nothing"], ["--model", "demo"]),
        (["--seed", "-1"], ["`seed`", "-1"]),
        (["--out", "no/such/folder/x.png"], ["--out", "no/such/folder"]),
        (["--dtype", "f64"], ["worker.dtype", "bf16"]),
    ] {
        let output = kiln(home.path()).args(["render", "a ring"]).args(arguments).output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{arguments:?}");
        for word in words {
            assert!(stderr(&output).contains(word), "{arguments:?}: {word}: {}", stderr(&output));
        }
    }
}

#[test]
fn a_wrong_command_line_ends_with_status_2() {
    let home = tempfile::tempdir().unwrap();
    for arguments in [vec!["rendr"], vec!["render"], vec!["render", "x", "--count", "0"], vec!["submit"]] {
        assert_eq!(kiln(home.path()).args(&arguments).output().unwrap().status.code(), Some(2), "{arguments:?}");
    }
}
