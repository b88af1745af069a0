//! Every tensor of every layout against what diffusers' own converters make of the same file.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use flate2::Crc;
use half::f16;
use safetensors::Dtype;
use serde_json::Value;

use super::SingleFile;
use crate::FamilyKind;
use crate::denoiser::FluxTransformer;
use crate::ops::Place;
use crate::recipe::{Made, Recipe};
use crate::weights::Part;

const FILES: [(&str, FamilyKind); 8] = [
    ("sd1", FamilyKind::Sd1),
    ("sd2", FamilyKind::Sd2),
    ("sdxl", FamilyKind::Sdxl),
    ("sd3", FamilyKind::Sd3),
    ("sd35_medium", FamilyKind::Sd35Medium),
    ("sd35_large", FamilyKind::Sd35Large),
    ("flux_dev", FamilyKind::FluxDev),
    ("flux_schnell", FamilyKind::FluxSchnell),
];

fn open(name: &str, change: impl FnOnce(&mut BTreeMap<String, Made>)) -> SingleFile {
    let (_folder, path) = Recipe::read(name).write(change);
    SingleFile::open(&path).unwrap()
}

fn family(name: &str, change: impl FnOnce(&mut BTreeMap<String, Made>)) -> Option<FamilyKind> {
    open(name, change).family().unwrap()
}

fn crc(bytes: &[u8]) -> u32 {
    let mut crc = Crc::new();
    crc.update(bytes);
    crc.sum()
}

#[test]
fn every_tensor_has_our_name_and_the_bytes_that_diffusers_gives_it() {
    for (name, _) in FILES {
        let (recipe, file) = (Recipe::read(name), open(name, |_| {}));
        let parts: Vec<&str> = file.parts().map(|(part, _)| part).collect();
        assert_eq!(parts, recipe.parts.keys().collect::<Vec<_>>(), "{name}");
        for (part, expected) in &recipe.parts {
            let weights = file.weights(part, &Place::host()).unwrap();
            for (ours, (shape, sum)) in expected {
                let values = weights.root().parameter(ours, shape).unwrap().values().unwrap();
                let halves: Vec<u8> = values.iter().flat_map(|value| f16::from_f32(*value).to_le_bytes()).collect();
                let singles: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
                assert!([crc(&halves), crc(&singles)].contains(sum), "{name}: {part}: {ours}");
            }
            // What diffusers has no use for, we have not either.
            weights.finish(|ours| ours == "text_projection.weight" && name == "sd2").unwrap();
        }
    }
}

#[test]
fn configurations_say_what_diffusers_ones_say() {
    /// One number for all levels, or a list of them.
    fn alike(ours: &Value, theirs: &Value) -> bool {
        match (ours, theirs) {
            (Value::Array(ours), Value::Array(theirs)) => {
                ours.len() == theirs.len() && ours.iter().zip(theirs).all(|(ours, theirs)| alike(ours, theirs))
            }
            (Value::Array(ours), one) => !one.is_array() && ours.iter().all(|ours| alike(ours, one)),
            (ours, theirs) => ours == theirs || (ours.is_number() && ours.as_f64() == theirs.as_f64()),
        }
    }
    for (name, family) in FILES {
        let (recipe, file) = (Recipe::read(name), open(name, |_| {}));
        for (part, theirs) in &recipe.configs {
            let ours = file.config(part, family).unwrap().to_value();
            let mut compared = 0;
            for (field, ours) in ours.as_object().unwrap() {
                let Some(theirs) = theirs.get(field) else { continue };
                // transformers' own number where the published files have none.
                let unset = field == "projection_dim" && name != "sdxl";
                // A VAE that was never told stands as diffusers' default of no shift.
                let no_shift = field == "shift_factor" && theirs.is_null() && ours.as_f64() == Some(0.0);
                assert!(alike(ours, theirs) || unset || no_shift, "{name}: {part}: `{field}` {ours} {theirs}");
                compared += 1;
            }
            assert!(compared >= 9, "{name}: {part}: only {compared} fields compared");
        }
    }
}

#[test]
fn families_are_told_by_their_tensors() {
    for (name, expected) in FILES {
        assert_eq!(family(name, |_| {}), Some(expected), "{name}");
    }
}

#[test]
fn a_gguf_file_is_told_and_read_as_a_transformer() {
    let checkpoints = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/checkpoints");
    let file = Arc::new(SingleFile::open(&checkpoints.join("flux_gguf/flux1-tiny-Q4_K_S.gguf")).unwrap());
    assert_eq!(file.family().unwrap(), Some(FamilyKind::FluxDev));
    let beside = Some(checkpoints.join("flux_dev/transformer"));
    let part = Part::Within { file, name: "transformer", family: FamilyKind::FluxDev, beside };
    let (ours, theirs) =
        (part.config().unwrap().to_value(), std::fs::read(checkpoints.join("flux_dev/transformer/config.json")));
    let theirs: Value = serde_json::from_slice(&theirs.unwrap()).unwrap();
    for (field, ours) in ours.as_object().unwrap() {
        assert_eq!(*ours, theirs[field], "{field}");
    }
    assert!(FluxTransformer::load(part, &Place::host()).is_ok());
}

/// Replaces a tensor by zeros of another shape.
fn widen(tensors: &mut BTreeMap<String, Made>, name: &str, axis: usize, dim: usize) {
    let (dtype, mut shape, _) = tensors[name].clone();
    shape[axis] = dim;
    let bytes = vec![0; 2 * shape.iter().product::<usize>()];
    tensors.insert(name.to_owned(), (dtype, shape, bytes)).unwrap();
}

