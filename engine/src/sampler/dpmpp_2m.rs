//! DPM-Solver++, multistep: Lu et al., "DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic
//! Models", 2022. Second order unless the checkpoint asks for the first or third, and with added noise where
//! it asks for `sde-dpmsolver++`. Follows diffusers' `scheduling_dpmsolver_multistep.py`, whose defaults for missing
//! options these are.
//!
//! Of that file's options these are refused, as no Stable Diffusion checkpoint needs them: `algorithm_type`
//! `dpmsolver` and `sde-dpmsolver` (which diffusers deprecates), flow matching, and learned variances.

use std::collections::VecDeque;

use super::euler::final_sigma;
use super::options::{Options, refuse};
use super::prediction::{Bounds, Prediction};
use super::sigmas::{Spacing, interpolate, linspace, logarithms, spread, timestep_of, trailing};
use super::training::Training;
use super::{Sampler, config, mixed};
use crate::noise::NoiseSource;
use crate::{Error, Result};

/// In jobs of fewer steps than this the last ones are of lower order.
const FEW_STEPS: usize = 15;

struct Dpmpp2m {
    timesteps: Vec<f32>,
    /// One more than there are calls: each call goes from its level to the next.
    levels: Vec<Level>,
    prediction: Prediction,
    bounds: Bounds,
    solver: Solver,
    /// The guesses of the picture at the latest calls, latest last.
    guesses: VecDeque<Vec<f32>>,
}

/// How a step extrapolates.
struct Solver {
    order: usize,
    /// Calls of the whole schedule, whether or not a row takes all of them.
    steps: usize,
    heun: bool,
    stochastic: bool,
    lower_order_final: bool,
    euler_at_final: bool,
    ends_at_zero: bool,
}

/// A noise level in the variance preserving form that the paper uses.
#[derive(Clone, Copy)]
struct Level {
    /// The picture's weight.
    alpha: f32,
    /// The noise's weight.
    sigma: f32,
    /// Half the logarithm of the signal to noise ratio.
    lambda: f32,
}

impl Level {
    fn new(sigma: f32) -> Self {
        let alpha = 1.0 / (sigma * sigma + 1.0).sqrt();
        let sigma = sigma * alpha;
        Self { alpha, sigma, lambda: alpha.ln() - sigma.ln() }
    }
}

pub(super) fn build(options: &Options, steps: usize) -> Result<Box<dyn Sampler>> {
    for name in ["use_flow_sigmas", "use_dynamic_shifting", "variance_type"] {
        options.must_be_off(name)?;
    }
    let order = options.count("solver_order", 2)?;
    if !(1..=3).contains(&order) {
        return Err(refuse("solver_order", "1, 2 or 3", Some(&order.into())));
    }
    let (timesteps, sigmas) = schedule(options, steps)?;
    let solver = Solver {
        order,
        steps: timesteps.len(),
        // diffusers reads other solvers' words as its own where it stands in for them.
        heun: options.choice(
            "solver_type",
            false,
            &[("midpoint", false), ("heun", true), ("logrho", false), ("bh1", false), ("bh2", false)],
        )?,
        stochastic: options.choice(
            "algorithm_type",
            false,
            &[("dpmsolver++", false), ("sde-dpmsolver++", true), ("deis", false)],
        )?,
        lower_order_final: options.flag("lower_order_final", true)?,
        euler_at_final: options.flag("euler_at_final", false)?,
        ends_at_zero: options.choice("final_sigmas_type", true, &[("zero", true), ("sigma_min", false)])?,
    };
    Ok(Box::new(Dpmpp2m {
        timesteps,
        levels: sigmas.into_iter().map(Level::new).collect(),
        prediction: Prediction::read(options)?,
        bounds: Bounds::read_threshold(options)?,
        solver,
        guesses: VecDeque::new(),
    }))
}

