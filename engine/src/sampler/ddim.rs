//! DDIM: Song, Meng and Ermon, "Denoising Diffusion Implicit Models", 2021, without added noise (eta 0).
//! Follows diffusers' `scheduling_ddim.py`, whose defaults for missing options these are.

use super::options::{CONFIG_FILE, Options};
use super::prediction::{Bounds, Prediction};
use super::sigmas::Spacing;
use super::training::Training;
use super::{Sampler, mixed, on_training_timesteps};
use crate::noise::NoiseSource;
use crate::{Error, Result};

struct Ddim {
    timesteps: Vec<f32>,
    /// For each call the share of the picture before it and after it.
    remaining: Vec<(f32, f32)>,
    prediction: Prediction,
    bounds: Bounds,
}

pub(super) fn build(options: &Options, steps: usize) -> Result<Box<dyn Sampler>> {
    let training = Training::new(options, true)?;
    let spacing = Spacing::read(options, Spacing::Leading)?;
    let timesteps = on_training_timesteps(spacing, &training, steps, options.count("steps_offset", 0)?)?;
    let last = if options.flag("set_alpha_to_one", true)? { 1.0 } else { training.remaining[0] };
    let stride = training.timesteps() / steps;
    let prediction = Prediction::read(options)?;
    if prediction == Prediction::Epsilon && training.remaining[timesteps[0]] == 0.0 {
        let problem = "`prediction_type` must be v_prediction or sample where `rescale_betas_zero_snr` leaves nothing of \
                       the picture at the first step, but is epsilon";
        return Err(Error::checkpoint(CONFIG_FILE, problem));
    }
    let remaining = timesteps
        .iter()
        .map(|&timestep| {
            let after = timestep.checked_sub(stride).map_or(last, |after| training.remaining[after]);
            (training.remaining[timestep], after)
        })
        .collect();
    let mut bounds = Bounds::read_threshold(options)?;
    if bounds == Bounds::None && options.flag("clip_sample", true)? {
        bounds = Bounds::Clip(options.positive("clip_sample_range", 1.0)? as f32);
    }
    Ok(Box::new(Ddim {
        timesteps: timesteps.into_iter().map(|timestep| timestep as f32).collect(),
        remaining,
        prediction,
        bounds,
    }))
}

impl Sampler for Ddim {
    fn timesteps(&self) -> &[f32] {
        &self.timesteps
    }

    fn init_noise_sigma(&self) -> f32 {
        1.0
    }

    fn skip_calls(&mut self, count: usize) {
        self.timesteps.drain(..count);
        self.remaining.drain(..count);
    }

    fn add_noise(&self, call: usize, clean: &[f32], noise: &[f32]) -> Vec<f32> {
        let (before, _) = self.remaining[call];
        mixed(clean, noise, (before.sqrt(), (1.0 - before).sqrt()))
    }

    fn scale_model_input(&self, _call: usize, sample: &[f32]) -> Vec<f32> {
        sample.to_vec()
    }

    fn step(&mut self, call: usize, sample: &[f32], model_output: &[f32], _noise: &mut NoiseSource) -> Vec<f32> {
        let (before, after) = self.remaining[call];
        let (picture_share, noise_share) = (before.sqrt(), (1.0 - before).sqrt());
        let pairs = || sample.iter().zip(model_output);
        // Formula (12) of the paper: the guess of the picture, then the way back to the next noise level.
        let mut picture: Vec<f32> = match self.prediction {
            Prediction::Epsilon => pairs().map(|(x, noise)| (x - noise_share * noise) / picture_share).collect(),
            Prediction::Velocity => pairs().map(|(x, v)| picture_share * x - noise_share * v).collect(),
            Prediction::Sample => model_output.to_vec(),
        };
        let noise: Vec<f32> = match self.prediction {
            Prediction::Epsilon => model_output.to_vec(),
            Prediction::Velocity => pairs().map(|(x, v)| picture_share * v + noise_share * x).collect(),
            Prediction::Sample => pairs().map(|(x, guess)| (x - picture_share * guess) / noise_share).collect(),
        };
        self.bounds.apply(&mut picture);
        let (picture_share, noise_share) = (after.sqrt(), (1.0 - after).sqrt());
        picture.iter().zip(&noise).map(|(picture, noise)| picture_share * picture + noise_share * noise).collect()
    }
}
