//! FLUX: whole pictures against diffusers', mixed batches, and what it refuses.

use std::sync::Arc;

use engine::{Checkpoint, Error, LoadOptions, Precision, RowRequest, RunningBatch, render};

use crate::company::{alone, in_company};
use crate::golden;
use crate::support::{checkpoint, copy_of, cpu, fixtures, folder, request};

const CHECKPOINTS: [&str; 2] = ["flux_dev", "flux_schnell"];

/// How far a checkpoint's pictures are from diffusers' at most, and how many there are.
fn worst(name: &str, checkpoint: &Arc<Checkpoint>) -> (u8, usize) {
    let goldens = golden::read(&fixtures().join("flux_pictures.json"));
    let mut worst = (0, 0);
    for golden in goldens.iter().filter(|golden| golden.checkpoint == name) {
        worst = (golden.difference(checkpoint).max(worst.0), worst.1 + 1);
    }
    println!("{name}: {worst:?}");
    worst
}

#[test]
fn every_picture_is_at_most_one_level_off_diffusers() {
    for name in CHECKPOINTS {
        let (difference, count) = worst(name, &checkpoint(name));
        assert!(difference <= 1 && count >= 3, "{name}: {count} pictures are up to {difference} off");
    }
}

/// `flux_dev` with a GGUF file in the place of a part's weights.
pub fn with_gguf(parts: &[(&str, &str)]) -> tempfile::TempDir {
    let checkpoint = copy_of("flux_dev");
    for (part, file) in parts {
        let place = checkpoint.path().join(part);
        for entry in std::fs::read_dir(&place).unwrap() {
            let path = entry.unwrap().path();
            if path.extension().is_some_and(|end| end == "safetensors") {
                std::fs::remove_file(path).unwrap();
            }
        }
        std::fs::copy(folder("flux_gguf").join(file), place.join(file)).unwrap();
    }
    checkpoint
}

pub const TRANSFORMER: (&str, &str) = ("transformer", "flux1-tiny-Q4_K_S.gguf");
pub const T5: (&str, &str) = ("text_encoder_2", "t5-tiny-encoder-Q5_K_M.gguf");

#[test]
fn pictures_of_gguf_files_are_those_of_the_numbers_in_them() {
    let checkpoint = with_gguf(&[TRANSFORMER, T5]);
    let model = Arc::new(Checkpoint::load(checkpoint.path(), &cpu(), Precision::F32).unwrap());
    let (difference, count) = worst("flux_gguf", &model);
    assert!(difference <= 1 && count >= 2, "{count} pictures are up to {difference} off");
    rows_equal_rows_alone(&model, "flux_gguf");
    let half = Checkpoint::load(checkpoint.path(), &cpu(), Precision::Bf16).unwrap();
    rows_equal_rows_alone(&Arc::new(half), "flux_gguf");
}

#[test]
fn a_gguf_file_alone_takes_its_other_parts_from_beside_it() {
    let (file, beside) = (folder("flux_gguf").join(TRANSFORMER.1), folder("flux_dev"));
    let alone = Checkpoint::load_with(
        &file,
        &cpu(),
        Precision::F32,
        LoadOptions { beside: Some(&beside), ..Default::default() },
    )
    .unwrap();
    let checkpoint = with_gguf(&[TRANSFORMER]);
    let within = Checkpoint::load(checkpoint.path(), &cpu(), Precision::F32).unwrap();
    let picture = |model| render(&Arc::new(model), &request("a small red star"), |_, _| {}).unwrap();
    assert!(picture(alone) == picture(within));
}

#[test]
fn a_gguf_file_cut_anywhere_is_refused_by_its_name() {
    let checkpoint = with_gguf(&[TRANSFORMER]);
    let path = checkpoint.path().join("transformer").join(TRANSFORMER.1);
    let bytes = std::fs::read(&path).unwrap();
    for keep in [0, 3, 20, 500, bytes.len() / 2, bytes.len() - 1] {
        std::fs::write(&path, &bytes[..keep]).unwrap();
        let error = Checkpoint::load(checkpoint.path(), &cpu(), Precision::F32).err().unwrap().to_string();
        assert!(error.contains(TRANSFORMER.1), "{keep} bytes: {error}");
    }
}

