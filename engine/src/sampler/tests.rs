//! Every sampler against diffusers' trajectories over a dummy model: `tests/fixtures/samplers.py` and
//! `flow_samplers.py` make them.

use std::collections::BTreeMap;

use safetensors::SafeTensors;

use super::*;

/// How far a value may be off diffusers', relative to the largest value of the sample (or to 1, where all are
/// smaller) and a little of the largest so far, whose rounding stays. In f32 a value has 6e-8.
const TOLERANCE: f32 = 1e-5;
const SHARE_OF_LARGEST: f32 = 0.02;
const VALUES: usize = 16;

#[derive(Clone, serde::Deserialize)]
struct Case {
    config: String,
    sampler: Option<String>,
    schedule: Option<String>,
    steps: usize,
    seed: u64,
    init_noise_sigma: f32,
    /// How far rounding alone can move this trajectory, where it matters.
    sensitivity: f32,
    #[serde(default)]
    image_tokens: usize,
    #[serde(default)]
    unit_levels: bool,
}

/// The rows of a trajectory: a timestep and the sample after its call.
type Trajectory = Vec<Vec<f32>>;

fn goldens(file: &str) -> Vec<(Case, Trajectory)> {
    let path = format!("{}/tests/fixtures/goldens/{file}.safetensors", env!("CARGO_MANIFEST_DIR"));
    let bytes = std::fs::read(path).expect("the goldens are committed");
    let (_, header) = SafeTensors::read_metadata(&bytes).expect("a safetensors file");
    let cases = &header.metadata().as_ref().expect("metadata")["cases"];
    let cases: Vec<Case> = serde_json::from_str(cases).expect("a list of cases");
    let tensors = SafeTensors::deserialize(&bytes).expect("a safetensors file");
    let rows = |index: usize| {
        let tensor = tensors.tensor(&index.to_string()).expect("a tensor per case");
        let number = |four: &[u8]| f32::from_le_bytes(four.try_into().expect("four bytes"));
        let row = |bytes: &[u8]| bytes.chunks_exact(4).map(number).collect();
        tensor.data().chunks_exact(4 * (1 + VALUES)).map(row).collect()
    };
    cases.into_iter().enumerate().map(|(index, case)| (case, rows(index))).collect()
}

fn dummy_model(sample: &[f32], timestep: f32) -> Vec<f32> {
    let bias = |index: usize| (0.1 * (f64::from(timestep) / 100.0 + index as f64).sin()) as f32;
    sample.iter().enumerate().map(|(index, value)| 0.3 * value + bias(index)).collect()
}

fn sampler(case: &Case) -> Result<(SamplerKind, Box<dyn Sampler>)> {
    let config = SamplerConfig::parse(&case.config)?;
    let kind = case.sampler.as_deref().map(str::parse).transpose()?;
    let schedule = case.schedule.as_deref().map(str::parse).transpose()?;
    let (chosen, _) = config.choose(kind, schedule)?;
    let flow = Flow { image_tokens: case.image_tokens, unit_levels: case.unit_levels };
    Ok((chosen, build(&config, kind, schedule, case.steps, flow)?))
}

/// The largest error of the samples, relative to their scale.
fn worst_error(case: &Case, sampler: &mut dyn Sampler, expected: &Trajectory) -> f32 {
    let mut noise = NoiseSource::new(case.seed);
    let sigma = sampler.init_noise_sigma();
    let mut sample: Vec<f32> = noise.normal(VALUES).into_iter().map(|value| value * sigma).collect();
    let mut worst = (sigma / case.init_noise_sigma - 1.0).abs();
    let mut largest = sigma;
    for (call, row) in expected.iter().enumerate() {
        let output = dummy_model(&sampler.scale_model_input(call, &sample), sampler.timesteps()[call]);
        sample = sampler.step(call, &sample, &output, &mut noise);
        let scale = row[1..].iter().fold(1.0_f32, |scale, value| scale.max(value.abs()));
        largest = largest.max(scale);
        for (found, expected) in sample.iter().zip(&row[1..]) {
            let error = (found - expected).abs() / (scale + SHARE_OF_LARGEST * largest);
            worst = if error.is_nan() { f32::INFINITY } else { worst.max(error) };
        }
    }
    worst
}

#[test]
fn every_trajectory_is_diffusers_for_every_option() {
    let mut worst: BTreeMap<&str, (usize, f32)> = BTreeMap::new();
    let mut failures = Vec::new();
    let goldens = [goldens("samplers"), goldens("flow_samplers")].concat();
    for (index, (case, expected)) in goldens.iter().enumerate() {
        let (kind, mut sampler) = match sampler(case) {
            Ok(found) => found,
            Err(error) => {
                failures.push(format!("{index}: {error} ({})", case.config));
                continue;
            }
        };
        let timesteps: Vec<f32> = expected.iter().map(|row| row[0]).collect();
        // Between two of the training schedule's timesteps as far as its levels' last digits tell.
        let tolerance = if case.sensitivity > 0.0 { 5e-3 } else { 1e-4 };
        let near = |(found, expected): (&f32, &f32)| (found - expected).abs() <= tolerance;
        if sampler.timesteps().len() != timesteps.len() || !sampler.timesteps().iter().zip(&timesteps).all(near) {
            let found = sampler.timesteps();
            failures.push(format!("{index} {kind}: timesteps {found:?}, not {timesteps:?} ({})", case.config));
            continue;
        }
        let error = worst_error(case, sampler.as_mut(), expected);
        if error > TOLERANCE.max(4.0 * case.sensitivity) {
            let words = (&case.sampler, &case.schedule, case.steps);
            failures.push(format!("{index} {kind}: off by {error:e} ({words:?}, {})", case.config));
        }
        let (count, most) = worst.entry(kind.as_str()).or_default();
        *count += 1;
        if case.sensitivity == 0.0 {
            *most = most.max(error);
        }
    }
    println!("trajectories, and largest relative error where rounding does not decide: {worst:?}");
    assert!(failures.is_empty(), "{} trajectories are off:\n{}", failures.len(), failures.join("\n"));
    assert!(worst.values().all(|(count, _)| *count >= 70), "the goldens cover every sampler: {worst:?}");
}

