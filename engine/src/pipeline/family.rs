//! What families of checkpoints do each in its own way: load their networks, make conditioning of
//! prompts, and call the denoiser. Everything else is the same for all of them.

use std::path::Path;
use std::sync::Arc;

use crate::config::ConfigFile;
use crate::guidance::guide;
use crate::ops::{Place, Tensor};
use crate::sampler::Flow;
use crate::text::EmbeddingCache;
use crate::vae::VaeConfig;
use crate::{Error, Result, RowRequest};

/// What one denoiser pass of a row listens to.
#[derive(Clone)]
pub(super) struct Conditioning {
    /// (1, tokens, width): the prompt.
    pub tokens: Tensor,
    /// (1, width): the prompt in one vector, where the family has such.
    pub pooled: Option<Tensor>,
    /// Numbers that the row's denoiser is told beside the timestep; equally many in all rows of a family.
    pub numbers: Arc<[f32]>,
}

/// What a row's passes of one step listen to, and how one output is made of theirs.
pub(super) struct Conditions {
    pub positive: Conditioning,
    /// Present with guidance.
    pub negative: Option<Conditioning>,
    pub guidance_scale: f64,
}

impl Conditions {
    /// The row's passes of a step.
    pub fn passes(&self) -> impl Iterator<Item = &Conditioning> {
        self.negative.iter().chain([&self.positive])
    }

    /// One output of the passes', which come in their order.
    pub fn combine(&self, mut outputs: impl Iterator<Item = Vec<f32>>) -> Vec<f32> {
        let mut next = || outputs.next().unwrap_or_default();
        match self.negative {
            None => next(),
            Some(_) => {
                let (negative, positive) = (next(), next());
                guide(&negative, &positive, self.guidance_scale)
            }
        }
    }
}

/// One line of a denoiser pass: a row with guidance makes two.
pub(super) struct ModelRow {
    /// What the sampler shows the denoiser: a latent on the host.
    pub sample: Arc<[f32]>,
    pub timestep: f32,
    pub conditioning: Conditioning,
}

/// A family's networks, but for the VAE, which all have in common.
pub(super) trait Family: Send + Sync {
    /// What the row listens to.
    fn condition(&self, request: &RowRequest, cache: &EmbeddingCache) -> Result<Conditions>;

    /// One denoiser call: an output for each row, row after row, of latents with `shape`'s channels, height
    /// and width.
    fn denoise(&self, rows: &[ModelRow], shape: [usize; 3]) -> Result<Vec<f32>>;

    /// Height and width of the latents that the checkpoint was trained on.
    fn sample_size(&self) -> (usize, usize);

    /// Bytes of the denoiser's weights.
    fn weight_bytes(&self) -> usize;

    /// Whether the family's pipeline overrules values of `scheduler_config.json`.
    fn overrules_sampler(&self) -> bool {
        false
    }

    /// What the noise levels of a checkpoint trained by flow matching depend on, for latents of `shape`'s channels,
    /// height and width.
    fn flow(&self, _shape: [usize; 3]) -> Flow {
        Flow::default()
    }

    /// Latent values along a side that the denoiser takes as one.
    fn patch(&self) -> usize {
        1
    }
}

/// What a family is loaded from.
pub(super) struct Parts<'a> {
    /// A folder in diffusers layout.
    pub folder: &'a Path,
    /// Its `model_index.json`.
    pub index: &'a ConfigFile,
    pub vae: &'a VaeConfig,
    pub place: &'a Place,
}

impl Parts<'_> {
    /// An error unless `value`, which the part's configuration has in `field`, is `expected`.
    pub fn fit(&self, part: &str, field: &str, value: usize, expected: usize, what: &str) -> Result<()> {
        if value == expected {
            return Ok(());
        }
        let problem = format!("`{field}` must be {what} ({expected}), but is {value}");
        Err(Error::checkpoint(&self.folder.join(part).join("config.json"), problem))
    }
}

/// All rows' samples, row after row.
pub(super) fn samples(rows: &[ModelRow]) -> Vec<f32> {
    rows.iter().flat_map(|row| row.sample.iter().copied()).collect()
}

/// One timestep per row.
pub(super) fn timesteps(rows: &[ModelRow]) -> Vec<f32> {
    rows.iter().map(|row| row.timestep).collect()
}

/// All rows' prompts, (rows, tokens, width).
pub(super) fn tokens(rows: &[ModelRow]) -> Result<Tensor> {
    Tensor::cat_rows(&rows.iter().map(|row| &row.conditioning.tokens).collect::<Vec<_>>())
}

/// All rows' prompts as vectors, (rows, width).
pub(super) fn pooled(rows: &[ModelRow]) -> Result<Tensor> {
    Tensor::cat_rows(&rows.iter().filter_map(|row| row.conditioning.pooled.as_ref()).collect::<Vec<_>>())
}

/// All rows' numbers, row after row.
pub(super) fn numbers(rows: &[ModelRow]) -> Vec<f32> {
    rows.iter().flat_map(|row| row.conditioning.numbers.iter().copied()).collect()
}