/// The timesteps that the denoiser is told and the noise levels, one more.
fn schedule(options: &Options, steps: usize) -> Result<(Vec<f32>, Vec<f32>)> {
    let training = Training::with_finite_levels(options)?;
    let table = training.sigmas();
    let logarithms = logarithms(&table);
    let (lowest, highest) = (f64::from(table[0]), f64::from(table[table.len() - 1]));
    let lowest = options.optional_positive("sigma_min")?.unwrap_or(lowest);
    let highest = options.optional_positive("sigma_max")?.unwrap_or(highest);
    // The timesteps are told as whole numbers, though only those of a cosine schedule are cut and not rounded.
    let cosine = options.choice(
        "beta_schedule",
        false,
        &[("linear", false), ("scaled_linear", false), ("squaredcos_cap_v2", true)],
    )?;
    let rounded = |sigma: &f64| {
        let timestep = timestep_of(*sigma, &logarithms);
        if cosine { timestep } else { timestep.round_ties_even() }
    };
    let kind = config::schedule(options)?;
    let uniform_lambdas = options.flag("use_lu_lambdas", false)?;

    let (timesteps, mut sigmas): (Vec<f64>, Vec<f64>) = match spread(kind, highest, lowest, steps) {
        Some(levels) if kind == super::ScheduleKind::Karras => (levels.iter().map(rounded).collect(), levels),
        _ if uniform_lambdas => {
            let (highest, lowest) = (f64::from(logarithms[logarithms.len() - 1]), f64::from(logarithms[0]));
            let share = |share: f64| (highest + share * (lowest - highest)).exp();
            let levels: Vec<f64> = linspace(0.0, 1.0, steps).into_iter().map(share).collect();
            (levels.iter().map(rounded).collect(), levels)
        }
        Some(levels) => (levels.iter().map(|sigma| timestep_of(*sigma, &logarithms)).collect(), levels),
        None => {
            let timesteps = even_timesteps(options, &training, steps)?;
            let levels = timesteps.iter().map(|timestep| interpolate(&table, *timestep)).collect();
            (timesteps, levels)
        }
    };
    if sigmas.windows(2).any(|pair| pair[0] <= pair[1]) {
        let limit = "so few for dpmpp_2m that no two of them share a noise level of this checkpoint";
        return Err(Error::request("steps", limit, steps));
    }
    sigmas.push(f64::from(final_sigma(options, &table)?));
    let whole = timesteps.into_iter().map(|timestep| timestep.trunc() as f32).collect();
    Ok((whole, sigmas.into_iter().map(|sigma| sigma as f32).collect()))
}

/// Evenly spaced timesteps, whole and falling. Unlike other samplers' they leave out the first timestep, where
/// the last step ends.
fn even_timesteps(options: &Options, training: &Training, steps: usize) -> Result<Vec<f64>> {
    let clipped = options.number("lambda_min_clipped", f64::NEG_INFINITY)? as f32;
    let lambda = |remaining: &f32| remaining.sqrt().ln() - (1.0 - remaining).sqrt().ln();
    let too_noisy = training.remaining.iter().filter(|remaining| lambda(remaining) < clipped).count();
    let last = training.timesteps() - too_noisy;
    if last == 0 {
        return Err(refuse("lambda_min_clipped", "so low that some timestep is left", Some(&clipped.into())));
    }
    let offset = options.count("steps_offset", 0)?;
    Ok(match Spacing::read(options, Spacing::Linspace)? {
        Spacing::Linspace => {
            let rising = linspace(0.0, (last - 1) as f64, steps + 1);
            rising[1..].iter().rev().map(|timestep| timestep.round_ties_even()).collect()
        }
        Spacing::Leading => (1..=steps).rev().map(|index| (index * (last / (steps + 1)) + offset) as f64).collect(),
        Spacing::Trailing => trailing(last as f64, training.timesteps() as f64 / steps as f64, steps),
    })
}

impl Dpmpp2m {
    /// The guess of the picture that the output stands for.
    fn guess(&self, level: Level, sample: &[f32], model_output: &[f32]) -> Vec<f32> {
        let pairs = sample.iter().zip(model_output);
        let mut guess: Vec<f32> = match self.prediction {
            Prediction::Epsilon => pairs.map(|(x, noise)| (x - level.sigma * noise) / level.alpha).collect(),
            Prediction::Velocity => pairs.map(|(x, v)| level.alpha * x - level.sigma * v).collect(),
            Prediction::Sample => model_output.to_vec(),
        };
        self.bounds.apply(&mut guess);
        guess
    }

    /// The order of a call: no more than there are guesses, and lower at the end of a short job.
    fn order(&self, call: usize) -> usize {
        let short = self.solver.lower_order_final && self.solver.steps < FEW_STEPS;
        let left = self.timesteps.len() - call;
        let most = match left {
            1 if self.solver.euler_at_final || short || self.solver.ends_at_zero => 1,
            2 if short => 2,
            _ => self.solver.order,
        };
        most.min(self.guesses.len())
    }

