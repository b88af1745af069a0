//! Euler's method on the probability flow: Karras et al., "Elucidating the Design Space of Diffusion-Based
//! Generative Models", 2022, algorithm 2 without churn. Follows diffusers' `scheduling_euler_discrete.py`, whose
//! defaults for missing options these are.

use super::options::Options;
use super::prediction::Prediction;
use super::sigmas::{Spacing, interpolate, logarithms, spread, timestep_of};
use super::training::{Training, evenly_spaced};
use super::{Sampler, config};
use crate::Result;
use crate::noise::NoiseSource;

struct Euler {
    levels: Levels,
    prediction: Prediction,
}

pub(super) fn build(options: &Options, steps: usize) -> Result<Box<dyn Sampler>> {
    let prediction = Prediction::read(options)?;
    Ok(Box::new(Euler { levels: Levels::build(options, prediction, steps)?, prediction }))
}

impl Sampler for Euler {
    fn timesteps(&self) -> &[f32] {
        &self.levels.timesteps
    }

    fn init_noise_sigma(&self) -> f32 {
        self.levels.init_noise_sigma
    }

    fn skip_calls(&mut self, count: usize) {
        self.levels.skip_calls(count);
    }

    fn add_noise(&self, call: usize, clean: &[f32], noise: &[f32]) -> Vec<f32> {
        self.levels.add_noise(call, clean, noise)
    }

    fn scale_model_input(&self, call: usize, sample: &[f32]) -> Vec<f32> {
        self.levels.scale_model_input(call, sample)
    }

    fn step(&mut self, call: usize, sample: &[f32], model_output: &[f32], _noise: &mut NoiseSource) -> Vec<f32> {
        let (sigma, next) = (self.levels.sigmas[call], self.levels.sigmas[call + 1]);
        euler_step(self.prediction, sample, model_output, sigma, next)
    }
}

/// The noise levels of a job and the timesteps at which the denoiser is told of them. Euler ancestral shares
/// them.
pub(super) struct Levels {
    /// One more than there are calls: each call goes from its level to the next.
    pub(super) sigmas: Vec<f32>,
    pub(super) timesteps: Vec<f32>,
    pub(super) init_noise_sigma: f32,
}

impl Levels {
    pub(super) fn build(options: &Options, prediction: Prediction, steps: usize) -> Result<Self> {
        let training = Training::with_finite_levels(options)?;
        let spacing = Spacing::read(options, Spacing::Linspace)?;
        let offset = options.count("steps_offset", 0)?;
        let table = training.sigmas();
        let logarithms = logarithms(&table);

        let evenly = spacing.timesteps(training.timesteps(), steps, offset);
        let mut timesteps: Vec<f32> = evenly.into_iter().map(|timestep| timestep as f32).collect();
        let log_linear = options.choice("interpolation_type", false, &[("linear", false), ("log_linear", true)])?;
        let mut sigmas: Vec<f64> = if log_linear {
            let (start, end) = (f64::from(logarithms[logarithms.len() - 1]), f64::from(logarithms[0]));
            evenly_spaced(start, end, steps + 1).into_iter().map(|level| f64::from(level.exp())).collect()
        } else {
            timesteps.iter().map(|timestep| interpolate(&table, f64::from(*timestep))).collect()
        };
        let highest = options.optional_positive("sigma_max")?.unwrap_or(sigmas[0]);
        let lowest = options.optional_positive("sigma_min")?.unwrap_or(sigmas[sigmas.len() - 1]);
        if let Some(levels) = spread(config::schedule(options)?, highest, lowest, steps) {
            timesteps = levels.iter().map(|sigma| timestep_of(*sigma, &logarithms) as f32).collect();
            sigmas = levels;
        }
        let mut sigmas: Vec<f32> = sigmas.into_iter().map(|sigma| sigma as f32).collect();
        sigmas.push(final_sigma(options, &table)?);
        if options.choice("timestep_type", false, &[("discrete", false), ("continuous", true)])?
            && prediction == Prediction::Velocity
        {
            timesteps = sigmas[..steps].iter().map(|sigma| 0.25 * sigma.ln()).collect();
        }
        let highest = sigmas.iter().copied().fold(0.0, f32::max);
        let init_noise_sigma = match spacing {
            Spacing::Leading => (highest * highest + 1.0).sqrt(),
            Spacing::Linspace | Spacing::Trailing => highest,
        };
        Ok(Self { sigmas, timesteps, init_noise_sigma })
    }

    pub(super) fn skip_calls(&mut self, count: usize) {
        self.sigmas.drain(..count);
        self.timesteps.drain(..count);
    }

    pub(super) fn add_noise(&self, call: usize, clean: &[f32], noise: &[f32]) -> Vec<f32> {
        clean.iter().zip(noise).map(|(clean, noise)| clean + noise * self.sigmas[call]).collect()
    }

    /// The denoiser sees samples of about unit deviation.
    pub(super) fn scale_model_input(&self, call: usize, sample: &[f32]) -> Vec<f32> {
        let sigma = self.sigmas[call];
        let deviation = (sigma * sigma + 1.0).sqrt();
        sample.iter().map(|value| value / deviation).collect()
    }
}

/// The level after the last step: `final_sigmas_type`.
pub(super) fn final_sigma(options: &Options, table: &[f32]) -> Result<f32> {
    options.choice("final_sigmas_type", 0.0, &[("zero", 0.0), ("sigma_min", table[0])])
}

/// One step along the line from the sample to the guess of the picture, from level `sigma` to level `next`.
pub(super) fn euler_step(
    prediction: Prediction,
    sample: &[f32],
    model_output: &[f32],
    sigma: f32,
    next: f32,
) -> Vec<f32> {
    let variance = sigma * sigma + 1.0;
    let output_weight = -sigma / variance.sqrt();
    let stride = next - sigma;
    let advance = |(x, output): (&f32, &f32)| {
        let picture = match prediction {
            Prediction::Epsilon => x - sigma * output,
            Prediction::Velocity => output * output_weight + x / variance,
            Prediction::Sample => *output,
        };
        let derivative = (x - picture) / sigma;
        x + derivative * stride
    };
    sample.iter().zip(model_output).map(advance).collect()
}
