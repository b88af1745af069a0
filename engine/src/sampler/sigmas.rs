//! Which timesteps and noise levels the steps of a job visit: the spacings of Table 2 of Lin et al.
//! ("Common Diffusion Noise Schedules and Sample Steps are Flawed", 2024) and the schedules of noise levels,
//! as `set_timesteps`, `_convert_to_karras`, `_convert_to_exponential`, `_convert_to_beta` and `_sigma_to_t` of
//! diffusers' `scheduling_euler_discrete.py` have them. numpy computes these in f64, and so do we.

use super::ScheduleKind;
use super::options::Options;
use crate::Result;

/// How timesteps are spread over the training schedule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Spacing {
    /// From the last timestep to the first, both included.
    Linspace,
    /// Multiples of a whole stride, from the first timestep.
    Leading,
    /// Multiples of a fractional stride down from the last timestep.
    Trailing,
}

impl Spacing {
    /// Reads `timestep_spacing`.
    pub(super) fn read(options: &Options, default: Self) -> Result<Self> {
        options.choice(
            "timestep_spacing",
            default,
            &[("linspace", Self::Linspace), ("leading", Self::Leading), ("trailing", Self::Trailing)],
        )
    }

    /// `steps` timesteps of `0..training`, falling; whole numbers unless the spacing is linspace.
    pub(super) fn timesteps(self, training: usize, steps: usize, offset: usize) -> Vec<f64> {
        match self {
            Self::Linspace => {
                let mut rising = linspace(0.0, (training - 1) as f64, steps);
                rising.reverse();
                rising
            }
            Self::Leading => (0..steps).rev().map(|index| (index * (training / steps) + offset) as f64).collect(),
            Self::Trailing => trailing(training as f64, training as f64 / steps as f64, steps),
        }
    }
}

/// Multiples of `stride` down from `last`, rounded, less one; at most `most` of them.
///
/// numpy's `arange`, which diffusers takes here, overshoots for some strides (1000 timesteps in 61 steps) and
/// gives one more, -1, which diffusers then reads as the last timestep. Those pictures are broken;
/// here a job of 61 steps has 61.
pub(super) fn trailing(last: f64, stride: f64, most: usize) -> Vec<f64> {
    let count = (last / stride).ceil() as usize;
    // The second value is rounded before the stride is taken from it, as numpy does.
    let stride = last - (last - stride);
    (0..count.min(most)).map(|index| (last - index as f64 * stride).round_ties_even() - 1.0).collect()
}

/// `count` values from `start` to `end`, both included; one value is `start`.
pub(super) fn linspace(start: f64, end: f64, count: usize) -> Vec<f64> {
    let stride = if count > 1 { (end - start) / (count - 1) as f64 } else { 0.0 };
    let mut values: Vec<f64> = (0..count).map(|index| start + index as f64 * stride).collect();
    if count > 1 {
        values[count - 1] = end;
    }
    values
}

/// The value of `table` at a fractional index, between its neighbours; the ends beyond them.
pub(super) fn interpolate(table: &[f32], index: f64) -> f64 {
    let last = table.len() - 1;
    if index >= last as f64 {
        return f64::from(table[last]);
    }
    let below = index.max(0.0) as usize;
    let (low, high) = (f64::from(table[below]), f64::from(table[below + 1]));
    (high - low) * (index.max(0.0) - below as f64) + low
}

/// `steps` noise levels from `highest` down to `lowest`; `None` for the normal schedule, which has no formula
/// of its own but takes the training schedule's levels.
pub(super) fn spread(schedule: ScheduleKind, highest: f64, lowest: f64, steps: usize) -> Option<Vec<f64>> {
    match schedule {
        ScheduleKind::Normal => None,
        ScheduleKind::Karras => {
            const RHO: f64 = 7.0;
            let (start, end) = (highest.powf(1.0 / RHO), lowest.powf(1.0 / RHO));
            let level = |share: f64| (start + share * (end - start)).powf(RHO);
            Some(linspace(0.0, 1.0, steps).into_iter().map(level).collect())
        }
        ScheduleKind::Exponential => {
            Some(linspace(highest.ln(), lowest.ln(), steps).into_iter().map(f64::exp).collect())
        }
        ScheduleKind::Beta => {
            let level = |share: f64| lowest + beta_quantile(1.0 - share) * (highest - lowest);
            Some(linspace(0.0, 1.0, steps).into_iter().map(level).collect())
        }
    }
}

/// The fractional timestep whose noise level is `sigma`, found in the logarithms of the training schedule's
/// levels; the ends beyond them.
pub(super) fn timestep_of(sigma: f64, log_sigmas: &[f32]) -> f64 {
    let wanted = sigma.max(1e-10).ln();
    let at_most = log_sigmas.partition_point(|level| f64::from(*level) <= wanted);
    let below = at_most.saturating_sub(1).min(log_sigmas.len() - 2);
    let (low, high) = (f64::from(log_sigmas[below]), f64::from(log_sigmas[below + 1]));
    let share = ((low - wanted) / (low - high)).clamp(0.0, 1.0);
    (1.0 - share) * below as f64 + share * (below + 1) as f64
}

/// The natural logarithms, correctly rounded.
pub(super) fn logarithms(sigmas: &[f32]) -> Vec<f32> {
    sigmas.iter().map(|sigma| f64::from(*sigma).ln() as f32).collect()
}

