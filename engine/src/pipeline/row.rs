//! One job's place in a running batch, as the caller sees it.

use crate::{SamplerKind, ScheduleKind};

/// A row's name within its batch; the caller chooses it.
pub type RowId = u64;

/// Everything that a picture is a function of, besides the checkpoint.
#[derive(Clone, Debug, PartialEq)]
pub struct RowRequest {
    /// What to draw.
    pub prompt: String,
    /// What to steer away from; only read with guidance.
    pub negative_prompt: String,
    /// Width in pixels, a multiple of the checkpoint's VAE factor.
    pub width: usize,
    /// Height in pixels, a multiple of the checkpoint's VAE factor.
    pub height: usize,
    /// Denoising steps.
    pub steps: usize,
    /// Classifier-free guidance scale; 1 or less turns guidance off and halves the work.
    pub guidance_scale: f64,
    /// `None`: the one that the checkpoint's `scheduler_config.json` names.
    pub sampler: Option<SamplerKind>,
    /// `None`: the one that the checkpoint's `scheduler_config.json` names.
    pub schedule: Option<ScheduleKind>,
    /// Seed of the initial noise and of the sampler's own.
    pub seed: u64,
}

/// What one step did to a row.
#[derive(Clone, Debug)]
pub struct RowStep {
    /// The row.
    pub id: RowId,
    /// Denoiser calls done so far.
    pub step: usize,
    /// Denoiser calls in all; some samplers take more than the steps that were asked for.
    pub total: usize,
    /// Present once the row is finished; it has then left the batch.
    pub latent: Option<Latent>,
}

/// One row's final latent on the host, (channels, height, width) in `f32`.
#[derive(Clone, Debug, PartialEq)]
pub struct Latent {
    pub(crate) values: Vec<f32>,
    pub(crate) channels: usize,
    pub(crate) height: usize,
    pub(crate) width: usize,
    /// The row it came from, so that an error in decoding can name it.
    pub(crate) row: RowId,
}
