//! A loaded checkpoint: tokenizer, text encoder, denoiser, VAE, and what its scheduler file says.

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use image::RgbImage;
use rayon::prelude::*;
use serde_json::json;

use super::picture;
use crate::config::ConfigFile;
use crate::denoiser::UNet;
use crate::ops::{self, Place, Tensor};
use crate::sampler::SamplerConfig;
use crate::text::{EmbeddingCache, TextEncoder, Tokenizer};
use crate::vae::Vae;
use crate::{Device, Error, Latent, Precision, Result};

/// Room for the embeddings of prompts that were seen before.
const EMBEDDING_BYTES: usize = 64 << 20;

/// Pixels that are decoded together.
const DECODED_PIXELS: usize = 512 * 512;

/// Pipelines whose folders hold the parts that are read here.
const PIPELINES: [&str; 3] =
    ["StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline"];

/// One line of a denoiser pass: a row with guidance makes two.
pub(super) struct ModelRow {
    /// What the sampler shows the denoiser: a latent on the host.
    pub sample: Arc<[f32]>,
    pub timestep: f32,
    /// (1, tokens, width)
    pub embedding: Tensor,
}

/// A base model's weights on a device, ready to render. Shared through an `Arc` by the batches that
/// use it.
pub struct Checkpoint {
    device: Device,
    tokenizer: Tokenizer,
    text_encoder: TextEncoder,
    unet: UNet,
    vae: Vae,
    sampler: SamplerConfig,
    embeddings: Mutex<EmbeddingCache>,
}

impl Checkpoint {
    /// Loads a diffusers folder of Stable Diffusion 1.x or 2.x: `model_index.json` with the folders
    /// `tokenizer`, `text_encoder`, `unet`, `vae` and `scheduler`.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] naming the file and the tensors or fields at fault.
    pub fn load(folder: &Path, device: &Device, precision: Precision) -> Result<Self> {
        let index = folder.join("model_index.json");
        if !index.exists() {
            return Err(Error::checkpoint(folder, "is not a diffusers folder: it has no `model_index.json`"));
        }
        ConfigFile::read(&index)?.only("_class_name", &PIPELINES.map(|name| json!(name)))?;
        let place = &Place::new(device.tensors(), precision.dtype());
        let sampler = read_sampler(&folder.join("scheduler/scheduler_config.json"))?;
        let text_encoder = TextEncoder::load(&folder.join("text_encoder"), place)?;
        let text = &text_encoder.config;
        let tokenizer = Tokenizer::load(&folder.join("tokenizer"), text.positions, text.vocabulary)?;
        let unet = UNet::load(&folder.join("unet"), place)?;
        let vae = Vae::load(&folder.join("vae"), place)?;
        let checkpoint = Self {
            device: device.clone(),
            tokenizer,
            text_encoder,
            unet,
            vae,
            sampler,
            embeddings: Mutex::new(EmbeddingCache::new(EMBEDDING_BYTES)),
        };
        checkpoint.check_parts(&folder.join("unet/config.json"))?;
        Ok(checkpoint)
    }

    /// The parts must fit together.
    fn check_parts(&self, config: &Path) -> Result<()> {
        let unet = &self.unet.config;
        let refuse = |field: &str, limit: String, value: usize| {
            Err(Error::checkpoint(config, format!("`{field}` must be {limit}, but is {value}")))
        };
        let latent = self.vae.config.latent_channels;
        for (field, channels) in [("in_channels", unet.in_channels), ("out_channels", unet.out_channels)] {
            if channels != latent {
                return refuse(field, format!("the VAE's `latent_channels` ({latent})"), channels);
            }
        }
        let width = self.text_encoder.config.width;
        match unet.context_widths().find(|context| *context != width) {
            Some(context) => {
                refuse("cross_attention_dim", format!("the text encoder's `hidden_size` ({width})"), context)
            }
            None => Ok(()),
        }
    }

    /// Width and height in pixels that the checkpoint was trained at.
    pub fn native_size(&self) -> (usize, usize) {
        let (height, width) = self.unet.config.sample_size;
        (width * self.vae_factor(), height * self.vae_factor())
    }

    /// Pixels per latent value along a side.
    pub fn vae_factor(&self) -> usize {
        self.vae.config.factor()
    }

