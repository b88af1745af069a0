//! Samplers: how a latent gets from noise to a picture, one denoiser call at a time. One file per algorithm,
//! after its paper and with diffusers' arithmetic (f32, in its order), because a seed must give diffusers'
//! picture.
//!
//! A [`SamplerConfig`] is a checkpoint's `scheduler_config.json`; [`build`] makes of it, of a request's words
//! and of a number of steps the [`Sampler`] of one row. A sampler sees one row's latent in host memory, so
//! rows of a batch differ in everything at no cost.
//!
//! Invariant: a sampler knows nothing of models, devices or other rows, and its noise comes from the row's
//! [`NoiseSource`] alone.

mod config;
mod kind;
mod options;

mod prediction;
mod sigmas;
mod training;

mod ddim;
mod dpmpp_2m;
mod euler;
mod euler_ancestral;
mod flow_match_euler;
mod pndm;

#[cfg(test)]
mod tests;

pub use config::SamplerConfig;
pub(crate) use config::quote_infinities;
pub use kind::{SamplerKind, ScheduleKind};
pub(crate) use pndm::ORDER as PNDM_ORDER;

use self::sigmas::Spacing;
use self::training::Training;
use crate::noise::NoiseSource;
use crate::{Error, Result};

/// One row's way from noise to its latent. Calls go from 0 up, each once: the denoiser gets
/// `scale_model_input(call, …)` and `timesteps()[call]`, and its output (after guidance) goes to `step`.
pub trait Sampler: Send {
    /// The timestep that each call tells the denoiser. Their number is the number of calls: the steps asked for,
    /// more for `pndm`, fewer where a checkpoint clips its noisiest timesteps.
    fn timesteps(&self) -> &[f32];

    /// The deviation of the noise that the row starts from.
    fn init_noise_sigma(&self) -> f32;

    /// Leaves the first calls out, for a row that starts from a picture; calls go from 0 up again. Before any
    /// [`Sampler::step`].
    ///
    /// # Panics
    /// Where `count` is not below the number of timesteps.
    fn skip_calls(&mut self, count: usize);

    /// `clean` with as much of the standard normal `noise` as the sample has before the call.
    ///
    /// # Panics
    /// As [`Sampler::step`].
    fn add_noise(&self, call: usize, clean: &[f32], noise: &[f32]) -> Vec<f32>;

    /// What the denoiser sees of the sample.
    fn scale_model_input(&self, call: usize, sample: &[f32]) -> Vec<f32>;

    /// The sample after the call. Draws from `noise` if the sampler adds any.
    ///
    /// # Panics
    /// Where `call` is not below the number of timesteps, or the slices differ in length.
    fn step(&mut self, call: usize, sample: &[f32], model_output: &[f32], noise: &mut NoiseSource) -> Vec<f32>;
}

/// What a flow-matching model's noise levels depend on besides the checkpoint's `scheduler_config.json`.
#[derive(Clone, Copy, Debug, Default)]
pub struct Flow {
    /// Tokens of the picture, by which checkpoints with dynamic shifting shift their levels.
    pub image_tokens: usize,
    /// Whether the levels before any shift are even from 1 to 1/steps, not those of the training schedule.
    pub unit_levels: bool,
}

/// The sampler of a row. `kind` and `schedule` are the request's; `None` leaves them to the checkpoint.
///
/// # Errors
/// - Naming `steps`: none or more than the checkpoint's training timesteps, or more (for `pndm` also fewer)
///   than the sampler can take.
/// - Naming `sampler` or `schedule`: a choice left to a checkpoint that names a sampler Kiln lacks, a sampler that
///   does not fit what the checkpoint was trained for (`flow_match_euler` is for flow matching, the others are
///   not), or a schedule that the sampler has not (`ddim` and `pndm` have only `normal`).
/// - Naming a key of the checkpoint's `scheduler_config.json`: a value that the sampler cannot honour.
pub fn build(
    config: &SamplerConfig,
    kind: Option<SamplerKind>,
    schedule: Option<ScheduleKind>,
    steps: usize,
    flow: Flow,
) -> Result<Box<dyn Sampler>> {
    let (kind, options) = config.choose(kind, schedule)?;
    let most = options.count("num_train_timesteps", 1000)?;
    if !(1..=most).contains(&steps) {
        return Err(Error::request("steps", format!("1 to {most}, the checkpoint's training timesteps"), steps));
    }
    match kind {
        SamplerKind::Ddim => ddim::build(&options, steps),
        SamplerKind::Euler => euler::build(&options, steps),
        SamplerKind::EulerAncestral => euler_ancestral::build(&options, steps),
        SamplerKind::Dpmpp2m => dpmpp_2m::build(&options, steps),
        SamplerKind::Pndm => pndm::build(&options, steps),
        SamplerKind::FlowMatchEuler => flow_match_euler::build(&options, steps, flow),
    }
}

/// The weighted sum of a clean sample and noise.
fn mixed(clean: &[f32], noise: &[f32], (clean_share, noise_share): (f32, f32)) -> Vec<f32> {
    clean.iter().zip(noise).map(|(clean, noise)| clean_share * clean + noise_share * noise).collect()
}

/// `steps` whole timesteps of the training schedule, falling, for samplers that look them up in it.
fn on_training_timesteps(spacing: Spacing, training: &Training, steps: usize, offset: usize) -> Result<Vec<usize>> {
    let timesteps: Vec<usize> = spacing
        .timesteps(training.timesteps(), steps, offset)
        .into_iter()
        .map(|timestep| timestep.round_ties_even() as usize)
        .collect();
    if timesteps[0] >= training.timesteps() {
        let limit = format!("so few that timestep {} is not needed, which the checkpoint lacks", timesteps[0]);
        return Err(Error::request("steps", limit, steps));
    }
    Ok(timesteps)
}
