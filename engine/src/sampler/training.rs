//! The noise schedule that a checkpoint was trained with: how much of the picture is left at each of its
//! timesteps (Ho et al., "Denoising Diffusion Probabilistic Models", 2020). Follows the constructors of
//! diffusers' schedulers (`scheduling_ddim.py` and its siblings) in f32, since the rounding of a value near
//! one decides the digits of the smallest noise levels.

use super::options::{Options, refuse};
use crate::Result;

/// More timesteps than any checkpoint has; keeps a wrong file from asking for all memory.
const MOST_TIMESTEPS: usize = 100_000;

/// The training schedule.
#[derive(Clone, Debug)]
pub(super) struct Training {
    /// The share of the picture's variance that is left at each timestep, falling: diffusers'
    /// `alphas_cumprod`.
    pub(super) remaining: Vec<f32>,
}

#[derive(Clone, Copy)]
enum BetaSchedule {
    Linear,
    ScaledLinear,
    SquaredCosine,
}

impl Training {
    /// Reads the schedule. `may_rescale`: whether the sampler's class knows `rescale_betas_zero_snr`.
    pub(super) fn new(options: &Options, may_rescale: bool) -> Result<Self> {
        let mut betas = betas(options)?;
        if may_rescale && rescales(options)? {
            betas = rescale_to_zero_terminal_snr(&betas);
        }
        Ok(Self { remaining: products(&betas) })
    }

    /// As [`Training::new`] for samplers that work on noise levels: a last timestep without any picture
    /// keeps 2^-24 of it, so that its level stays finite.
    pub(super) fn with_finite_levels(options: &Options) -> Result<Self> {
        let mut training = Self::new(options, true)?;
        if rescales(options)?
            && let Some(last) = training.remaining.last_mut()
        {
            *last = 2f32.powi(-24);
        }
        Ok(training)
    }

    /// How many timesteps there are.
    pub(super) fn timesteps(&self) -> usize {
        self.remaining.len()
    }

    /// The noise level of each timestep relative to the picture, rising: sigma.
    pub(super) fn sigmas(&self) -> Vec<f32> {
        self.remaining.iter().map(|remaining| ((1.0 - remaining) / remaining).sqrt()).collect()
    }
}

fn rescales(options: &Options) -> Result<bool> {
    options.flag("rescale_betas_zero_snr", false)
}

fn betas(options: &Options) -> Result<Vec<f32>> {
    let count = options.count("num_train_timesteps", 1000)?;
    if !(2..=MOST_TIMESTEPS).contains(&count) {
        return Err(refuse("num_train_timesteps", format!("2 to {MOST_TIMESTEPS}"), Some(&count.into())));
    }
    if let Some(trained) = options.numbers("trained_betas")? {
        if trained.len() != count {
            let limit = format!("{count} numbers, as `num_train_timesteps` says");
            return Err(refuse("trained_betas", limit, Some(&format!("{} numbers", trained.len()).into())));
        }
        return checked("trained_betas", trained.into_iter().map(|beta| beta as f32).collect());
    }
    let schedule = options.choice(
        "beta_schedule",
        BetaSchedule::Linear,
        &[
            ("linear", BetaSchedule::Linear),
            ("scaled_linear", BetaSchedule::ScaledLinear),
            ("squaredcos_cap_v2", BetaSchedule::SquaredCosine),
        ],
    )?;
    let (start, end) = (options.positive("beta_start", 0.0001)?, options.positive("beta_end", 0.02)?);
    let betas = match schedule {
        BetaSchedule::Linear => evenly_spaced(start, end, count),
        BetaSchedule::ScaledLinear => {
            evenly_spaced(start.sqrt(), end.sqrt(), count).into_iter().map(|root| root * root).collect()
        }
        BetaSchedule::SquaredCosine => squared_cosine(count),
    };
    checked("beta_end", betas)
}

/// Refuses a schedule that adds no noise, or leaves nothing of the picture, at some timestep.
fn checked(name: &str, betas: Vec<f32>) -> Result<Vec<f32>> {
    match betas.iter().find(|beta| !(**beta > 0.0 && **beta < 1.0)) {
        Some(beta) => Err(refuse(name, "so that every beta is between 0 and 1", Some(&f64::from(*beta).into()))),
        None => Ok(betas),
    }
}

