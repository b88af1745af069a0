//! What a denoiser's output means, and how its guess of the clean picture is kept within bounds.

use super::options::{CONFIG_FILE, Options};
use crate::{Error, Result};

/// What the denoiser was trained to predict.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Prediction {
    /// The noise in the sample.
    Epsilon,
    /// The velocity of Salimans and Ho (2022): noise and picture, weighted by each other's share.
    Velocity,
    /// The clean picture.
    Sample,
}

impl Prediction {
    /// Reads `prediction_type`.
    pub(super) fn read(options: &Options) -> Result<Self> {
        options.choice(
            "prediction_type",
            Self::Epsilon,
            &[("epsilon", Self::Epsilon), ("v_prediction", Self::Velocity), ("sample", Self::Sample)],
        )
    }

    /// Reads `prediction_type` for a sampler that diffusers does not let predict the picture itself.
    pub(super) fn read_without_sample(options: &Options, sampler: &str) -> Result<Self> {
        match Self::read(options)? {
            Self::Sample => {
                let problem = format!("`prediction_type` must be epsilon or v_prediction for {sampler}, but is sample");
                Err(Error::checkpoint(CONFIG_FILE, problem))
            }
            prediction => Ok(prediction),
        }
    }
}

/// How a guess of the clean latent is kept within bounds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Bounds {
    /// As it is.
    None,
    /// Clipped to this distance from zero.
    Clip(f32),
    /// Dynamic thresholding (Saharia et al., "Photorealistic Text-to-Image Diffusion Models with Deep
    /// Language Understanding", 2022): clipped to a quantile of its own absolute values, then scaled to one.
    Threshold {
        /// The quantile.
        ratio: f32,
        /// The largest distance clipped to.
        most: f32,
    },
}

impl Bounds {
    /// Reads `thresholding` and its companions.
    pub(super) fn read_threshold(options: &Options) -> Result<Self> {
        if !options.flag("thresholding", false)? {
            return Ok(Self::None);
        }
        let ratio = options.number("dynamic_thresholding_ratio", 0.995)?;
        if !(0.0..=1.0).contains(&ratio) {
            let problem = format!("`dynamic_thresholding_ratio` must be 0 to 1, but is {ratio}");
            return Err(Error::checkpoint(CONFIG_FILE, problem));
        }
        Ok(Self::Threshold { ratio: ratio as f32, most: options.positive("sample_max_value", 1.0)? as f32 })
    }

    /// Bounds one row's guess in place.
    pub(super) fn apply(self, guess: &mut [f32]) {
        match self {
            Self::None => {}
            Self::Clip(range) => guess.iter_mut().for_each(|value| *value = value.clamp(-range, range)),
            Self::Threshold { ratio, most } => {
                let range = quantile(guess, ratio).max(1.0).min(most);
                guess.iter_mut().for_each(|value| *value = value.max(-range).min(range) / range);
            }
        }
    }
}

/// The quantile of the absolute values, between its neighbours as `torch.quantile` has it.
fn quantile(values: &[f32], ratio: f32) -> f32 {
    let mut sorted: Vec<f32> = values.iter().map(|value| value.abs()).collect();
    sorted.sort_unstable_by(f32::total_cmp);
    let Some(last) = sorted.len().checked_sub(1) else { return 0.0 };
    let rank = ratio * last as f32;
    let below = (rank as usize).min(last);
    let (low, high, share) = (sorted[below], sorted[(below + 1).min(last)], rank - below as f32);
    // From the nearer neighbour, as torch interpolates.
    if share < 0.5 { low + share * (high - low) } else { high - (high - low) * (1.0 - share) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn options(value: serde_json::Value) -> Options {
        Options::new(value.as_object().expect("an object").clone())
    }

    #[test]
    fn quantiles_lie_between_their_neighbours() {
        assert_eq!(quantile(&[-3.0, 1.0, 2.0], 0.5), 2.0);
        assert_eq!(quantile(&[4.0, -3.0, 1.0, 2.0], 0.5), 2.5);
        assert_eq!(quantile(&[4.0, -3.0], 1.0), 4.0);
        assert_eq!(quantile(&[], 0.5), 0.0);
    }

    #[test]
    fn thresholding_scales_a_bright_guess_to_one_and_leaves_a_dim_one() {
        let bounds = Bounds::Threshold { ratio: 1.0, most: 10.0 };
        let mut bright = [4.0, -2.0];
        bounds.apply(&mut bright);
        assert_eq!(bright, [1.0, -0.5]);
        let mut dim = [0.5, -0.25];
        bounds.apply(&mut dim);
        assert_eq!(dim, [0.5, -0.25]);
    }

    #[test]
    fn options_that_cannot_be_are_refused_by_name() {
        let error = Prediction::read(&options(json!({"prediction_type": "flow_prediction"}))).expect_err("not ours");
        assert!(error.to_string().contains("`prediction_type`"), "{error}");
        let sample = options(json!({"prediction_type": "sample"}));
        assert!(Prediction::read_without_sample(&sample, "pndm").is_err());
        let ratio = options(json!({"thresholding": true, "dynamic_thresholding_ratio": 2.0}));
        assert!(Bounds::read_threshold(&ratio).is_err());
    }
}
