//! Euler ancestral: Euler's method to a level below the next one, and fresh noise back up to it, as Katherine
//! Crowson's k-diffusion has it (`sampling.py`, `sample_euler_ancestral`). Follows diffusers'
//! `scheduling_euler_ancestral_discrete.py`, whose defaults for missing options these are.
//!
//! diffusers knows only the normal schedule here. k-diffusion's users run it on Karras levels too, and so may
//! requests: `karras`, `exponential` and `beta` take the levels that [`euler`](super::euler) would.

use super::Sampler;
use super::euler::{Levels, euler_step};
use super::options::Options;
use super::prediction::Prediction;
use crate::Result;
use crate::noise::NoiseSource;

struct EulerAncestral {
    levels: Levels,
    prediction: Prediction,
}

pub(super) fn build(options: &Options, steps: usize) -> Result<Box<dyn Sampler>> {
    let prediction = Prediction::read_without_sample(options, "euler_ancestral")?;
    Ok(Box::new(EulerAncestral { levels: Levels::build(options, prediction, steps)?, prediction }))
}

impl Sampler for EulerAncestral {
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

    fn step(&mut self, call: usize, sample: &[f32], model_output: &[f32], noise: &mut NoiseSource) -> Vec<f32> {
        let (from, to) = (self.levels.sigmas[call], self.levels.sigmas[call + 1]);
        let up = (to * to * (from * from - to * to) / (from * from)).sqrt();
        let down = (to * to - up * up).sqrt();
        let mut next = euler_step(self.prediction, sample, model_output, from, down);
        // Drawn at the last step too, where its weight is zero, as diffusers does.
        for (value, fresh) in next.iter_mut().zip(noise.normal(sample.len())) {
            *value += fresh * up;
        }
        next
    }
}
