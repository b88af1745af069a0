//! Single files of the fixtures' recipes: the very bytes that `original.py` made.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use half::f16;
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use serde::Deserialize;
use serde_json::Value;

/// One file of `tests/fixtures/original`.
#[derive(Deserialize)]
#[allow(dead_code, reason = "each of the two test binaries reads a part of it")]
pub struct Recipe {
    /// Shape, spread and centre of each tensor.
    tensors: BTreeMap<String, (Vec<usize>, f64, f64)>,
    /// Our tensors by part: shape, and CRC-32 of the bytes that diffusers' converter gave.
    pub parts: BTreeMap<String, BTreeMap<String, (Vec<usize>, u32)>>,
    /// diffusers' and transformers' configurations by part.
    pub configs: BTreeMap<String, BTreeMap<String, Value>>,
    /// Requests with the names of their pictures.
    pub pictures: Vec<Value>,
    #[serde(skip)]
    name: String,
}

/// A tensor of a file that is being made.
pub type Made = (Dtype, Vec<usize>, Vec<u8>);

/// Where the recipes are.
pub fn recipes() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/original")
}

impl Recipe {
    pub fn read(name: &str) -> Self {
        let text = std::fs::read_to_string(recipes().join(format!("{name}.json"))).unwrap();
        Self { name: name.to_owned(), ..serde_json::from_str(&text).unwrap() }
    }

    /// All tensors: what was fitted as it is stored, the rest made again.
    pub fn tensors(&self) -> BTreeMap<String, Made> {
        let made = |(name, (shape, spread, centre)): (&String, &(Vec<usize>, f64, f64))| {
            let bytes = made(name, shape.iter().product(), *spread as f32, *centre as f32);
            (name.clone(), (Dtype::F16, shape.clone(), bytes))
        };
        let mut tensors: BTreeMap<String, Made> = self.tensors.iter().map(made).collect();
        if let Ok(bytes) = std::fs::read(recipes().join(format!("{}.safetensors", self.name))) {
            for (name, view) in SafeTensors::deserialize(&bytes).unwrap().iter() {
                let kept = (view.dtype(), view.shape().to_vec(), view.data().to_vec());
                assert!(tensors.insert(name.to_owned(), kept).is_some(), "{name}");
            }
        }
        tensors
    }

    /// Writes the file, after a change, to a folder that goes with the value.
    pub fn write(&self, change: impl FnOnce(&mut BTreeMap<String, Made>)) -> (tempfile::TempDir, PathBuf) {
        let mut tensors = self.tensors();
        change(&mut tensors);
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(format!("{}.safetensors", self.name));
        let views = tensors.iter().map(|(name, (dtype, shape, bytes))| {
            (name.as_str(), TensorView::new(*dtype, shape.clone(), bytes).unwrap())
        });
        safetensors::serialize_to_file(views, None, &path).unwrap();
        (folder, path)
    }
}

/// `centre` plus uniform numbers up to `spread` in f16: SplitMix64's upper 24 bits, counted from the FNV-1a
/// hash of the name.
fn made(name: &str, count: usize, spread: f32, centre: f32) -> Vec<u8> {
    let mut state = 0xcbf2_9ce4_8422_2325_u64;
    for byte in name.bytes() {
        state = (state ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    }
    let mut bytes = Vec::with_capacity(2 * count);
    for _ in 0..count {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^= mixed >> 31;
        let unit = (mixed >> 40) as f32 / (1 << 23) as f32 - 1.0;
        bytes.extend(f16::from_f32(unit * spread + centre).to_le_bytes());
    }
    bytes
}