#[test]
fn siblings_are_told_by_channels_encoders_and_marks() {
    const CONV_IN: &str = "model.diffusion_model.input_blocks.0.0.weight";
    let inpaint = |tensors: &mut BTreeMap<String, Made>| widen(tensors, CONV_IN, 1, 9);
    assert_eq!(family("sd1", inpaint), Some(FamilyKind::Sd1Inpaint));
    assert_eq!(family("sd2", inpaint), Some(FamilyKind::Sd2Inpaint));
    assert_eq!(family("sdxl", inpaint), Some(FamilyKind::SdxlInpaint));
    let steps = |count: i64| (Dtype::I64, vec![], count.to_le_bytes().to_vec());
    let with_steps = |count: i64| family("sd2", |tensors| drop(tensors.insert("global_step".into(), steps(count))));
    assert_eq!(with_steps(875_000), Some(FamilyKind::Sd2Base));
    assert_eq!(with_steps(140_000), Some(FamilyKind::Sd2));
    let refiner = |tensors: &mut BTreeMap<String, Made>| {
        tensors.retain(|name, _| !name.starts_with("conditioner.embedders.0."));
        let moved: Vec<String> =
            tensors.keys().filter(|name| name.starts_with("conditioner.embedders.1.")).cloned().collect();
        for name in moved {
            let made = tensors.remove(&name).unwrap();
            tensors.insert(name.replace("embedders.1", "embedders.0"), made);
        }
    };
    assert_eq!(family("sdxl", refiner), Some(FamilyKind::SdxlRefiner));
    let no_encoders = |tensors: &mut BTreeMap<String, Made>| tensors.retain(|name, _| !name.starts_with("cond"));
    assert_eq!(family("sd1", no_encoders), Some(FamilyKind::Sd1));
    assert_eq!(family("sd2", no_encoders), Some(FamilyKind::Sd2));
    assert_eq!(family("sdxl", no_encoders), Some(FamilyKind::Sdxl));
    let no_denoiser = |tensors: &mut BTreeMap<String, Made>| tensors.retain(|name, _| !name.starts_with("model."));
    assert_eq!(family("sd1", no_denoiser), None);
}

#[test]
fn marks_in_the_file_overrule_what_the_denoiser_predicts() {
    let scheduler = |marks: &[&str]| {
        let mark = |tensors: &mut BTreeMap<String, Made>| {
            for mark in marks {
                tensors.insert((*mark).to_owned(), (Dtype::F32, vec![0], Vec::new()));
            }
        };
        open("sdxl", mark).scheduler(FamilyKind::Sdxl).unwrap().to_value()
    };
    assert_eq!(scheduler(&[])["prediction_type"], "epsilon");
    assert_eq!(scheduler(&[])["rescale_betas_zero_snr"], Value::Null);
    let marked = scheduler(&["v_pred", "ztsnr"]);
    assert_eq!(marked["prediction_type"], "v_prediction");
    assert_eq!((&marked["rescale_betas_zero_snr"], &marked["timestep_spacing"]), (&true.into(), &"trailing".into()));
}

#[test]
fn parts_are_found_without_a_prefix_too() {
    let vae = open("sd1", |tensors| {
        *tensors = std::mem::take(tensors)
            .into_iter()
            .filter_map(|(name, made)| Some((name.strip_prefix("first_stage_model.")?.to_owned(), made)))
            .collect();
    });
    assert_eq!(vae.parts().collect::<Vec<_>>(), [("vae", "")]);
    let expected = Recipe::read("sd1").parts["vae"].len();
    let weights = vae.weights("vae", &Place::host()).unwrap();
    assert_eq!(weights.stored.len(), expected);
}

#[test]
fn a_file_of_something_else_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path: PathBuf = folder.path().join("lora.safetensors");
    candle_core::safetensors::save(
        &std::collections::HashMap::from([(
            "lora_unet_down.alpha",
            candle_core::Tensor::new(1f32, &candle_core::Device::Cpu).unwrap(),
        )]),
        &path,
    )
    .unwrap();
    let error = SingleFile::open(&path).err().unwrap().to_string();
    assert!(error.contains("lora.safetensors") && error.contains("no checkpoint of a known layout"), "{error}");
}

#[test]
fn tensors_that_cannot_be_cut_and_uneven_levels_are_refused_by_name() {
    let qkv = "cond_stage_model.model.transformer.resblocks.0.attn.in_proj_bias";
    let file = open("sd2", |tensors| widen(tensors, qkv, 0, 100));
    let error = file.weights("text_encoder", &Place::host()).err().unwrap().to_string();
    assert!(error.contains("attn.in_proj_bias") && error.contains("[100]"), "{error}");
    let gone = "model.diffusion_model.input_blocks.2.0.op.weight";
    let file = open("sd2", |tensors| drop(tensors.remove(gone)));
    let error = file.config("unet", FamilyKind::Sd2).err().unwrap().to_string();
    assert!(error.contains("sd2.safetensors/unet") && error.contains("6 input blocks"), "{error}");
}

#[test]
fn a_tensor_without_a_place_keeps_its_name_for_the_error() {
    let odd = "model.diffusion_model.input_blocks.1.0.in_layers.7.weight";
    let file = open("sd1", |tensors| drop(tensors.insert(odd.into(), (Dtype::F16, vec![1], vec![0, 0]))));
    let weights = file.weights("unet", &Place::host()).unwrap();
    let error = weights.finish(|name| name != "input_blocks.1.0.in_layers.7.weight").unwrap_err().to_string();
    assert!(error.ends_with("this model does not have: input_blocks.1.0.in_layers.7.weight"), "{error}");
}