fn built(config: serde_json::Value, kind: &str, steps: usize) -> Result<Box<dyn Sampler>> {
    build(&SamplerConfig::from_json(&config)?, Some(kind.parse()?), None, steps, Flow::default())
}

#[test]
fn every_number_of_steps_gives_a_finite_trajectory_or_a_clear_refusal() {
    let mut refused = 0;
    for kind in SamplerKind::ALL.into_iter().filter(|kind| *kind != SamplerKind::FlowMatchEuler) {
        for spacing in ["linspace", "leading", "trailing"] {
            for steps in (1..40).chain([61, 103, 250, 499, 500, 501, 998, 999, 1000]) {
                let config = serde_json::json!({
                    "_class_name": "PNDMScheduler", "timestep_spacing": spacing, "steps_offset": 1, "clip_sample": false,
                });
                let mut sampler = match built(config, kind.as_str(), steps) {
                    Ok(sampler) => sampler,
                    Err(error) => {
                        assert!(error.to_string().starts_with("`steps` must be"), "{kind} {spacing} {steps}: {error}");
                        assert!(!(4..=500).contains(&steps), "{kind} {spacing} {steps}: {error}");
                        refused += 1;
                        continue;
                    }
                };
                let mut noise = NoiseSource::new(0);
                let mut sample = noise.normal(VALUES);
                for call in 0..sampler.timesteps().len() {
                    let output = dummy_model(&sampler.scale_model_input(call, &sample), sampler.timesteps()[call]);
                    sample = sampler.step(call, &sample, &output, &mut noise);
                }
                assert!(sample.iter().all(|value| value.is_finite()), "{kind} {spacing} {steps}");
            }
        }
    }
    assert!(refused > 0 && refused < 20, "few numbers of steps are refused, not {refused}");
}

#[test]
fn steps_out_of_range_are_refused_with_the_limit() {
    let config = serde_json::json!({"_class_name": "EulerDiscreteScheduler", "num_train_timesteps": 500});
    for steps in [0, 501, 1_000_000_000] {
        let error = built(config.clone(), "euler", steps).err().expect("out of range").to_string();
        assert_eq!(error, format!("`steps` must be 1 to 500, the checkpoint's training timesteps, but is {steps}"));
    }
}

#[test]
fn pndm_with_runge_kutta_steps_needs_four_steps() {
    let config = serde_json::json!({"_class_name": "PNDMScheduler"});
    let error = built(config.clone(), "pndm", 3).err().expect("too few").to_string();
    assert!(error.contains("`steps`") && error.contains("at least 4"), "{error}");
    assert_eq!(built(config, "pndm", 4).expect("enough").timesteps().len(), 13);
}

#[test]
fn values_that_a_sampler_cannot_honour_are_refused_by_name() {
    for (kind, name, value) in [
        ("dpmpp_2m", "algorithm_type", serde_json::json!("dpmsolver")),
        ("dpmpp_2m", "solver_order", serde_json::json!(4)),
        ("dpmpp_2m", "solver_type", serde_json::json!("rk4")),
        ("dpmpp_2m", "use_flow_sigmas", serde_json::json!(true)),
        ("dpmpp_2m", "variance_type", serde_json::json!("learned")),
        ("dpmpp_2m", "lambda_min_clipped", serde_json::json!(1e9)),
        ("euler", "prediction_type", serde_json::json!("flow_prediction")),
        ("euler", "interpolation_type", serde_json::json!("cubic")),
        ("euler", "timestep_type", serde_json::json!("odd")),
        ("euler", "final_sigmas_type", serde_json::json!(3)),
        ("euler", "sigma_min", serde_json::json!(-1.0)),
        ("euler_ancestral", "prediction_type", serde_json::json!("sample")),
        ("ddim", "timestep_spacing", serde_json::json!("even")),
        ("ddim", "rescale_betas_zero_snr", serde_json::json!("yes")),
        ("pndm", "prediction_type", serde_json::json!("sample")),
    ] {
        let config = serde_json::json!({"_class_name": "DDIMScheduler", name: value});
        let error = built(config, kind, 10).err().expect("not honoured").to_string();
        assert!(error.contains(&format!("`{name}`")), "{kind}: {error}");
    }
}

#[test]
fn ddim_refuses_to_divide_by_a_picture_of_which_nothing_is_left() {
    let mut config = serde_json::json!({
        "_class_name": "DDIMScheduler", "rescale_betas_zero_snr": true, "timestep_spacing": "trailing",
    });
    let error = built(config.clone(), "ddim", 10).err().expect("not finite").to_string();
    assert!(error.contains("`prediction_type`"), "{error}");
    config["prediction_type"] = "v_prediction".into();
    assert!(built(config, "ddim", 10).is_ok());
}

#[test]
fn ancestral_noise_is_the_rows_own() {
    let config = serde_json::json!({"_class_name": "EulerAncestralDiscreteScheduler"});
    let run = |seed: u64| {
        let mut sampler = built(config.clone(), "euler_ancestral", 3).expect("a sampler");
        sampler.step(0, &[0.5; VALUES], &[0.1; VALUES], &mut NoiseSource::new(seed))
    };
    assert_eq!(run(1), run(1));
    assert_ne!(run(1), run(2));
}