/// `torch.linspace` in f32: from both ends towards the middle, with fused multiply-adds.
pub(super) fn evenly_spaced(start: f64, end: f64, count: usize) -> Vec<f32> {
    let (start, end) = (start as f32, end as f32);
    let step = (end - start) / (count - 1) as f32;
    let value = |index: usize| match index < count / 2 {
        true => step.mul_add(index as f32, start),
        false => (-step).mul_add((count - 1 - index) as f32, end),
    };
    (0..count).map(value).collect()
}

/// The cosine schedule of Nichol and Dhariwal (2021), each beta capped at 0.999.
fn squared_cosine(count: usize) -> Vec<f32> {
    let left = |time: f64| ((time + 0.008) / 1.008 * std::f64::consts::FRAC_PI_2).cos().powi(2);
    let beta = |index: usize| {
        let (before, after) = (index as f64 / count as f64, (index + 1) as f64 / count as f64);
        (1.0 - left(after) / left(before)).min(0.999) as f32
    };
    (0..count).map(beta).collect()
}

/// The products of 1 - beta up to each timestep, summed up in f64 as torch does.
fn products(betas: &[f32]) -> Vec<f32> {
    let mut product = 1.0_f64;
    let mut next = |beta: &f32| {
        product *= f64::from(1.0 - beta);
        product as f32
    };
    betas.iter().map(&mut next).collect()
}

/// Shifts and scales the schedule so that nothing of the picture is left at its last timestep (Lin et al.,
/// "Common Diffusion Noise Schedules and Sample Steps are Flawed", 2024, algorithm 1).
fn rescale_to_zero_terminal_snr(betas: &[f32]) -> Vec<f32> {
    let mut roots: Vec<f32> = products(betas).into_iter().map(f32::sqrt).collect();
    let (Some(&first), Some(&last)) = (roots.first(), roots.last()) else { return Vec::new() };
    let scale = first / (first - last);
    for root in &mut roots {
        *root = (*root - last) * scale;
    }
    let left: Vec<f32> = roots.into_iter().map(|root| root * root).collect();
    let ratios = left.windows(2).map(|pair| 1.0 - pair[1] / pair[0]);
    std::iter::once(1.0 - left[0]).chain(ratios).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn training(value: Value) -> Result<Training> {
        Training::new(&Options::new(value.as_object().expect("an object").clone()), true)
    }

    #[test]
    fn the_picture_fades_over_the_timesteps() {
        for schedule in ["linear", "scaled_linear", "squaredcos_cap_v2"] {
            let training = training(json!({"beta_schedule": schedule})).expect("a known schedule");
            assert_eq!(training.timesteps(), 1000);
            assert!(training.remaining.windows(2).all(|pair| pair[0] > pair[1] && pair[1] > 0.0), "{schedule}");
            assert!(training.sigmas().windows(2).all(|pair| pair[0] < pair[1]), "{schedule}");
        }
    }

    #[test]
    fn rescaling_leaves_nothing_at_the_last_timestep_and_the_first_as_it_was() {
        let plain = training(json!({})).expect("defaults");
        let rescaled = training(json!({"rescale_betas_zero_snr": true})).expect("defaults");
        assert!((plain.remaining[0] - rescaled.remaining[0]).abs() < 1e-6);
        assert_eq!(rescaled.remaining.last(), Some(&0.0));
    }

    #[test]
    fn schedules_that_cannot_be_are_refused_by_name() {
        for (value, name) in [
            (json!({"num_train_timesteps": 0}), "num_train_timesteps"),
            (json!({"num_train_timesteps": 1_000_000_000_u64}), "num_train_timesteps"),
            (json!({"beta_schedule": "sigmoid"}), "beta_schedule"),
            (json!({"beta_start": -0.1}), "beta_start"),
            (json!({"beta_end": 1.5}), "beta_end"),
            (json!({"trained_betas": [0.1, 0.2]}), "trained_betas"),
            (json!({"trained_betas": [0.1, 2.0], "num_train_timesteps": 2}), "trained_betas"),
        ] {
            let error = training(value.clone()).expect_err("no such schedule").to_string();
            assert!(error.contains(&format!("`{name}`")), "{value}: {error}");
        }
    }
}
