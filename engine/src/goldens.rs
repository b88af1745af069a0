//! Each network against what diffusers and transformers made of the same weights
//! (`tests/fixtures/README.md`).

use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use safetensors::SafeTensors;

use crate::denoiser::UNet;
use crate::text::{TextEncoder, Tokenizer};
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

    fn list<T: serde::de::DeserializeOwned>(&self, name: &str) -> Vec<T> {
        let (_, header) = SafeTensors::read_metadata(&self.bytes).unwrap();
        serde_json::from_str(&header.metadata().as_ref().unwrap()[name]).unwrap()
    }
}

/// The largest difference, as a share of the largest expected magnitude.
fn difference(got: &Tensor, expected: &Tensor) -> f32 {
    assert_eq!(got.dims(), expected.dims());
    let values = |tensor: &Tensor| tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let (got, expected) = (values(got), values(expected));
    let largest = expected.iter().fold(0f32, |most, value| most.max(value.abs()));
    got.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max) / largest
}

fn text_encoder(checkpoint: &str) -> TextEncoder {
    TextEncoder::load(&folder(checkpoint).join("text_encoder"), &Device::Cpu, DType::F32).unwrap()
}

fn unet(checkpoint: &str) -> UNet {
    UNet::load(&folder(checkpoint).join("unet"), &Device::Cpu, DType::F32).unwrap()
}

#[test]
fn prompts_become_the_token_ids_of_transformers() {
    for checkpoint in CHECKPOINTS {
        let goldens = Goldens::read(checkpoint);
        let vocabulary = text_encoder(checkpoint).config.vocabulary;
        let tokenizer = Tokenizer::load(&folder(checkpoint).join("tokenizer"), 77, vocabulary).unwrap();
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
            let off = difference(&encoder.forward(&ids).unwrap(), &expected.narrow(0, row, 1).unwrap());
            assert!(off < 5e-6, "{checkpoint}: prompt {prompt} is off by {off}");
        }
    }
}

#[test]
fn a_denoiser_call_with_mixed_timesteps_equals_diffusers_rows() {
    for checkpoint in CHECKPOINTS {
        let (goldens, unet) = (Goldens::read(checkpoint), unet(checkpoint));
        let context = goldens.tensor("text_embeddings").unwrap();
        let mut calls = 0;
        while let Some(sample) = goldens.tensor(&format!("unet.{calls}.sample")) {
            let timesteps = goldens.tensor(&format!("unet.{calls}.timesteps")).unwrap().to_vec1::<f32>().unwrap();
            let expected = goldens.tensor(&format!("unet.{calls}.output")).unwrap();
            let off = difference(&unet.forward(&sample, &timesteps, &context).unwrap(), &expected);
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
        let batch = unet.forward(&sample, &timesteps, &context).unwrap().flatten_from(1).unwrap();
        let batch = batch.to_vec2::<f32>().unwrap();
        for (row, timestep) in timesteps.into_iter().enumerate() {
            let part = |tensor: &Tensor| tensor.narrow(0, row, 1).unwrap();
            let alone = unet.forward(&part(&sample), &[timestep], &part(&context)).unwrap();
            let alone = alone.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            assert!(batch[row].iter().zip(&alone).all(|(a, b)| a.to_bits() == b.to_bits()), "{checkpoint}: row {row}");
        }
    }
}

#[test]
fn decoded_latents_equal_those_of_diffusers() {
    for checkpoint in CHECKPOINTS {
        let goldens = Goldens::read(checkpoint);
        let vae = Vae::load(&folder(checkpoint).join("vae"), &Device::Cpu, DType::F32).unwrap();
        let mut calls = 0;
        while let Some(latents) = goldens.tensor(&format!("vae.{calls}.latents")) {
            let expected = goldens.tensor(&format!("vae.{calls}.picture")).unwrap();
            let got = vae.decode(&latents).unwrap().permute((0, 3, 1, 2)).unwrap().contiguous().unwrap();
            let off = difference(&got, &expected);
            assert!(off < 3e-5, "{checkpoint}: decoding {calls} is off by {off}");
            calls += 1;
        }
        assert!(calls >= 2);
    }
}

#[test]
fn half_precision_follows_full_precision_at_its_own_distance() {
    for (dtype, tolerance) in [(DType::F16, 0.02), (DType::BF16, 0.12)] {
        let goldens = Goldens::read("demo");
        let text = TextEncoder::load(&folder("demo").join("text_encoder"), &Device::Cpu, dtype).unwrap();
        let unet = UNet::load(&folder("demo").join("unet"), &Device::Cpu, dtype).unwrap();
        let ids: Vec<u32> = vec![630, 631];
        assert_eq!(text.forward(&ids).unwrap().dtype(), dtype);
        let context = goldens.tensor("text_embeddings").unwrap().to_dtype(dtype).unwrap();
        let (sample, expected) = (goldens.tensor("unet.0.sample").unwrap(), goldens.tensor("unet.0.output").unwrap());
        let timesteps = goldens.tensor("unet.0.timesteps").unwrap().to_vec1::<f32>().unwrap();
        let off = difference(&unet.forward(&sample, &timesteps, &context).unwrap(), &expected);
        assert!(off > 0.0 && off < tolerance, "{dtype:?} is off by {off}");
    }
}