/// Both parameters of the beta distribution of "Beta Sampling is All You Need" (Lee et al., 2024).
const BETA_SHAPE: f64 = 0.6;

/// The value below which a share `probability` of the distribution Beta(0.6, 0.6) lies.
///
/// The distribution is symmetric, so the lower half is enough; there Newton's method, kept inside a
/// shrinking bracket, inverts the power series of the incomplete beta function (DLMF 8.17.7).
fn beta_quantile(probability: f64) -> f64 {
    if probability > 0.5 {
        return 1.0 - beta_quantile(1.0 - probability);
    }
    if probability <= 0.0 {
        return 0.0;
    }
    let whole = 2.0 * incomplete_beta(0.5);
    let (mut low, mut high) = (0.0_f64, 0.5_f64);
    // The series' first term alone gives a close guess.
    let mut value = (probability * whole * BETA_SHAPE).powf(1.0 / BETA_SHAPE).min(0.5);
    for _ in 0..100 {
        let excess = incomplete_beta(value) - probability * whole;
        if excess > 0.0 {
            high = value;
        } else {
            low = value;
        }
        let slope = (value * (1.0 - value)).powf(BETA_SHAPE - 1.0);
        let newton = value - excess / slope;
        let next = if newton > low && newton < high { newton } else { 0.5 * (low + high) };
        if (next - value).abs() <= 1e-16 * value {
            break;
        }
        value = next;
    }
    value
}

/// The integral of t^(a-1) (1-t)^(a-1) from 0 to `value` for a = 0.6, `value` in 0..=0.5.
fn incomplete_beta(value: f64) -> f64 {
    let mut power = value.powf(BETA_SHAPE);
    let mut sum = power / BETA_SHAPE;
    for index in 1..200 {
        let index = f64::from(index);
        power *= (index - BETA_SHAPE) / index * value;
        let term = power / (BETA_SHAPE + index);
        sum += term;
        if term <= 1e-18 * sum {
            break;
        }
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_spacing_visits_the_timesteps_of_its_definition() {
        assert_eq!(Spacing::Linspace.timesteps(1000, 4, 0), [999.0, 666.0, 333.0, 0.0]);
        assert_eq!(Spacing::Leading.timesteps(1000, 4, 1), [751.0, 501.0, 251.0, 1.0]);
        assert_eq!(Spacing::Trailing.timesteps(1000, 4, 0), [999.0, 749.0, 499.0, 249.0]);
        assert_eq!(Spacing::Linspace.timesteps(1000, 1, 0), [0.0]);
    }

    #[test]
    fn trailing_spacing_never_has_a_timestep_too_many() {
        for steps in 1..=1000 {
            let timesteps = Spacing::Trailing.timesteps(1000, steps, 0);
            assert_eq!(timesteps.len(), steps);
            assert!(timesteps.iter().all(|timestep| (0.0..1000.0).contains(timestep)), "{steps} steps");
        }
    }

    #[test]
    fn schedules_fall_from_the_highest_to_the_lowest_level() {
        for schedule in [ScheduleKind::Karras, ScheduleKind::Exponential, ScheduleKind::Beta] {
            let levels = spread(schedule, 14.6, 0.03, 25).expect("a formula");
            assert!((levels[0] - 14.6).abs() < 1e-12 && (levels[24] - 0.03).abs() < 1e-12, "{schedule}");
            assert!(levels.windows(2).all(|pair| pair[0] > pair[1]), "{schedule}");
            let single = spread(schedule, 14.6, 0.03, 1).expect("a formula");
            assert!((single[0] - 14.6).abs() < 1e-12, "{schedule}");
        }
    }

    #[test]
    fn beta_quantiles_are_scipys() {
        // scipy.stats.beta.ppf(p, 0.6, 0.6)
        for (probability, expected) in BETA_QUANTILES {
            let found = beta_quantile(probability);
            assert!((found - expected).abs() < 1e-13, "{probability}: {found} is not {expected}");
        }
    }

    #[test]
    fn a_timestep_is_found_again_by_its_noise_level() {
        let sigmas: Vec<f32> = (0..100).map(|index| 0.03 * 1.06_f32.powi(index)).collect();
        let logarithms = logarithms(&sigmas);
        for index in [0, 1, 42, 98, 99] {
            assert!((timestep_of(f64::from(sigmas[index]), &logarithms) - index as f64).abs() < 1e-4);
        }
        assert_eq!(timestep_of(1e9, &logarithms), 99.0);
        assert_eq!(timestep_of(0.0, &logarithms), 0.0);
        assert!((interpolate(&sigmas, 41.5) - f64::from(sigmas[41] + sigmas[42]) / 2.0).abs() < 1e-6);
    }

    const BETA_QUANTILES: [(f64, f64); 12] = [
        (0.0, 0.0),
        (1e-09, 1.85588246249141e-15),
        (0.001, 1.855873851745199e-05),
        (0.03125, 0.005745688289517456),
        (0.25, 0.17568037865269498),
        (0.4999, 0.49986127490549975),
        (0.5, 0.5000000000000001),
        (0.5001, 0.5001387250945002),
        (0.75, 0.824319621347305),
        (0.97, 0.9946317188159646),
        (0.999999, 0.9999999998144118),
        (1.0, 1.0),
    ];
}
