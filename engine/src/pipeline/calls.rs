//! Which of its sampler's denoiser calls a row takes: all, those that its strength leaves, or those between two
//! shares of the way from noise, so that another checkpoint goes on where one has ended.
//!
//! Reference: <https://github.com/huggingface/diffusers/blob/v0.36.0/src/diffusers/pipelines/stable_diffusion_xl/>
//! (`pipeline_stable_diffusion_xl.py`, "Apply denoising_end"; `pipeline_stable_diffusion_xl_img2img.py`,
//! `get_timesteps`). Shares count timesteps of the training schedule and not steps, so that two checkpoints with one
//! schedule and as many steps divide the calls without a gap.

use crate::sampler::Sampler;
use crate::{Checkpoint, Error, Result, RowRequest};

/// Leaves out the calls before the row's first one; how many it takes from there.
pub(super) fn choose(checkpoint: &Checkpoint, request: &RowRequest, sampler: &mut dyn Sampler) -> Result<usize> {
    let skipped = skipped(checkpoint, request, sampler)?;
    sampler.skip_calls(skipped);
    let Some(end) = request.denoising_end else { return Ok(sampler.timesteps().len()) };
    let cutoff = cutoff(checkpoint, end)?;
    match sampler.timesteps().iter().filter(|timestep| **timestep >= cutoff).count() {
        0 => Err(none_left("denoising_end", request.steps, end)),
        calls => Ok(calls),
    }
}

/// The calls that lie behind what the row starts from.
fn skipped(checkpoint: &Checkpoint, request: &RowRequest, sampler: &dyn Sampler) -> Result<usize> {
    let Some(init) = &request.init_image else { return Ok(0) };
    let (steps, all) = (request.steps, sampler.timesteps().len());
    if let Some(start) = request.denoising_start {
        let cutoff = cutoff(checkpoint, start)?;
        return match sampler.timesteps().iter().filter(|timestep| **timestep < cutoff).count() {
            0 => Err(none_left("denoising_start", steps, start)),
            left => Ok(all - left),
        };
    }
    let skipped = checkpoint.skipped_calls(steps, init.strength);
    if skipped >= steps.min(all) {
        return Err(none_left("strength", steps, init.strength));
    }
    Ok(skipped)
}

/// The timestep at which so much of the way from noise has been gone.
fn cutoff(checkpoint: &Checkpoint, share: f64) -> Result<f32> {
    let timesteps = checkpoint.sampler_config().training_timesteps()? as f64;
    Ok((timesteps - share * timesteps).round_ties_even() as f32)
}

fn none_left(field: &str, steps: usize, value: f64) -> Error {
    let (little, much) = ("so little", "so much");
    let how = if field == "denoising_start" { little } else { much };
    Error::request(field, format!("{how} that of {steps} steps at least one is left"), value)
}

/// What is wrong with where a row begins and ends, if anything.
pub(super) fn check(checkpoint: &Checkpoint, request: &RowRequest) -> Result<()> {
    let (start, end) = (request.denoising_start, request.denoising_end);
    for (field, share) in [("denoising_start", start), ("denoising_end", end)] {
        let Some(share) = share else { continue };
        if !checkpoint.hands_over() {
            return Err(Error::request(field, "absent for this checkpoint's family", share));
        }
        if !(share > 0.0 && share < 1.0) {
            return Err(Error::request(field, "above 0 and below 1", share));
        }
    }
    match (start, end) {
        (Some(start), _) if request.init_image.is_none() => {
            Err(Error::request("denoising_start", "absent without an init image", start))
        }
        (Some(start), Some(end)) if start >= end => {
            Err(Error::request("denoising_start", format!("below `denoising_end`, which is {end}"), start))
        }
        _ => Ok(()),
    }
}