    /// The weights of the sample, of the latest guess, and of its first and second differences.
    fn weights(&self, from: Level, to: Level, order: usize) -> [f32; 4] {
        let h = to.lambda - from.lambda;
        if self.solver.stochastic {
            let decay = (-2.0 * h).exp();
            let guess = to.alpha * (1.0 - decay);
            let first = match (order, self.solver.heun) {
                (1, _) => 0.0,
                (2, false) => 0.5 * guess,
                _ => to.alpha * ((1.0 - decay) / (-2.0 * h) + 1.0),
            };
            let second = match order {
                3 => to.alpha * ((1.0 - decay - 2.0 * h) / (2.0 * h * (2.0 * h)) - 0.5),
                _ => 0.0,
            };
            return [to.sigma / from.sigma * (-h).exp(), guess, first, second];
        }
        let growth = (-h).exp() - 1.0;
        let guess = -(to.alpha * growth);
        let first = match (order, self.solver.heun) {
            (1, _) => 0.0,
            (2, false) => 0.5 * guess,
            _ => to.alpha * (growth / h + 1.0),
        };
        let second = match order {
            3 => -(to.alpha * ((growth + h) / (h * h) - 0.5)),
            _ => 0.0,
        };
        [to.sigma / from.sigma, guess, first, second]
    }

    /// The first and second differences of the guesses at the index, scaled to the step that is taken.
    fn differences(&self, call: usize, order: usize, index: usize) -> (f32, f32) {
        let lambda = |index: usize| self.levels[index].lambda;
        let h = lambda(call + 1) - lambda(call);
        let guess = |age: usize| self.guesses[self.guesses.len() - 1 - age][index];
        if order == 1 {
            return (0.0, 0.0);
        }
        let late_ratio = (lambda(call) - lambda(call - 1)) / h;
        let late = (1.0 / late_ratio) * (guess(0) - guess(1));
        if order == 2 {
            return (late, 0.0);
        }
        let early_ratio = (lambda(call - 1) - lambda(call - 2)) / h;
        let early = (1.0 / early_ratio) * (guess(1) - guess(2));
        let both = late_ratio + early_ratio;
        (late + (late_ratio / both) * (late - early), (1.0 / both) * (late - early))
    }
}

impl Sampler for Dpmpp2m {
    fn timesteps(&self) -> &[f32] {
        &self.timesteps
    }

    fn init_noise_sigma(&self) -> f32 {
        1.0
    }

    fn skip_calls(&mut self, count: usize) {
        self.timesteps.drain(..count);
        self.levels.drain(..count);
    }

    fn add_noise(&self, call: usize, clean: &[f32], noise: &[f32]) -> Vec<f32> {
        let Level { alpha, sigma, .. } = self.levels[call];
        mixed(clean, noise, (alpha, sigma))
    }

    fn scale_model_input(&self, _call: usize, sample: &[f32]) -> Vec<f32> {
        sample.to_vec()
    }

    fn step(&mut self, call: usize, sample: &[f32], model_output: &[f32], noise: &mut NoiseSource) -> Vec<f32> {
        let (from, to) = (self.levels[call], self.levels[call + 1]);
        let guess = self.guess(from, sample, model_output);
        self.guesses.push_back(guess);
        if self.guesses.len() > self.solver.order {
            self.guesses.pop_front();
        }
        let fresh = if self.solver.stochastic { noise.normal(sample.len()) } else { Vec::new() };
        if to.lambda == from.lambda {
            // A step to the level where it already is: nothing to do, and nothing to divide by.
            return sample.to_vec();
        }
        let order = self.order(call);
        let [keep, latest, first, second] = self.weights(from, to, order);
        let fresh_weight = to.sigma * (1.0 - (-2.0 * (to.lambda - from.lambda)).exp()).sqrt();
        let latest_guess = &self.guesses[self.guesses.len() - 1];
        let advance = |index: usize| {
            let mut next = keep * sample[index] + latest * latest_guess[index];
            if order > 1 {
                let (first_difference, second_difference) = self.differences(call, order, index);
                next += first * first_difference;
                if order > 2 {
                    next += second * second_difference;
                }
            }
            if let Some(fresh) = fresh.get(index) {
                next += fresh_weight * fresh;
            }
            next
        };
        (0..sample.len()).map(advance).collect()
    }
}
