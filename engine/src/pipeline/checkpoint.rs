//! A loaded checkpoint: its family's networks, the VAE, and what its scheduler file says.

use std::path::Path;

use image::RgbImage;
use rayon::prelude::*;

use super::encoders::{self, EncoderCounts, TextEncoders};
use super::family::{Conditions, Family, ModelRow, Parts};
use super::{flux, picture, sd, sd3, sdxl};
use crate::config::ConfigFile;
use crate::noise::NoiseSource;
use crate::ops;
use crate::sampler::{Flow, SamplerConfig};
use crate::source::Source;
use crate::text::EmbeddingCache;
use crate::vae::Vae;
use crate::{CacheCounts, Device, Error, FamilyKind, Latent, Precision, Result, RowRequest};

/// Room for the embeddings of prompts that were seen before, unless it is asked for more or less: the widest take
/// eight megabytes.
const EMBEDDING_BYTES: usize = 256 << 20;

/// Pixels that are decoded together.
const DECODED_PIXELS: usize = 512 * 512;

type Load = fn(&Parts<'_>) -> Result<Box<dyn Family>>;

/// Pipelines that `model_index.json` may name, and what loads their family.
const PIPELINES: [(&str, Load); 12] = [
    ("StableDiffusionPipeline", sd::load),
    ("StableDiffusionImg2ImgPipeline", sd::load),
    ("StableDiffusionInpaintPipeline", sd::load),
    ("StableDiffusionXLPipeline", sdxl::load),
    ("StableDiffusionXLImg2ImgPipeline", sdxl::load),
    ("StableDiffusionXLInpaintPipeline", sdxl::load),
    ("StableDiffusion3Pipeline", sd3::load),
    ("StableDiffusion3Img2ImgPipeline", sd3::load),
    ("StableDiffusion3InpaintPipeline", sd3::load),
    ("FluxPipeline", flux::load),
    ("FluxImg2ImgPipeline", flux::load),
    ("FluxInpaintPipeline", flux::load),
];

/// How a checkpoint is loaded, where there is a choice.
#[derive(Clone, Copy, Debug, Default)]
pub struct LoadOptions<'a> {
    /// A folder that has the parts that a single file lacks.
    pub beside: Option<&'a Path>,
    /// The family that it is told to be, where its files do not tell.
    pub family: Option<FamilyKind>,
    /// Whether text encoders stay in memory.
    pub text_encoders: TextEncoders,
    /// Bytes of embeddings and prompts that are remembered at most; `None`: 256 megabytes.
    pub embedding_bytes: Option<usize>,
}

/// A base model's weights on a device, ready to render. Shared through an `Arc` by the batches that
/// use it.
pub struct Checkpoint {
    device: Device,
    family: Box<dyn Family>,
    vae: Vae,
    sampler: SamplerConfig,
    embeddings: EmbeddingCache,
    vae_bytes: Option<usize>,
}

impl Checkpoint {
    /// Loads a folder in diffusers layout (`model_index.json` with the folders of the parts that it lists),
    /// or a single file in its makers' layout that holds all parts.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] naming the file and the tensors or fields at fault.
    pub fn load(path: &Path, device: &Device, precision: Precision) -> Result<Self> {
        Self::load_with(path, device, precision, LoadOptions::default())
    }

