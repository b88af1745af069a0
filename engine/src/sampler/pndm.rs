//! PNDM: Liu et al., "Pseudo Numerical Methods for Diffusion Models on Manifolds", 2022. Runge-Kutta steps of
//! four calls each to begin with, then linear multistep; Stable Diffusion 1 skips the former (PLMS). Follows
//! diffusers' `scheduling_pndm.py`, whose defaults for missing options these are.

use std::collections::VecDeque;

use super::options::Options;
use super::prediction::Prediction;
use super::sigmas::Spacing;
use super::training::Training;
use super::{Sampler, mixed, on_training_timesteps};
use crate::noise::NoiseSource;
use crate::{Error, Result};

/// Runge-Kutta steps come in fours, three of them before the multistep ones.
pub(crate) const ORDER: usize = 4;
const RUNGE_KUTTA_CALLS: usize = 12;

struct Pndm {
    /// The whole timesteps, rising.
    rising: Vec<usize>,
    table: Table,
    timesteps: Vec<f32>,
    /// For each call the share of the picture at the timestep that it is told.
    told: Vec<f32>,
    /// For each call the share of the picture at the timestep it starts from and at the one it goes to.
    remaining: Vec<(f32, f32)>,
    /// How many calls at the beginning are Runge-Kutta's: none or twelve.
    runge_kutta_calls: usize,
    prediction: Prediction,
    /// The outputs of past steps, latest last.
    outputs: VecDeque<Vec<f32>>,
    /// The sample that the calls of the present step start from.
    start: Vec<f32>,
    /// The weighted sum of the outputs of the present Runge-Kutta step.
    weighted: Vec<f32>,
}

pub(super) fn build(options: &Options, steps: usize) -> Result<Box<dyn Sampler>> {
    let prediction = Prediction::read_without_sample(options, "pndm")?;
    let training = Training::new(options, false)?;
    let spacing = Spacing::read(options, Spacing::Leading)?;
    let mut rising = on_training_timesteps(spacing, &training, steps, options.count("steps_offset", 0)?)?;
    rising.reverse();
    let stride = training.timesteps() / steps;
    let skips = options.flag("skip_prk_steps", false)?;
    let calls = if skips {
        plms_calls(&rising, stride, 0)
    } else if steps < ORDER {
        let limit = format!("at least {ORDER} for pndm, whose Runge-Kutta steps this checkpoint does not skip");
        return Err(Error::request("steps", limit, steps));
    } else {
        runge_kutta_calls(&rising, stride)
    };
    let last = if options.flag("set_alpha_to_one", false)? { 1.0 } else { training.remaining[0] };
    let mut sampler = Pndm {
        rising,
        table: Table { remaining: training.remaining, last, stride },
        timesteps: Vec::new(),
        told: Vec::new(),
        remaining: Vec::new(),
        runge_kutta_calls: if skips { 0 } else { RUNGE_KUTTA_CALLS },
        prediction,
        outputs: VecDeque::new(),
        start: Vec::new(),
        weighted: Vec::new(),
    };
    sampler.plan(&calls);
    Ok(Box::new(sampler))
}

/// How much of the picture is left at each training timestep.
struct Table {
    remaining: Vec<f32>,
    /// Before the first one.
    last: f32,
    /// Training timesteps of a step.
    stride: usize,
}

impl Table {
    fn share(&self, timestep: i64) -> f32 {
        usize::try_from(timestep).map_or(self.last, |timestep| self.remaining[timestep])
    }
}

/// One denoiser call: what it is told, and the step it is used for. `to` may lie before the first timestep.
struct Call {
    timestep: i64,
    from: i64,
    to: i64,
}

/// Multistep from the beginning: the second timestep is visited twice, to correct the first step. Whichever call
/// is the second after some were `skipped` counts as that correction, as in diffusers.
fn plms_calls(rising: &[usize], stride: usize, skipped: usize) -> Vec<Call> {
    let stride = stride as i64;
    let mut falling: Vec<i64> = rising.iter().rev().map(|timestep| *timestep as i64).collect();
    if falling.len() > 1 {
        falling.insert(1, falling[1]);
    }
    falling.drain(..skipped);
    let call = |(index, timestep): (usize, i64)| match index {
        1 => Call { timestep, from: timestep + stride, to: timestep },
        _ => Call { timestep, from: timestep, to: timestep - stride },
    };
    falling.into_iter().enumerate().map(call).collect()
}

/// Three Runge-Kutta steps over the last four timesteps and the midpoints between them, then multistep.
fn runge_kutta_calls(rising: &[usize], stride: usize) -> Vec<Call> {
    let half = (stride / 2) as i64;
    let (early, late) = rising.split_at(rising.len() - ORDER);
    let late: Vec<i64> = late.iter().map(|timestep| *timestep as i64).collect();
    let mut calls = Vec::new();
    for pair in late.windows(2).rev() {
        let (low, from) = (pair[0], pair[1]);
        // The start, the midpoint twice, and the end, each seen from the timestep that its call is told.
        for (timestep, to) in [(from, from - half), (low + half, low + half), (low + half, low), (low, low)] {
            calls.push(Call { timestep, from, to });
        }
    }
    let multistep = early.iter().chain(rising.get(early.len())).rev().map(|timestep| *timestep as i64);
    calls.extend(multistep.map(|timestep| Call { timestep, from: timestep, to: timestep - stride as i64 }));
    calls
}

