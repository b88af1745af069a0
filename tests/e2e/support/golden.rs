//! Pictures that diffusers made, asked for as a client would.

use std::fmt::Display;
use std::path::PathBuf;

use image::RgbImage;
use serde_json::{Map, Value};

use super::repository;

/// What a request and its golden have in common; what a golden does not have is left out.
const FIELDS: [&str; 14] = [
    "prompt",
    "negative_prompt",
    "width",
    "height",
    "steps",
    "guidance_scale",
    "sampler",
    "schedule",
    "seed",
    "max_sequence_length",
    "true_cfg_scale",
    "skip_layer_guidance",
    "denoising_start",
    "denoising_end",
];

/// What they have in common of a request's `micro_conditioning`.
const SIZES: [&str; 3] = ["original_size", "crop", "target_size"];

fn fixtures() -> PathBuf {
    repository().join("engine/tests/fixtures")
}

/// A tiny checkpoint's folder.
pub fn checkpoint(name: &str) -> String {
    fixtures().join("checkpoints").join(name).display().to_string()
}

/// Tiny checkpoints under their own names, as `KILN_MODELS` has them.
pub fn models(names: &[&str]) -> String {
    names.iter().map(|name| format!("{name}={}", checkpoint(name))).collect::<Vec<_>>().join(",")
}

/// The goldens of a list.
pub fn list(file: &str) -> Vec<Value> {
    let list = std::fs::read_to_string(fixtures().join(file)).expect("a list of goldens");
    serde_json::from_str(&list).expect("JSON")
}

/// A golden's picture.
pub fn picture(file: &str) -> RgbImage {
    image::open(fixtures().join("pictures").join(file)).expect("a picture").into_rgb8()
}

/// A golden's request as a client would send it.
pub fn job(golden: &Value) -> Value {
    let common = |fields: &[&str]| -> Map<String, Value> {
        let present = fields.iter().filter(|field| !golden[**field].is_null());
        present.map(|field| ((*field).to_owned(), golden[*field].clone())).collect()
    };
    let (mut job, sizes) = (common(&FIELDS), common(&SIZES));
    job.insert("model".to_owned(), golden["checkpoint"].clone());
    if !sizes.is_empty() {
        job.insert("micro_conditioning".to_owned(), sizes.into());
    }
    job.into()
}

/// Holds a picture to diffusers': at most one level off at any pixel.
#[track_caller]
pub fn compare(got: &RgbImage, expected: &RgbImage, what: impl Display) {
    assert_eq!(got.dimensions(), expected.dimensions(), "{what}");
    let off = got.as_raw().iter().zip(expected.as_raw()).map(|(a, b)| a.abs_diff(*b)).max().expect("pixels");
    assert!(off <= 1, "{what} is off by {off}");
}
