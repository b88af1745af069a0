//! Broken checkpoints: the error names the file and what is wrong with it.

use std::collections::HashMap;
use std::path::Path;

use candle_core::{DType, Device, Tensor, safetensors};
use engine::{Checkpoint, Error, Precision, render};
use serde_json::{Value, json};

use crate::support::{checkpoint, copy_of, cpu, request};

const UNET: &str = "unet/diffusion_pytorch_model.safetensors";
const VAE: &str = "vae/diffusion_pytorch_model.safetensors";

fn refusal(folder: &Path) -> String {
    let error = Checkpoint::load(folder, &cpu(), Precision::F32).err().expect("a broken checkpoint was loaded");
    assert!(matches!(error, Error::Checkpoint { .. }), "{error}");
    error.to_string()
}

/// Loads a tensor file, changes it, writes it back.
fn change_tensors(folder: &Path, file: &str, change: impl FnOnce(&mut HashMap<String, Tensor>)) {
    let path = folder.join(file);
    let mut tensors = safetensors::load(&path, &Device::Cpu).unwrap();
    change(&mut tensors);
    safetensors::save(&tensors, &path).unwrap();
}

fn change_config(folder: &Path, file: &str, field: &str, value: Value) {
    let path = folder.join(file);
    let mut config: Value = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
    config[field] = value;
    std::fs::write(&path, config.to_string()).unwrap();
}

#[test]
fn missing_tensors_are_named() {
    let folder = copy_of("sd1");
    change_tensors(folder.path(), UNET, |tensors| {
        tensors.remove("mid_block.attentions.0.proj_in.weight").unwrap();
        tensors.remove("conv_out.bias").unwrap();
    });
    let text = refusal(folder.path());
    assert!(text.contains("/unet: missing tensors: "), "{text}");
    assert!(text.contains("mid_block.attentions.0.proj_in.weight") && text.contains("conv_out.bias"), "{text}");
}

#[test]
fn extra_tensors_are_named() {
    let folder = copy_of("sd1");
    change_tensors(folder.path(), "text_encoder/model.safetensors", |tensors| {
        tensors.insert("text_model.adapter.weight".to_owned(), Tensor::zeros(3, DType::F32, &Device::Cpu).unwrap());
    });
    let text = refusal(folder.path());
    assert!(
        text.ends_with("/text_encoder: tensors that this model does not have: text_model.adapter.weight"),
        "{text}"
    );
}

#[test]
fn misshapen_tensors_are_named_with_both_shapes() {
    let folder = copy_of("one_layer");
    change_tensors(folder.path(), VAE, |tensors| {
        tensors.insert("decoder.conv_in.bias".to_owned(), Tensor::zeros(5, DType::F32, &Device::Cpu).unwrap());
    });
    let text = refusal(folder.path());
    assert!(text.contains("decoder.conv_in.bias [5] instead of [8]"), "{text}");
}

#[test]
fn a_config_of_another_size_names_the_tensors_that_do_not_fit() {
    let folder = copy_of("sd1");
    change_config(folder.path(), "text_encoder/config.json", "intermediate_size", json!(128));
    let text = refusal(folder.path());
    assert!(text.contains("mlp.fc1.weight [64, 24] instead of [128, 24]"), "{text}");
}

#[test]
fn a_truncated_file_is_named() {
    let folder = copy_of("sd1");
    let path = folder.path().join(UNET);
    let bytes = std::fs::read(&path).unwrap();
    for keep in [0, 7, 100, bytes.len() / 2] {
        std::fs::write(&path, &bytes[..keep]).unwrap();
        let text = refusal(folder.path());
        assert!(text.contains("diffusion_pytorch_model.safetensors: "), "{text}");
    }
}

#[test]
fn wrong_json_is_named_with_its_place() {
    for file in [
        "model_index.json",
        "unet/config.json",
        "vae/config.json",
        "text_encoder/config.json",
        "scheduler/scheduler_config.json",
    ] {
        let folder = copy_of("sd2");
        let path = folder.path().join(file);
        std::fs::write(&path, "{\"block_out_channels\": [8,").unwrap();
        let text = refusal(folder.path());
        assert!(text.starts_with(&path.display().to_string()) && text.contains("JSON"), "{text}");
        std::fs::write(&path, "[]").unwrap();
        assert!(refusal(folder.path()).starts_with(&path.display().to_string()));
        std::fs::remove_file(&path).unwrap();
        refusal(folder.path());
    }
}

