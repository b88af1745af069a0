//! Checkpoints to render with, and requests to start from.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock};

use engine::{
    Checkpoint, Device, DeviceChoice, InitContent, InitImage, Mask, MaskedContent, Precision, RowRequest, gray,
};
use image::RgbImage;

/// Every checkpoint that has goldens.
pub const CHECKPOINTS: [&str; 11] = [
    "sd1",
    "sd2",
    "one_layer",
    "bf16",
    "bare_tokenizer",
    "demo",
    "sdxl",
    "sdxl_turbo",
    "sd3",
    "sd35_medium",
    "sd3_without_t5",
];

/// Where the goldens and the tiny checkpoints are.
pub fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
}

/// A checkpoint's folder.
pub fn folder(checkpoint: &str) -> PathBuf {
    match checkpoint {
        "demo" => Path::new(env!("CARGO_MANIFEST_DIR")).join("../demo/model"),
        name => fixtures().join("checkpoints").join(name),
    }
}

/// The processor.
pub fn cpu() -> Device {
    Device::open(DeviceChoice::Cpu).unwrap()
}

/// A checkpoint in `f32`, loaded once for all tests.
pub fn checkpoint(name: &str) -> Arc<Checkpoint> {
    type Loaded = Arc<OnceLock<Arc<Checkpoint>>>;
    static LOADED: Mutex<BTreeMap<String, Loaded>> = Mutex::new(BTreeMap::new());
    let place = Arc::clone(LOADED.lock().unwrap().entry(name.to_owned()).or_default());
    let load = || Arc::new(Checkpoint::load(&folder(name), &cpu(), Precision::F32).unwrap());
    Arc::clone(place.get_or_init(load))
}

/// A small request that each test changes where it matters.
pub fn request(prompt: &str) -> RowRequest {
    RowRequest {
        prompt: prompt.to_owned(),
        width: 64,
        height: 64,
        steps: 4,
        guidance_scale: 5.0,
        seed: 1,
        ..RowRequest::default()
    }
}

/// How far apart two pictures are at any pixel.
pub fn largest_difference(got: &RgbImage, expected: &RgbImage) -> u8 {
    assert_eq!(got.dimensions(), expected.dimensions());
    got.as_raw().iter().zip(expected.as_raw()).map(|(a, b)| a.abs_diff(*b)).max().unwrap()
}

/// Peak signal-to-noise ratio in dB.
pub fn psnr(a: &RgbImage, b: &RgbImage) -> f64 {
    assert_eq!(a.dimensions(), b.dimensions());
    let squares: f64 = a.as_raw().iter().zip(b.as_raw()).map(|(a, b)| f64::from(a.abs_diff(*b)).powi(2)).sum();
    let mean = squares / a.as_raw().len() as f64;
    if mean == 0.0 { f64::INFINITY } else { 10.0 * (255.0 * 255.0 / mean).log10() }
}

/// Copies a checkpoint to a fresh folder, so that a test can break it.
pub fn copy_of(checkpoint: &str) -> tempfile::TempDir {
    fn copy(from: &Path, to: &Path) {
        std::fs::create_dir_all(to).unwrap();
        for entry in std::fs::read_dir(from).unwrap() {
            let entry = entry.unwrap();
            let to = to.join(entry.file_name());
            if entry.file_type().unwrap().is_dir() {
                copy(&entry.path(), &to);
            } else {
                std::fs::copy(entry.path(), to).unwrap();
            }
        }
    }
    let target = tempfile::tempdir().unwrap();
    copy(&folder(checkpoint), target.path());
    target
}

/// A picture of the fixtures to start from.
pub fn picture(name: &str) -> Arc<RgbImage> {
    Arc::new(image::open(fixtures().join("init").join(name)).unwrap().into_rgb8())
}

/// A mask of the fixtures, as it is.
pub fn mask(name: &str) -> Mask {
    Mask { picture: Arc::new(gray(&picture(name))), blur: 0.0, content: MaskedContent::Original }
}

/// An init image of the fixtures.
pub fn init(name: &str, strength: f64, mask: Option<Mask>) -> Option<InitImage> {
    Some(InitImage { content: InitContent::Picture(picture(name)), strength, mask })
}
