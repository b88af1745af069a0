//! Stable Diffusion 3: mixed batches, and what it refuses.

use std::sync::Arc;

use engine::{Checkpoint, Error, Precision, RowRequest, RunningBatch, SkipLayerGuidance};
use serde_json::{Value, json};

use crate::company::{alone, in_company};
use crate::support::{checkpoint, copy_of, cpu, request};

const CHECKPOINTS: [&str; 3] = ["sd3", "sd35_medium", "sd3_without_t5"];

/// Rows of one size that differ in everything else.
fn rows() -> Vec<RowRequest> {
    let base = |prompt: &str, steps, seed| RowRequest { width: 64, height: 48, steps, seed, ..request(prompt) };
    let skipping =
        |layers: &[usize]| SkipLayerGuidance { layers: layers.to_vec(), stop: 0.7, ..SkipLayerGuidance::default() };
    vec![
        base("a small red star on a blue background", 6, 1),
        RowRequest { guidance_scale: 1.0, max_sequence_length: Some(9), ..base("a green ring", 3, 2) },
        RowRequest { skip_layer_guidance: Some(skipping(&[1])), ..base("a pink heart left of a cyan cross", 7, 3) },
        RowRequest { schedule: Some("karras".parse().unwrap()), guidance_scale: 9.5, ..base("", 5, 4) },
        RowRequest {
            skip_layer_guidance: Some(skipping(&[0, 1])),
            negative_prompt: "a black square".to_owned(),
            ..base("a white diamond", 5, 5)
        },
    ]
}

#[test]
fn a_row_of_a_mixed_batch_equals_the_row_alone_bit_for_bit() {
    for name in CHECKPOINTS {
        for precision in [Precision::F32, Precision::Bf16] {
            let model = match precision {
                Precision::F32 => checkpoint(name),
                other => Arc::new(Checkpoint::load(&crate::support::folder(name), &cpu(), other).unwrap()),
            };
            let finished = in_company(&model, &rows(), |_| true);
            for (id, request) in (0..).zip(&rows()) {
                let same = finished[&id].1 == alone(&model, id, request);
                assert!(same, "{name} {precision}: row {id} differs from the row alone");
            }
        }
    }
}

fn refusal(checkpoint_name: &str, request: &RowRequest) -> String {
    let mut batch = RunningBatch::new(checkpoint(checkpoint_name), request.width, request.height);
    let error = batch.join(1, request).unwrap_err();
    assert!(matches!(error, Error::Request { .. }), "{error}");
    error.to_string()
}

#[test]
fn what_the_family_cannot_do_is_refused_by_name() {
    let sampled = RowRequest { sampler: Some("euler".parse().unwrap()), ..request("a star") };
    assert_eq!(
        refusal("sd3", &sampled),
        "`sampler` must be flow_match_euler for this checkpoint, which names `FlowMatchEulerDiscreteScheduler`, but is euler"
    );
    let sized = |width, height| RowRequest { width, height, ..request("a star") };
    assert_eq!(refusal("sd3", &sized(72, 64)), "`width` must be a multiple of 16 from 16 to 16384, but is 72");
    assert_eq!(refusal("sd3", &sized(64, 160)), "`height` must be at most 144 for this checkpoint, but is 160");
    let long = RowRequest { max_sequence_length: Some(513), ..request("a star") };
    assert_eq!(refusal("sd3", &long), "`max_sequence_length` must be 1 to 512, but is 513");
    let skipping = |skipping| RowRequest { skip_layer_guidance: Some(skipping), ..request("a star") };
    let layers = |layers: &[usize]| SkipLayerGuidance { layers: layers.to_vec(), ..SkipLayerGuidance::default() };
    let limit = "`skip_layer_guidance.layers` must be some of this checkpoint's layers 0 to 2, but is";
    assert_eq!(refusal("sd3", &skipping(layers(&[1, 3]))), format!("{limit} [1, 3]"));
    assert_eq!(refusal("sd3", &skipping(layers(&[]))), format!("{limit} []"));
    let endless = SkipLayerGuidance { scale: f64::NAN, ..layers(&[1]) };
    assert_eq!(refusal("sd3", &skipping(endless)), "`skip_layer_guidance.scale` must be a finite number, but is NaN");
    let text = refusal("sd1", &skipping(layers(&[1])));
    assert_eq!(text, "`skip_layer_guidance.layers` must be absent for this checkpoint's family, but is [1]");
}

/// The error of a copy of `sd3` with a field of a configuration changed.
fn broken(file: &str, field: &str, value: Value) -> String {
    let folder = copy_of("sd3");
    let path = folder.path().join(file);
    let mut config: Value = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
    config[field] = value;
    std::fs::write(&path, config.to_string()).unwrap();
    let error = Checkpoint::load(folder.path(), &cpu(), Precision::F32).err().expect("a broken checkpoint was loaded");
    assert!(matches!(error, Error::Checkpoint { .. }), "{error}");
    error.to_string()
}

#[test]
fn parts_that_do_not_fit_together_are_refused_by_name() {
    for (file, field, value, named) in [
        ("transformer/config.json", "qk_norm", json!("layer_norm"), "`qk_norm` must be `rms_norm` or null"),
        (
            "transformer/config.json",
            "qk_norm",
            json!("rms_norm"),
            "missing tensors: transformer_blocks.0.attn.norm_q.weight",
        ),
        ("transformer/config.json", "dual_attention_layers", json!([0]), "transformer_blocks.0.attn2.to_q.weight"),
        (
            "transformer/config.json",
            "num_layers",
            json!(2),
            "norm1_context.linear.weight [192, 32] instead of [64, 32]",
        ),
        ("transformer/config.json", "joint_attention_dim", json!(48), "context_embedder.weight [32, 40] instead of"),
        (
            "text_encoder_3/config.json",
            "d_model",
            json!(48),
            "`joint_attention_dim` must be the `d_model` of `text_encoder_3` (48)",
        ),
        ("text_encoder_3/config.json", "vocab_size", json!(300), "shared.weight [240, 40] instead of [300, 40]"),
        ("text_encoder_3/config.json", "vocab_size", json!(32), "the text encoder only 32 embeddings"),
        ("vae/config.json", "latent_channels", json!(8), "another shape"),
    ] {
        let text = broken(file, field, value);
        assert!(text.contains(named), "{file} {field}: {text}");
    }
}

#[test]
fn a_folder_without_t5s_tokenizer_is_refused() {
    let folder = copy_of("sd3");
    std::fs::remove_file(folder.path().join("tokenizer_3/tokenizer.json")).unwrap();
    let error = Checkpoint::load(folder.path(), &cpu(), Precision::F32).err().unwrap().to_string();
    assert!(error.contains("tokenizer_3") && error.contains("neither `tokenizer.json` nor `spiece.model`"), "{error}");
}

#[test]
fn a_checkpoint_knows_its_size() {
    assert_eq!(checkpoint("sd3").native_size(), (96, 96));
    assert_eq!(checkpoint("sd3").side_multiple(), 16);
}