    /// [`Checkpoint::load`] with options.
    ///
    /// # Errors
    /// As [`Checkpoint::load`].
    pub fn load_with(path: &Path, device: &Device, precision: Precision, options: LoadOptions<'_>) -> Result<Self> {
        let source = &Source::open(path, options.beside, options.family)?;
        let index = &source.index()?;
        let class = index.word("_class_name")?.unwrap_or("StableDiffusionPipeline");
        let Some((_, load)) = PIPELINES.iter().find(|(name, _)| *name == class) else {
            let known = PIPELINES.map(|(name, _)| format!("`{name}`")).join(", ");
            return Err(index.refuse("_class_name", format!("one of {known}")));
        };
        let place = &device.place(precision);
        if !place.works() {
            let limit = format!("a number format that {} computes in", device.describe());
            return Err(Error::request("dtype", limit, precision));
        }
        let sampler = read_sampler(&source.scheduler()?)?;
        let vae = Vae::load(source.part("vae"), place)?;
        let family = load(&Parts { source, index, vae: &vae.config, place })?;
        let sampler = if family.overrules_sampler() { sampler } else { sampler.taken_as_written() };
        let embeddings = EmbeddingCache::new(options.embedding_bytes.unwrap_or(EMBEDDING_BYTES));
        let checkpoint = Self { device: device.clone(), family, vae, sampler, embeddings, vae_bytes: None };
        // The VAE takes half of what is free, and the denoiser not more than that.
        let (width, height) = checkpoint.native_size();
        let reserve = checkpoint.vae.picture_bytes(height, width).saturating_mul(2);
        options.text_encoders.settle(checkpoint.family.as_ref(), device, reserve)?;
        Ok(checkpoint)
    }

    /// The same checkpoint, whose VAE takes about so many bytes for its activations: larger maps are computed in
    /// bands, which takes longer. On the processor that shows in no bit of a picture; elsewhere it may show in
    /// the last one. `None`: half of the memory that is free (on the processor), or four gigabytes.
    #[must_use]
    pub fn with_vae_bytes(self, bytes: Option<usize>) -> Self {
        let mut checkpoint = self;
        checkpoint.vae_bytes = bytes;
        checkpoint
    }

    fn vae_budget(&self) -> usize {
        self.vae_bytes.unwrap_or_else(|| self.device.activation_bytes())
    }

    /// Width and height in pixels that the checkpoint was trained at.
    pub fn native_size(&self) -> (usize, usize) {
        let (height, width) = self.family.sample_size();
        (width * self.vae_factor(), height * self.vae_factor())
    }

    /// Pixels per latent value along a side.
    pub fn vae_factor(&self) -> usize {
        self.vae.config.factor()
    }

    /// Pixels that both sides of a picture are multiples of.
    pub fn side_multiple(&self) -> usize {
        self.vae_factor() * self.family.patch()
    }

    /// How often prompts' embeddings were remembered.
    pub fn embedding_counts(&self) -> CacheCounts {
        self.embeddings.counts()
    }

    /// What its text encoders take and did.
    pub fn encoder_counts(&self) -> EncoderCounts {
        encoders::counts(self.family.as_ref())
    }

    /// Encodes the prompts of rows that are about to join, where that needs encoders that are not in memory, and those
    /// of rows that wait for later along with them: each encoder is then read once for all of these rows. Rows may join
    /// without it.
    pub fn prepare(&self, joining: &[RowRequest], waiting: &[RowRequest]) {
        encoders::prepare(self.family.as_ref(), &self.embeddings, &self.device, [joining, waiting]);
    }

    /// Turns final latents into pictures, in their order. Neighbours of one shape are decoded together
    /// as far as memory is not at stake; that changes nothing in the pictures.
    ///
    /// # Errors
    /// [`Error::NotFinite`] naming the row whose picture holds a value that is not finite.
    pub fn decode(&self, latents: &[Latent]) -> Result<Vec<RgbImage>> {
        let mut pictures = Vec::with_capacity(latents.len());
        let (factor, budget) = (self.vae_factor(), self.vae_budget());
        for alike in latents.chunk_by(|a, b| (a.height, a.width) == (b.height, b.width)) {
            let (height, width) = (alike[0].height * factor, alike[0].width * factor);
            let fitting = budget / self.vae.picture_bytes(height, width).max(1);
            for group in alike.chunks(fitting.min(DECODED_PIXELS / (height * width).max(1)).max(1)) {
                pictures.extend(self.device.run(|| self.decode_rows(group, budget))?);
            }
        }
        Ok(pictures)
    }

