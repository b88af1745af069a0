//! Numbers and pooled prompts as the vectors that a denoiser's blocks listen to.
//!
//! Reference: <https://github.com/huggingface/diffusers/blob/v0.36.0/src/diffusers/models/embeddings.py>
//! (`get_timestep_embedding`, `TimestepEmbedding`, `PixArtAlphaTextProjection`).

use crate::Result;
use crate::ops::{Activation, Linear, Place, Tensor};
use crate::weights::Scope;

/// How a number becomes sinusoids.
#[derive(Clone, Copy, Debug)]
pub(super) struct Waves {
    pub width: usize,
    /// Cosines before sines.
    pub flip_sin_to_cos: bool,
    pub freq_shift: f64,
}

impl Waves {
    /// `width` values for each of `numbers`, one after the other. Computed in f32 whatever the model's
    /// format: half precision cannot tell steps apart.
    pub fn of(self, numbers: &[f32]) -> Vec<f32> {
        let Self { width, flip_sin_to_cos, freq_shift } = self;
        numbers.iter().flat_map(|number| sinusoid(*number, width, flip_sin_to_cos, freq_shift)).collect()
    }
}

/// Two linear layers with a SiLU between them.
pub(super) struct VectorEmbedding {
    linear_1: Linear,
    linear_2: Linear,
    inputs: usize,
}

impl VectorEmbedding {
    pub fn load(scope: &Scope<'_>, inputs: usize, outputs: usize) -> Result<Self> {
        Ok(Self {
            linear_1: scope.at("linear_1").linear_then(inputs, outputs, Activation::Silu)?,
            linear_2: scope.at("linear_2").linear(outputs, outputs)?,
            inputs,
        })
    }

    /// (rows, inputs) → (rows, outputs).
    pub fn forward(&self, vectors: &Tensor) -> Result<Tensor> {
        self.linear_2.forward(&self.linear_1.forward(vectors)?)
    }

    /// As [`VectorEmbedding::forward`], plus `other` (rows, outputs).
    pub fn forward_add(&self, vectors: &Tensor, other: &Tensor) -> Result<Tensor> {
        self.linear_2.forward_add(&self.linear_1.forward(vectors)?, other)
    }

    /// The rows of `values`, inputs after inputs, → (rows, outputs).
    pub fn forward_values(&self, values: &[f32], place: &Place) -> Result<Tensor> {
        self.forward(&Tensor::new(values, &[values.len() / self.inputs, self.inputs], place)?)
    }
}

/// Sines, then cosines (or the other way round) of the timestep at `width / 2` frequencies from 1 down
/// to 1/10000.
fn sinusoid(timestep: f32, width: usize, flip_sin_to_cos: bool, freq_shift: f64) -> Vec<f32> {
    let half = width / 2;
    let step = -(10_000f64.ln()) as f32;
    let span = (half as f64 - freq_shift) as f32;
    let angles: Vec<f32> = (0..half).map(|index| timestep * (step * index as f32 / span).exp()).collect();
    let sines = angles.iter().map(|angle| angle.sin());
    let cosines = angles.iter().map(|angle| angle.cos());
    let mut waves: Vec<f32> =
        if flip_sin_to_cos { cosines.chain(sines).collect() } else { sines.chain(cosines).collect() };
    waves.resize(width, 0.0);
    waves
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_halves_are_cosines_and_sines_of_falling_frequencies() {
        let waves = sinusoid(3.0, 6, true, 0.0);
        let frequencies = [1f32, 10_000f32.powf(-1.0 / 3.0), 10_000f32.powf(-2.0 / 3.0)];
        for (index, frequency) in frequencies.into_iter().enumerate() {
            assert!((waves[index] - (3.0 * frequency).cos()).abs() < 1e-6);
            assert!((waves[3 + index] - (3.0 * frequency).sin()).abs() < 1e-6);
        }
        assert_eq!(sinusoid(3.0, 6, false, 0.0)[..3], waves[3..]);
    }

    #[test]
    fn an_odd_width_ends_with_a_zero() {
        assert_eq!(sinusoid(1.0, 5, true, 0.0).len(), 5);
        assert_eq!(sinusoid(1.0, 5, true, 0.0)[4], 0.0);
    }
}