    /// Turns final latents into pictures, in their order. Neighbours of one shape are decoded together
    /// as far as memory is not at stake; that changes nothing in the pictures.
    ///
    /// # Errors
    /// [`Error::NotFinite`] naming the row whose picture holds a value that is not finite.
    pub fn decode(&self, latents: &[Latent]) -> Result<Vec<RgbImage>> {
        let mut pictures = Vec::with_capacity(latents.len());
        for alike in latents.chunk_by(|a, b| (a.height, a.width) == (b.height, b.width)) {
            let pixels = alike[0].height * alike[0].width * self.vae_factor().pow(2);
            for group in alike.chunks((DECODED_PIXELS / pixels.max(1)).max(1)) {
                pictures.extend(self.device.run(|| self.decode_rows(group))?);
            }
        }
        Ok(pictures)
    }

    fn decode_rows(&self, latents: &[Latent]) -> Result<Vec<RgbImage>> {
        let scale = self.vae.config.scaling_factor as f32;
        let values: Vec<f32> =
            latents.iter().flat_map(|latent| latent.values.iter().map(|value| value / scale)).collect();
        let Latent { channels, height, width, .. } = latents[0];
        let decoded = self.vae.decode(&values, [latents.len(), channels, height, width])?;
        let (_, height, width, _) = decoded.dims4()?;
        let values = decoded.to_values()?;
        let rows = values.chunks_exact(height * width * 3).zip(latents);
        rows.map(|(values, latent)| picture::from_values(values, width, height, latent.row)).collect()
    }

    /// The prompt's embedding (1, tokens, width), computed or remembered.
    pub(super) fn embed(&self, prompt: &str) -> Result<Tensor> {
        // A panic elsewhere cannot leave the cache half changed in a way that matters: at worst an
        // entry is lost.
        let cache = || self.embeddings.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(embedding) = cache().get(prompt) {
            return Ok(embedding);
        }
        let ids = self.tokenizer.ids(prompt)?;
        let embedding = self.device.run(|| self.text_encoder.forward(&ids))?;
        cache().insert(prompt, &embedding);
        Ok(embedding)
    }

    /// One denoiser call over these model rows; `shape` is one latent's (channels, height, width). One
    /// output per row, on the host.
    pub(super) fn denoise(&self, rows: &[ModelRow], shape: (usize, usize, usize)) -> Result<Vec<Vec<f32>>> {
        let parts = self.device.parts(self.unet.weight_bytes).min(rows.len());
        if parts <= 1 {
            return self.device.run(|| self.denoise_rows(rows, shape));
        }
        // Rows do not depend on each other: how they are cut never shows.
        let side_by_side = rows.par_chunks(rows.len().div_ceil(parts));
        let outputs =
            self.device.run(|| side_by_side.map(|rows| self.denoise_rows(rows, shape)).collect::<Result<Vec<_>>>())?;
        Ok(outputs.into_iter().flatten().collect())
    }

    fn denoise_rows(&self, rows: &[ModelRow], shape: (usize, usize, usize)) -> Result<Vec<Vec<f32>>> {
        let (channels, height, width) = shape;
        let samples: Vec<f32> = rows.iter().flat_map(|row| row.sample.iter().copied()).collect();
        let timesteps: Vec<f32> = rows.iter().map(|row| row.timestep).collect();
        let embeddings: Vec<&Tensor> = rows.iter().map(|row| &row.embedding).collect();
        let context = Tensor::cat_rows(&embeddings)?;
        let output = self.unet.forward(&samples, [rows.len(), channels, height, width], &timesteps, &context)?;
        Ok(output.chunks_exact(channels * height * width).map(<[f32]>::to_vec).collect())
    }

    /// Channels of a latent.
    pub(super) fn latent_channels(&self) -> usize {
        self.vae.config.latent_channels
    }

    /// What samplers are built from.
    pub(super) fn sampler_config(&self) -> &SamplerConfig {
        &self.sampler
    }
}

impl Drop for Checkpoint {
    /// Whatever comes next works in other sizes.
    fn drop(&mut self) {
        ops::release_memory();
    }
}

fn read_sampler(path: &Path) -> Result<SamplerConfig> {
    let text = std::fs::read_to_string(path).map_err(|error| Error::checkpoint(path, error))?;
    SamplerConfig::parse(&text).map_err(|error| match error {
        Error::Checkpoint { problem, .. } => Error::checkpoint(path, problem),
        other => other,
    })
}