    fn decode_rows(&self, latents: &[Latent], budget: usize) -> Result<Vec<RgbImage>> {
        let mut values: Vec<f32> = latents.iter().flat_map(|latent| latent.values.iter().copied()).collect();
        self.vae.config.to_decoder(&mut values);
        let Latent { channels, height, width, .. } = latents[0];
        let decoded = self.vae.decode(&values, [latents.len(), channels, height, width], budget)?;
        let (_, height, width, _) = decoded.dims4()?;
        let values = decoded.to_values()?;
        let rows = values.chunks_exact(height * width * 3).zip(latents);
        rows.map(|(values, latent)| picture::from_values(values, width, height, latent.row)).collect()
    }

    /// A latent of (height, width, 3) values from -1 to 1 of a picture of this width and height: drawn with the
    /// next of the row's noise, or the likeliest one.
    pub(super) fn encode(
        &self,
        picture: &[f32],
        size: (usize, usize),
        noise: Option<&mut NoiseSource>,
    ) -> Result<Vec<f32>> {
        let encode = || self.vae.encode(picture, (size.1, size.0), self.vae_budget());
        let encoded = self.device.run(encode)?;
        let mut latent = match noise {
            Some(noise) => encoded.sample(noise),
            None => encoded.mode(),
        };
        self.vae.config.to_denoiser(&mut latent);
        Ok(latent)
    }

    /// Whether the denoiser is one for inpainting, which sees the mask.
    pub fn inpaints(&self) -> bool {
        self.family.inpaints()
    }

    /// Whether rows may end and begin in the middle of the way from noise, and start from latents.
    pub(super) fn hands_over(&self) -> bool {
        self.family.hands_over()
    }

    /// Calls that a row with an init image leaves out.
    pub(super) fn skipped_calls(&self, steps: usize, strength: f64) -> usize {
        self.sampler.skipped_calls(steps, strength)
    }

    /// What a row listens to.
    pub(super) fn condition(&self, request: &RowRequest) -> Result<Conditions> {
        self.device.run(|| self.family.condition(request, &self.embeddings))
    }

    /// One denoiser call over these model rows; `shape` is one latent's channels, height and width. One
    /// output per row, on the host.
    pub(super) fn denoise(&self, rows: &[ModelRow], shape: [usize; 3]) -> Result<Vec<Vec<f32>>> {
        // All rows that were to join have joined: memory is the denoiser's now.
        encoders::let_go(self.family.as_ref());
        let parts = self.device.parts(self.family.weight_bytes()).clamp(1, rows.len().max(1));
        // Rows do not depend on each other: how they are cut never shows.
        let outputs = self.device.run(|| match parts {
            1 => Ok(vec![self.family.denoise(rows, shape)?]),
            parts => {
                let side_by_side = rows.par_chunks(rows.len().div_ceil(parts));
                side_by_side.map(|rows| self.family.denoise(rows, shape)).collect::<Result<Vec<_>>>()
            }
        })?;
        let len = shape.iter().product::<usize>().max(1);
        Ok(outputs.iter().flat_map(|outputs| outputs.chunks_exact(len).map(<[f32]>::to_vec)).collect())
    }

    /// Channels of a latent.
    pub(crate) fn latent_channels(&self) -> usize {
        self.vae.config.latent_channels
    }

    /// Layers of the denoiser that a row's guidance may leave out.
    pub(super) fn layers(&self) -> usize {
        self.family.layers()
    }

    /// What noise levels depend on besides the scheduler's file.
    pub(super) fn flow(&self, shape: [usize; 3]) -> Flow {
        self.family.flow(shape)
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

fn read_sampler(config: &ConfigFile) -> Result<SamplerConfig> {
    SamplerConfig::from_json(&config.to_value()).map_err(|error| match error {
        Error::Checkpoint { problem, .. } => Error::checkpoint(config.path(), problem),
        other => other,
    })
}