/// Rows of one size that differ in everything else.
fn rows() -> Vec<RowRequest> {
    let base = |prompt: &str, steps, guidance_scale, seed| {
        let (width, height) = (64, 48);
        RowRequest { width, height, steps, guidance_scale, seed, ..request(prompt) }
    };
    vec![
        base("a small red star on a blue background", 6, 3.5, 1),
        RowRequest { true_cfg_scale: Some(2.0), ..base("a green ring", 3, 1.0, 2) },
        RowRequest { max_sequence_length: Some(40), ..base("", 7, 0.0, 3) },
        RowRequest {
            true_cfg_scale: Some(4.5),
            negative_prompt: "a black square".to_owned(),
            ..base("a white diamond", 5, 10.0, 4)
        },
    ]
}

fn rows_equal_rows_alone(model: &Arc<Checkpoint>, what: &str) {
    let finished = in_company(model, &rows(), |_| true);
    for (id, request) in (0..).zip(&rows()) {
        assert!(finished[&id].1 == alone(model, id, request), "{what}: row {id} differs from the row alone");
    }
}

#[test]
fn a_row_of_a_mixed_batch_equals_the_row_alone_bit_for_bit() {
    for name in CHECKPOINTS {
        rows_equal_rows_alone(&checkpoint(name), name);
        let half = Checkpoint::load(&folder(name), &cpu(), Precision::Bf16).unwrap();
        rows_equal_rows_alone(&Arc::new(half), name);
    }
}

#[test]
fn a_request_that_flux_cannot_serve_is_refused_by_field_limit_and_value() {
    let mut batch = RunningBatch::new(checkpoint("flux_dev"), 64, 64);
    let mut refusal = |request: RowRequest| {
        let error = batch.join(1, &request).unwrap_err();
        assert!(matches!(error, Error::Request { .. }), "{error}");
        error.to_string()
    };
    let asked = || request("a star");
    // Four pixels to a latent value, and two of those to a patch.
    assert!(refusal(RowRequest { width: 60, ..asked() }).starts_with("`width` must be a multiple of 8 from 8"));
    for true_cfg_scale in [-1.0, f64::NAN, f64::INFINITY] {
        let text = refusal(RowRequest { true_cfg_scale: Some(true_cfg_scale), ..asked() });
        assert!(text.starts_with("`true_cfg_scale` must be a finite number of at least 0, but is"), "{text}");
    }
    let text = refusal(RowRequest { max_sequence_length: Some(513), ..asked() });
    assert_eq!(text, "`max_sequence_length` must be 1 to 512, but is 513");
    let text = refusal(RowRequest { sampler: Some("ddim".parse().unwrap()), ..asked() });
    assert!(text.starts_with("`sampler` must be"), "{text}");
}

#[test]
fn parts_that_do_not_fit_together_are_named() {
    for (part, field) in [("text_encoder", "pooled_projection_dim"), ("vae", "in_channels")] {
        let broken = copy_of("flux_dev");
        let place = broken.path().join(part);
        std::fs::remove_dir_all(&place).unwrap();
        std::fs::create_dir(&place).unwrap();
        for entry in std::fs::read_dir(folder("sd2").join(part)).unwrap() {
            let entry = entry.unwrap();
            std::fs::copy(entry.path(), place.join(entry.file_name())).unwrap();
        }
        let error = Checkpoint::load(broken.path(), &cpu(), Precision::F32).err().unwrap().to_string();
        assert!(error.contains("transformer/config.json") && error.contains(field), "{part}: {error}");
    }
}

#[test]
fn a_configuration_that_flux_does_not_have_is_refused_by_name() {
    for (field, value) in [
        ("axes_dims_rope", serde_json::json!([4, 14, 12])),
        ("axes_dims_rope", serde_json::json!([16, 16])),
        ("patch_size", serde_json::json!(2)),
        ("in_channels", serde_json::json!(63)),
    ] {
        let broken = copy_of("flux_dev");
        let path = broken.path().join("transformer/config.json");
        let mut config: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
        config[field] = value;
        std::fs::write(&path, config.to_string()).unwrap();
        let error = Checkpoint::load(broken.path(), &cpu(), Precision::F32).err().unwrap().to_string();
        assert!(error.contains("transformer/config.json") && error.contains(field), "{error}");
    }
}
