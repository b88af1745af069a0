//! Euler's method for flow matching: Esser et al., "Scaling Rectified Flow Transformers for High-Resolution Image
//! Synthesis", 2024. The sample is a mixture of picture and noise, `(1 - sigma) · picture + sigma · noise`, and the
//! model predicts the way from the one to the other. Follows diffusers' `scheduling_flow_match_euler_discrete.py`,
//! whose defaults for missing options these are.

use super::options::{CONFIG_FILE, Options};
use super::sigmas::{linspace, spread};
use super::{Flow, Sampler, config, mixed};
use crate::noise::NoiseSource;
use crate::{Error, Result};

struct FlowMatchEuler {
    /// One more than there are calls: each call goes from its level to the next.
    sigmas: Vec<f32>,
    timesteps: Vec<f32>,
    stochastic: bool,
}

pub(super) fn build(options: &Options, steps: usize, flow: Flow) -> Result<Box<dyn Sampler>> {
    let training = options.count("num_train_timesteps", 1000)?;
    let levels = levels(options, training, steps, flow)?;
    let levels = if let Some(terminal) = terminal(options)? { stretched(levels, terminal) } else { levels };
    let (highest, lowest) = (levels.values[0], levels.values[steps - 1]);
    let levels = spread(config::schedule(options)?, highest, lowest, steps).unwrap_or(levels.values);

    let mut sigmas: Vec<f32> = levels.into_iter().map(|sigma| sigma as f32).collect();
    let inverted = options.flag("invert_sigmas", false)?;
    if inverted {
        sigmas.iter_mut().for_each(|sigma| *sigma = 1.0 - *sigma);
    }
    let timesteps = sigmas.iter().map(|sigma| sigma * training as f32).collect();
    sigmas.push(if inverted { 1.0 } else { 0.0 });
    if !sigmas.iter().all(|sigma| sigma.is_finite()) {
        return Err(Error::checkpoint(
            CONFIG_FILE,
            format!("its shifts leave no finite noise levels for {steps} steps"),
        ));
    }
    Ok(Box::new(FlowMatchEuler { sigmas, timesteps, stochastic: options.flag("stochastic_sampling", false)? }))
}

/// Noise levels as numpy has them on their way: in f64, or in f32 where the caller gave them.
struct Levels {
    values: Vec<f64>,
    single: bool,
}

impl Levels {
    /// Each level by `function`, which rounds what it computes by its second argument.
    fn map(self, function: impl Fn(f64, &dyn Fn(f64) -> f64) -> f64) -> Self {
        let single = self.single;
        // An operation on two f32 in f64, then rounded, is the operation in f32.
        let rounded = move |value: f64| if single { f64::from(value as f32) } else { value };
        Self { values: self.values.into_iter().map(|level| function(level, &rounded)).collect(), single }
    }
}

/// The levels at which a picture of this size is visited, falling.
fn levels(options: &Options, training: usize, steps: usize, flow: Flow) -> Result<Levels> {
    let shift = options.positive("shift", 1.0)?;
    let dynamic = options.flag("use_dynamic_shifting", false)?;
    let start = if flow.unit_levels {
        let values = linspace(1.0, 1.0 / steps as f64, steps).into_iter().map(|level| f64::from(level as f32));
        Levels { values: values.collect(), single: true }
    } else {
        // The ends of the training schedule are shifted already, and once more below, as in diffusers.
        let shifted = |timestep: usize| {
            let sigma = timestep as f32 / training as f32;
            let shift = if dynamic { 1.0 } else { shift };
            shift as f32 * sigma / (1.0 + (shift - 1.0) as f32 * sigma)
        };
        let training = training as f64;
        let (first, last) = (f64::from(shifted(training as usize)) * training, f64::from(shifted(1)) * training);
        let values = linspace(first, last, steps).into_iter().map(|timestep| timestep / training).collect();
        Levels { values, single: false }
    };
    if !dynamic {
        return Ok(start.map(|sigma, round| {
            let below = round(1.0 + round(round(shift - 1.0) * sigma));
            round(round(round(shift) * sigma) / below)
        }));
    }
    let mu = mu(options, flow.image_tokens)?;
    let weight = match options.choice("time_shift_type", mu.exp(), &[("exponential", mu.exp()), ("linear", mu)])? {
        weight if weight > 0.0 && weight.is_finite() => weight,
        weight => {
            let problem =
                format!("its dynamic shift for {} image tokens is {weight}, which is no shift", flow.image_tokens);
            return Err(Error::checkpoint(CONFIG_FILE, problem));
        }
    };
    Ok(start.map(|sigma, round| {
        let odds = round(round(1.0 / sigma) - 1.0);
        round(round(weight) / round(round(weight) + odds))
    }))
}

