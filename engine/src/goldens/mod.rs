//! Each network against what diffusers and transformers made of the same weights
//! (`tests/fixtures/README.md`).

mod flux;
mod sd3;
mod sdxl;
mod t5;
mod vae;

use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use safetensors::SafeTensors;

use crate::ops::{self, Place};

use crate::denoiser::UNet;
use crate::text::{ClipEncoder, ClipOutput, ClipTokenizer, Pooled, States};
use crate::vae::Vae;

const CHECKPOINTS: [&str; 6] = ["sd1", "sd2", "one_layer", "bf16", "bare_tokenizer", "demo"];

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
}

fn folder(checkpoint: &str) -> PathBuf {
    match checkpoint {
        "demo" => Path::new(env!("CARGO_MANIFEST_DIR")).join("../demo/model"),
        name => fixtures().join("checkpoints").join(name),
    }
}

/// One checkpoint's golden tensors.
struct Goldens {
    bytes: Vec<u8>,
}

impl Goldens {
    fn read(checkpoint: &str) -> Self {
        let path = fixtures().join("goldens").join(format!("{checkpoint}.safetensors"));
        Self { bytes: std::fs::read(path).unwrap() }
    }

    fn tensor(&self, name: &str) -> Option<Tensor> {
        let file = SafeTensors::deserialize(&self.bytes).unwrap();
        let view = file.tensor(name).ok()?;
        let dtype = if view.dtype() == safetensors::Dtype::I64 { DType::I64 } else { DType::F32 };
        Some(Tensor::from_raw_buffer(view.data(), dtype, view.shape(), &Device::Cpu).unwrap())
    }

    fn bytes(&self, name: &str) -> Vec<u8> {
        SafeTensors::deserialize(&self.bytes).unwrap().tensor(name).unwrap().data().to_vec()
    }

    fn list<T: serde::de::DeserializeOwned>(&self, name: &str) -> Vec<T> {
        self.value(name)
    }

    /// A value of the metadata.
    fn value<T: serde::de::DeserializeOwned>(&self, name: &str) -> T {
        let (_, header) = SafeTensors::read_metadata(&self.bytes).unwrap();
        serde_json::from_str(&header.metadata().as_ref().unwrap()[name]).unwrap()
    }
}

fn numbers(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

fn dims4(tensor: &Tensor) -> [usize; 4] {
    tensor.dims().try_into().unwrap()
}

fn at(tensor: &Tensor, place: &Place) -> ops::Tensor {
    ops::Tensor::new(&numbers(tensor), tensor.dims(), place).unwrap()
}

/// The largest difference, as a share of the largest expected magnitude.
fn difference(got: &[f32], expected: &Tensor) -> f32 {
    let expected = numbers(expected);
    assert_eq!(got.len(), expected.len());
    let largest = expected.iter().fold(0f32, |most, value| most.max(value.abs()));
    got.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max) / largest
}

fn text_encoder(checkpoint: &str) -> ClipEncoder {
    let output = ClipOutput { states: States::Last, pooled: Pooled::No };
    ClipEncoder::load(folder(checkpoint).join("text_encoder"), output, &Place::host()).unwrap()
}

fn call(unet: &UNet, sample: &Tensor, timesteps: &[f32], context: &ops::Tensor) -> Vec<f32> {
    unet.forward(&numbers(sample), dims4(sample), timesteps, context, None).unwrap()
}

fn unet(checkpoint: &str) -> UNet {
    UNet::load(folder(checkpoint).join("unet"), &Place::host()).unwrap()
}

#[test]
fn prompts_become_the_token_ids_of_transformers() {
    for checkpoint in CHECKPOINTS {
        let goldens = Goldens::read(checkpoint);
        let vocabulary = text_encoder(checkpoint).config.vocabulary;
        let tokenizer = ClipTokenizer::load(&folder(checkpoint).join("tokenizer"), 77, vocabulary).unwrap();
        let expected = goldens.tensor("tokens").unwrap().to_vec2::<i64>().unwrap();
        let prompts = goldens.list::<String>("prompts");
        assert!(prompts.len() >= 10 && prompts.len() == expected.len());
        for (prompt, expected) in prompts.iter().zip(expected) {
            let ids: Vec<i64> = tokenizer.ids(prompt).unwrap().into_iter().map(i64::from).collect();
            assert_eq!(ids, expected, "{checkpoint}: {prompt:?}");
        }
    }
}

