//! What the encoder says of a picture: a normal distribution of each latent value.
//!
//! Reference: <https://github.com/huggingface/diffusers/blob/v0.36.0/src/diffusers/models/autoencoders/vae.py>
//! (`DiagonalGaussianDistribution`).

use crate::noise::NoiseSource;

/// One picture's latent as (channels · height · width) means and logarithms of variances.
pub(crate) struct Gaussian {
    pub mean: Vec<f32>,
    pub log_variance: Vec<f32>,
}

impl Gaussian {
    /// From the encoder's values: as many means as logarithms.
    pub(super) fn new(values: &[f32]) -> Self {
        let (mean, log_variance) = values.split_at(values.len() / 2);
        // `clamp` keeps what is no number.
        let log_variance = log_variance.iter().map(|value| value.clamp(-30.0, 20.0)).collect();
        Self { mean: mean.to_vec(), log_variance }
    }

    /// The likeliest latent.
    pub fn mode(self) -> Vec<f32> {
        self.mean
    }

    /// A latent drawn with the next of the row's noise.
    pub fn sample(self, noise: &mut NoiseSource) -> Vec<f32> {
        let draws = noise.normal(self.mean.len());
        let spread = self.log_variance.iter().map(|value| (0.5 * value).exp());
        self.mean.iter().zip(spread).zip(draws).map(|((mean, spread), draw)| mean + spread * draw).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sample_is_the_mean_plus_noise_as_wide_as_the_clamped_variance_says() {
        let gaussian = || Gaussian::new(&[1.0, 2.0, 3.0, 0.0, 200.0, -200.0]);
        assert_eq!(gaussian().mode(), [1.0, 2.0, 3.0]);
        let noise = NoiseSource::new(7).normal(3);
        let got = gaussian().sample(&mut NoiseSource::new(7));
        assert_eq!(got[0], 1.0 + noise[0]);
        assert_eq!(got[1], 2.0 + 10f32.exp() * noise[1]);
        assert_eq!(got[2], 3.0 + (-15f32).exp() * noise[2]);
    }
}