#[test]
fn options_that_change_the_maths_are_refused_by_name_and_value() {
    let cases = [
        ("unet/config.json", "class_embed_type", json!("timestep")),
        ("unet/config.json", "addition_embed_type", json!("image")),
        ("unet/config.json", "resnet_time_scale_shift", json!("scale_shift")),
        ("unet/config.json", "mid_block_type", json!("UNetMidBlock2DSimpleCrossAttn")),
        (
            "unet/config.json",
            "down_block_types",
            json!(["AttnDownBlock2D", "DownBlock2D", "DownBlock2D", "DownBlock2D"]),
        ),
        ("unet/config.json", "attention_head_dim", json!(3)),
        ("unet/config.json", "norm_num_groups", json!(5)),
        ("unet/config.json", "cross_attention_dim", json!("wide")),
        ("vae/config.json", "latents_mean", json!([0.1, 0.2, 0.3, 0.4])),
        ("vae/config.json", "up_block_types", json!(["AttnUpDecoderBlock2D"])),
        ("text_encoder/config.json", "hidden_act", json!("relu")),
        ("text_encoder/config.json", "num_attention_heads", json!(7)),
        ("scheduler/scheduler_config.json", "_class_name", json!("DiceScheduler")),
        ("model_index.json", "_class_name", json!("KandinskyPipeline")),
    ];
    for (file, field, value) in cases {
        let folder = copy_of("sd1");
        change_config(folder.path(), file, field, value);
        let text = refusal(folder.path());
        assert!(text.contains(field), "{field}: {text}");
    }
}

#[test]
fn a_u_net_that_is_told_other_things_than_its_family_is_refused() {
    let folder = copy_of("sdxl");
    change_config(folder.path(), "unet/config.json", "addition_embed_type", json!(null));
    assert!(refusal(folder.path()).contains("tensors that this model does not have: add_embedding.linear_1.bias"));

    let folder = copy_of("sdxl");
    change_config(folder.path(), "unet/config.json", "addition_time_embed_dim", json!(4));
    let text = refusal(folder.path());
    assert!(
        text.contains("`projection_class_embeddings_input_dim` must be") && text.ends_with("(44), but is 68"),
        "{text}"
    );

    let folder = copy_of("sdxl");
    change_config(folder.path(), "model_index.json", "_class_name", json!("StableDiffusionPipeline"));
    assert!(refusal(folder.path()).contains("`addition_embed_type` must be null for Stable Diffusion 1.x and 2.x"));

    let folder = copy_of("sdxl");
    std::fs::remove_dir_all(folder.path().join("text_encoder_2")).unwrap();
    assert!(refusal(folder.path()).contains("text_encoder_2"));
}

#[test]
fn parts_that_do_not_fit_together_are_refused() {
    let folder = copy_of("sd1");
    std::fs::remove_dir_all(folder.path().join("text_encoder")).unwrap();
    let other = copy_of("sd2");
    std::fs::rename(other.path().join("text_encoder"), folder.path().join("text_encoder")).unwrap();
    let text = refusal(folder.path());
    assert!(text.contains("`cross_attention_dim` must be the text encoder's `hidden_size` (32), but is 24"), "{text}");
}

#[test]
fn a_denoiser_of_other_latents_is_refused_by_its_channels() {
    let folder = copy_of("sd1");
    change_config(folder.path(), "unet/config.json", "in_channels", json!(5));
    change_tensors(folder.path(), UNET, |tensors| {
        let wide = Tensor::zeros((8, 5, 3, 3), DType::F16, &Device::Cpu).unwrap();
        tensors.insert("conv_in.weight".to_owned(), wide).unwrap();
    });
    let text = refusal(folder.path());
    assert!(text.ends_with("`in_channels` must be the VAE's `latent_channels` (4), but is 5"), "{text}");
}

#[test]
fn a_folder_of_something_else_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    assert!(refusal(folder.path()).ends_with("is not a diffusers folder: it has no `model_index.json`"));
    assert!(refusal(&folder.path().join("absent")).contains("absent: is not a diffusers folder"));
}

#[test]
fn variants_and_shards_load_as_the_plain_file_does() {
    let expected = render(&checkpoint("sd1"), &request("a star"), |_, _| {}).unwrap();
    let folder = copy_of("sd1");
    let (unet, vae) = (folder.path().join(UNET), folder.path().join(VAE));
    std::fs::rename(&vae, vae.with_file_name("diffusion_pytorch_model.fp16.safetensors")).unwrap();

    let mut tensors: Vec<(String, Tensor)> = safetensors::load(&unet, &Device::Cpu).unwrap().into_iter().collect();
    tensors.sort_by(|a, b| a.0.cmp(&b.0));
    std::fs::remove_file(&unet).unwrap();
    let mut map = serde_json::Map::new();
    for (shard, part) in tensors.chunks(tensors.len() / 2 + 1).enumerate() {
        let name = format!("diffusion_pytorch_model-0000{}-of-00002.safetensors", shard + 1);
        map.extend(part.iter().map(|(tensor, _)| (tensor.clone(), json!(name))));
        safetensors::save(&part.iter().cloned().collect(), unet.with_file_name(name)).unwrap();
    }
    let index = unet.with_file_name("diffusion_pytorch_model.safetensors.index.json");
    std::fs::write(index, json!({"metadata": {}, "weight_map": map}).to_string()).unwrap();

    let changed = std::sync::Arc::new(Checkpoint::load(folder.path(), &cpu(), Precision::F32).unwrap());
    assert!(expected == render(&changed, &request("a star"), |_, _| {}).unwrap());
}