#[test]
fn text_embeddings_equal_those_of_transformers() {
    for checkpoint in CHECKPOINTS {
        let (goldens, encoder) = (Goldens::read(checkpoint), text_encoder(checkpoint));
        let (tokens, expected) = (goldens.tensor("tokens").unwrap(), goldens.tensor("text_embeddings").unwrap());
        for (row, prompt) in goldens.list::<usize>("embedded").into_iter().enumerate() {
            let ids = tokens.get(prompt).unwrap().to_vec1::<i64>().unwrap();
            let ids: Vec<u32> = ids.into_iter().map(|id| u32::try_from(id).unwrap()).collect();
            let off = difference(
                &encoder.forward(&ids).unwrap().states.to_values().unwrap(),
                &expected.narrow(0, row, 1).unwrap(),
            );
            assert!(off < 5e-6, "{checkpoint}: prompt {prompt} is off by {off}");
        }
    }
}

#[test]
fn a_denoiser_call_with_mixed_timesteps_equals_diffusers_rows() {
    for checkpoint in CHECKPOINTS {
        let (goldens, unet) = (Goldens::read(checkpoint), unet(checkpoint));
        let context = at(&goldens.tensor("text_embeddings").unwrap(), &Place::host());
        let mut calls = 0;
        while let Some(sample) = goldens.tensor(&format!("unet.{calls}.sample")) {
            let timesteps = goldens.tensor(&format!("unet.{calls}.timesteps")).unwrap().to_vec1::<f32>().unwrap();
            let expected = goldens.tensor(&format!("unet.{calls}.output")).unwrap();
            let off = difference(&call(&unet, &sample, &timesteps, &context), &expected);
            assert!(off < 3e-5, "{checkpoint}: call {calls} is off by {off}");
            calls += 1;
        }
        assert!(calls >= 3);
    }
}

#[test]
fn a_row_of_a_denoiser_call_equals_the_row_alone_bit_for_bit() {
    for checkpoint in CHECKPOINTS {
        let (goldens, unet) = (Goldens::read(checkpoint), unet(checkpoint));
        let (sample, context) = (goldens.tensor("unet.1.sample").unwrap(), goldens.tensor("text_embeddings").unwrap());
        let timesteps = [999.0, 1.0, 487.25, 250.0];
        let batch = call(&unet, &sample, &timesteps, &at(&context, &Place::host()));
        let len = batch.len() / timesteps.len();
        for (row, timestep) in timesteps.into_iter().enumerate() {
            let part = |tensor: &Tensor| tensor.narrow(0, row, 1).unwrap();
            let alone = call(&unet, &part(&sample), &[timestep], &at(&part(&context), &Place::host()));
            assert!(
                batch[row * len..(row + 1) * len].iter().zip(&alone).all(|(a, b)| a.to_bits() == b.to_bits()),
                "{checkpoint}: row {row}"
            );
        }
    }
}

#[test]
fn decoded_latents_equal_those_of_diffusers() {
    for checkpoint in CHECKPOINTS {
        let goldens = Goldens::read(checkpoint);
        let vae = Vae::load(folder(checkpoint).join("vae"), &Place::host()).unwrap();
        let mut calls = 0;
        while let Some(latents) = goldens.tensor(&format!("vae.{calls}.latents")) {
            let expected = goldens.tensor(&format!("vae.{calls}.picture")).unwrap();
            let got =
                ops::channels_first(&vae.decode(&numbers(&latents), dims4(&latents), usize::MAX).unwrap()).unwrap();
            let off = difference(&got, &expected);
            assert!(off < 3e-5, "{checkpoint}: decoding {calls} is off by {off}");
            calls += 1;
        }
        assert!(calls >= 2);
    }
}

#[test]
fn half_precision_follows_full_precision_at_its_own_distance() {
    // On the processor `f16` is computed as `f32`.
    for (dtype, range) in [(DType::F16, 0.0..3e-5), (DType::BF16, 1e-4..0.12)] {
        let (goldens, place) = (Goldens::read("demo"), Place::new(&Device::Cpu, dtype));
        let unet = UNet::load(folder("demo").join("unet"), &place).unwrap();
        let context = at(&goldens.tensor("text_embeddings").unwrap(), &place);
        let (sample, expected) = (goldens.tensor("unet.0.sample").unwrap(), goldens.tensor("unet.0.output").unwrap());
        let timesteps = goldens.tensor("unet.0.timesteps").unwrap().to_vec1::<f32>().unwrap();
        let off = difference(&call(&unet, &sample, &timesteps, &context), &expected);
        assert!(range.contains(&off), "{dtype:?} is off by {off}");
    }
}
