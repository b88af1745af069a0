//! Checkpoints in one file: the pictures that diffusers renders with what its converters make of them.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use engine::{Checkpoint, Error, FamilyKind, LoadOptions, Precision, RowRequest, render};

use crate::recipe::{Made, Recipe, recipes};
use crate::support::{cpu, folder, request};

fn load(path: &Path) -> engine::Result<Arc<Checkpoint>> {
    Checkpoint::load(path, &cpu(), Precision::F32).map(Arc::new)
}

fn refusal(path: &Path, beside: Option<&Path>) -> String {
    let options = LoadOptions { beside, ..LoadOptions::default() };
    let error = Checkpoint::load_with(path, &cpu(), Precision::F32, options).err().expect("it was loaded");
    assert!(matches!(error, Error::Checkpoint { .. }), "{error}");
    error.to_string()
}

fn requests(recipe: &Recipe) -> Vec<(String, RowRequest)> {
    let number = |case: &serde_json::Value, field: &str| case[field].as_u64().unwrap();
    let word = |case: &serde_json::Value, field: &str| case[field].as_str().unwrap().to_owned();
    let asked = |case: &serde_json::Value| {
        let asked = RowRequest {
            negative_prompt: word(case, "negative_prompt"),
            width: number(case, "width") as usize,
            height: number(case, "height") as usize,
            steps: number(case, "steps") as usize,
            guidance_scale: case["guidance_scale"].as_f64().unwrap(),
            seed: number(case, "seed"),
            ..request(&word(case, "prompt"))
        };
        (word(case, "file"), asked)
    };
    recipe.pictures.iter().map(asked).collect()
}

#[test]
fn pictures_of_single_files_are_at_most_one_level_off_diffusers() {
    for name in ["sd1", "sd2", "sdxl", "sd35_medium"] {
        let recipe = Recipe::read(name);
        let (_folder, path) = recipe.write(|_| {});
        let checkpoint = load(&path).unwrap();
        let requests = requests(&recipe);
        assert!(requests.len() >= 2);
        for (file, request) in requests {
            let expected = image::open(recipes().join(&file)).unwrap().into_rgb8();
            let got = render(&checkpoint, &request, |_, _| {}).unwrap();
            assert_eq!(got.dimensions(), expected.dimensions());
            let off = got.as_raw().iter().zip(expected.as_raw()).map(|(a, b)| a.abs_diff(*b)).max().unwrap();
            assert!(off <= 1, "{file} is off by {off}");
        }
    }
}

/// The recipe's VAE as a diffusers folder: diffusers' names and configuration, and the tensors of the file
/// that have the bytes that diffusers gives them.
fn folder_with_vae(recipe: &Recipe) -> tempfile::TempDir {
    let crc = |bytes: &[u8]| {
        let mut crc = flate2::Crc::new();
        crc.update(bytes);
        crc.sum()
    };
    let by_sum: BTreeMap<u32, Made> = recipe.tensors().into_values().map(|made| (crc(&made.2), made)).collect();
    let views = recipe.parts["vae"].iter().map(|(name, (shape, sum))| {
        let (dtype, _, bytes) = &by_sum[sum];
        (name.as_str(), safetensors::tensor::TensorView::new(*dtype, shape.clone(), bytes).unwrap())
    });
    let folder = tempfile::tempdir().unwrap();
    std::fs::create_dir(folder.path().join("vae")).unwrap();
    let file = folder.path().join("vae/diffusion_pytorch_model.safetensors");
    safetensors::serialize_to_file(views, None, &file).unwrap();
    let mut config = recipe.configs["vae"].clone();
    config.insert("_class_name".to_owned(), "AutoencoderKL".into());
    let config = serde_json::to_string(&config).unwrap();
    std::fs::write(folder.path().join("vae/config.json"), config).unwrap();
    folder
}

#[test]
fn a_part_in_a_folder_beside_the_file_gives_the_picture_of_the_file_bit_for_bit() {
    let recipe = Recipe::read("sd1");
    let (_whole, whole) = recipe.write(|_| {});
    let (_folder, file) = recipe.write(|tensors| tensors.retain(|name, _| !name.starts_with("first_stage_model.")));
    let text = refusal(&file, None);
    assert!(text.contains("lacks `vae` of Stable Diffusion 1.x") && text.contains("`parts`"), "{text}");
    let text = refusal(&file, Some(&folder("sd1").join("unet")));
    assert!(text.contains("and so does"), "{text}");

    let beside = folder_with_vae(&recipe);
    let options = LoadOptions { beside: Some(beside.path()), ..LoadOptions::default() };
    let mixed = Checkpoint::load_with(&file, &cpu(), Precision::F32, options).map(Arc::new).unwrap();
    let whole = load(&whole).unwrap();
    for (_, request) in requests(&recipe) {
        assert!(render(&mixed, &request, |_, _| {}).unwrap() == render(&whole, &request, |_, _| {}).unwrap());
    }
}

#[test]
fn a_family_that_is_told_brings_its_scheduler_and_size() {
    let (_folder, path) = Recipe::read("sdxl").write(|_| {});
    let told = |family| engine::facts(&path, family).unwrap();
    assert_eq!((told(None).family, told(None).width, told(None).steps), (FamilyKind::Sdxl, 1024, 30));
    let turbo = told(Some(FamilyKind::SdxlTurbo));
    assert_eq!((turbo.width, turbo.steps, turbo.vae_factor), (512, 4, 4));
    let renamed = path.with_file_name("my_turbo_mix.safetensors");
    std::fs::rename(&path, &renamed).unwrap();
    assert_eq!(engine::facts(&renamed, None).unwrap().family, FamilyKind::SdxlTurbo);
}

#[test]
fn a_part_alone_and_a_broken_file_are_refused_by_name() {
    let recipe = Recipe::read("sd1");
    let (_folder, path) = recipe.write(|tensors| tensors.retain(|name, _| name.starts_with("first_stage_model.")));
    let text = refusal(&path, None);
    assert!(text.contains("holds `vae` and no denoiser"), "{text}");

    let (_folder, path) = recipe.write(|_| {});
    let bytes = std::fs::read(&path).unwrap();
    for keep in [0, 7, 100, bytes.len() / 2, bytes.len() - 1] {
        std::fs::write(&path, &bytes[..keep]).unwrap();
        let text = refusal(&path, None);
        assert!(text.contains("sd1.safetensors: ") && text.contains("complete"), "{text}");
    }
}

#[test]
fn a_pickle_is_refused_with_the_reason() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("v1-5-pruned.ckpt");
    std::fs::write(&path, b"PK\x03\x04").unwrap();
    let text = refusal(&path, None);
    assert!(text.contains("v1-5-pruned.ckpt") && text.contains("can run code"), "{text}");
}