/// How far a picture of so many tokens is shifted: on the line through the two sizes that the checkpoint names.
fn mu(options: &Options, image_tokens: usize) -> Result<f64> {
    let (base, most) = (options.count("base_image_seq_len", 256)?, options.count("max_image_seq_len", 4096)?);
    if most == base {
        let problem = format!("`max_image_seq_len` must differ from `base_image_seq_len`, but both are {base}");
        return Err(Error::checkpoint(CONFIG_FILE, problem));
    }
    let (base_shift, max_shift) = (options.number("base_shift", 0.5)?, options.number("max_shift", 1.15)?);
    let slope = (max_shift - base_shift) / (most as f64 - base as f64);
    Ok(image_tokens as f64 * slope + (base_shift - slope * base as f64))
}

/// Where the last level shall lie, if anywhere.
fn terminal(options: &Options) -> Result<Option<f64>> {
    match options.optional_number("shift_terminal")? {
        None | Some(0.0) => Ok(None),
        Some(terminal) if terminal < 1.0 => Ok(Some(terminal)),
        Some(terminal) => {
            Err(Error::checkpoint(CONFIG_FILE, format!("`shift_terminal` must be below 1, but is {terminal}")))
        }
    }
}

/// Stretched away from 1, so that the last level is `terminal`.
fn stretched(levels: Levels, terminal: f64) -> Levels {
    let last = levels.values[levels.values.len() - 1];
    levels.map(|sigma, round| {
        let factor = round(round(1.0 - last) / round(1.0 - terminal));
        round(1.0 - round(round(1.0 - sigma) / factor))
    })
}

impl Sampler for FlowMatchEuler {
    fn timesteps(&self) -> &[f32] {
        &self.timesteps
    }

    fn init_noise_sigma(&self) -> f32 {
        1.0
    }

    fn skip_calls(&mut self, count: usize) {
        self.sigmas.drain(..count);
        self.timesteps.drain(..count);
    }

    fn add_noise(&self, call: usize, clean: &[f32], noise: &[f32]) -> Vec<f32> {
        let sigma = self.sigmas[call];
        mixed(clean, noise, (1.0 - sigma, sigma))
    }

    fn scale_model_input(&self, _call: usize, sample: &[f32]) -> Vec<f32> {
        sample.to_vec()
    }

    fn step(&mut self, call: usize, sample: &[f32], model_output: &[f32], noise: &mut NoiseSource) -> Vec<f32> {
        let (sigma, next) = (self.sigmas[call], self.sigmas[call + 1]);
        let pairs = sample.iter().zip(model_output);
        if self.stochastic {
            let fresh = noise.normal(sample.len());
            let advance =
                |((x, output), noise): ((&f32, &f32), &f32)| (1.0 - next) * (x - sigma * output) + next * noise;
            return pairs.zip(&fresh).map(advance).collect();
        }
        let stride = next - sigma;
        pairs.map(|(x, output)| x + stride * output).collect()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use crate::sampler::{Flow, SamplerConfig, build};

    fn refusal(options: serde_json::Value, flow: Flow) -> String {
        let mut config = json!({"_class_name": "FlowMatchEulerDiscreteScheduler"});
        config.as_object_mut().unwrap().extend(options.as_object().unwrap().clone());
        let config = SamplerConfig::from_json(&config).unwrap();
        build(&config, None, None, 4, flow).err().expect("not a schedule").to_string()
    }

    #[test]
    fn options_that_give_no_schedule_are_refused_by_name() {
        let flow = Flow { image_tokens: 256, unit_levels: false };
        for (options, named) in [
            (json!({"shift": 0.0}), "`shift` must be above 0"),
            (json!({"shift_terminal": 1.0}), "`shift_terminal` must be below 1, but is 1"),
            (json!({"use_dynamic_shifting": true, "max_image_seq_len": 256}), "`max_image_seq_len` must differ"),
            (json!({"use_dynamic_shifting": true, "time_shift_type": "cubic"}), "`time_shift_type` must be one of"),
            (
                json!({"use_dynamic_shifting": true, "time_shift_type": "linear", "base_shift": -1.0}),
                "dynamic shift for 256 image tokens is -1",
            ),
            (json!({"use_karras_sigmas": true, "use_beta_sigmas": true}), "false beside another schedule"),
            (json!({"shift_terminal": 0.5, "num_train_timesteps": 0}), "`steps` must be 1 to 0"),
        ] {
            let text = refusal(options, flow);
            assert!(text.contains(named), "{text}");
        }
    }
}