impl Pndm {
    fn plan(&mut self, calls: &[Call]) {
        let share = |timestep| self.table.share(timestep);
        self.timesteps = calls.iter().map(|call| call.timestep as f32).collect();
        self.told = calls.iter().map(|call| share(call.timestep)).collect();
        self.remaining = calls.iter().map(|call| (share(call.from), share(call.to))).collect();
    }

    /// The output that a Runge-Kutta call steps with. The fourth call of a step weighs all of them.
    fn runge_kutta(&mut self, call: usize, sample: &[f32], output: &[f32]) -> Vec<f32> {
        let stage = call % ORDER;
        if stage == 0 {
            self.weighted = vec![0.0; output.len()];
            self.start = sample.to_vec();
            self.outputs.push_back(output.to_vec());
        }
        let weight = if stage == 0 || stage == 3 { 1.0 / 6.0 } else { 1.0 / 3.0 };
        self.weighted.iter_mut().zip(output).for_each(|(sum, output)| *sum += weight * output);
        if stage == 3 { self.weighted.clone() } else { output.to_vec() }
    }

    /// The output that a multistep call steps with, formula (12) of the paper; lower orders until there are
    /// four outputs.
    fn multistep(&mut self, call: usize, sample: &[f32], output: &[f32]) -> Vec<f32> {
        if call == 1 && self.runge_kutta_calls == 0 {
            // The correction of the first step starts where that one did.
            return zip([output, &self.outputs[0]], |[now, first]| (now + first) / 2.0);
        }
        self.start = sample.to_vec();
        self.outputs.push_back(output.to_vec());
        if self.outputs.len() > ORDER {
            self.outputs.pop_front();
        }
        let past = |age: usize| self.outputs[self.outputs.len() - 1 - age].as_slice();
        match self.outputs.len() {
            1 => output.to_vec(),
            2 => zip([past(0), past(1)], |[a, b]| (3.0 * a - b) / 2.0),
            3 => zip([past(0), past(1), past(2)], |[a, b, c]| (23.0 * a - 16.0 * b + 5.0 * c) / 12.0),
            _ => zip([past(0), past(1), past(2), past(3)], |[a, b, c, d]| {
                (1.0 / 24.0) * (55.0 * a - 59.0 * b + 37.0 * c - 9.0 * d)
            }),
        }
    }
}

/// Combines slices of one length value by value.
fn zip<const N: usize>(slices: [&[f32]; N], combine: impl Fn([f32; N]) -> f32) -> Vec<f32> {
    (0..slices[0].len()).map(|index| combine(slices.map(|slice| slice[index]))).collect()
}

impl Sampler for Pndm {
    fn timesteps(&self) -> &[f32] {
        &self.timesteps
    }

    fn init_noise_sigma(&self) -> f32 {
        1.0
    }

    fn skip_calls(&mut self, count: usize) {
        if count > 0 {
            // Runge-Kutta steps are for the beginning only, which such a row has not: multistep right away.
            self.runge_kutta_calls = 0;
            self.plan(&plms_calls(&self.rising, self.table.stride, count));
        }
    }

    fn add_noise(&self, call: usize, clean: &[f32], noise: &[f32]) -> Vec<f32> {
        let told = self.told[call];
        mixed(clean, noise, (told.sqrt(), (1.0 - told).sqrt()))
    }

    fn scale_model_input(&self, _call: usize, sample: &[f32]) -> Vec<f32> {
        sample.to_vec()
    }

    fn step(&mut self, call: usize, sample: &[f32], model_output: &[f32], _noise: &mut NoiseSource) -> Vec<f32> {
        let output = if call < self.runge_kutta_calls {
            self.runge_kutta(call, sample, model_output)
        } else {
            self.multistep(call, sample, model_output)
        };
        let (from, to) = self.remaining[call];
        let (picture_share, noise_share) = (from.sqrt(), (1.0 - from).sqrt());
        // Formula (9) of the paper.
        let sample_weight = (to / from).sqrt();
        let divisor = from * (1.0 - to).sqrt() + (from * (1.0 - from) * to).sqrt();
        let advance = |(x, output): (&f32, &f32)| {
            let noise = match self.prediction {
                Prediction::Velocity => picture_share * output + noise_share * x,
                Prediction::Epsilon | Prediction::Sample => *output,
            };
            sample_weight * x - (to - from) * noise / divisor
        };
        self.start.iter().zip(&output).map(advance).collect()
    }
}
