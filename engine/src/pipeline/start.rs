//! What a row starts from: noise, or a picture with noise on it, all of it or where a mask lets it be painted
//! anew.
//!
//! Reference: <https://github.com/huggingface/diffusers/blob/v0.36.0/src/diffusers/pipelines/stable_diffusion/>
//! (`pipeline_stable_diffusion_img2img.py`, `pipeline_stable_diffusion_inpaint.py`), whose order of draws from
//! the seed this is.

use std::sync::Arc;

use super::mask::Painted;
use super::{picture, resize};
use crate::noise::NoiseSource;
use crate::sampler::Sampler;
use crate::{Checkpoint, Error, InitImage, Mask, MaskedContent, Result, RowRequest};

/// A row before its first step.
pub(super) struct Start {
    pub latent: Vec<f32>,
    /// What an inpainting denoiser sees after the latent's channels: the mask, and the latent of what it leaves.
    pub beside: Arc<[f32]>,
    /// What other denoisers' rows keep where the mask leaves them as they are.
    pub kept: Option<Kept>,
}

/// The latent of an init image, part of which stays.
pub(super) struct Kept {
    original: Vec<f32>,
    noise: Vec<f32>,
    /// How much of each pixel of the latent is painted anew.
    painted: Vec<f32>,
}

impl Kept {
    /// `latent` before `call` (`None`: after the last one), with what stays put back at that call's noise level.
    pub fn put_back(&self, latent: &[f32], sampler: &dyn Sampler, call: Option<usize>) -> Vec<f32> {
        let noised = call.map(|call| sampler.add_noise(call, &self.original, &self.noise));
        mixed(noised.as_deref().unwrap_or(&self.original), latent, &self.painted)
    }
}

/// (1 - share) · old + share · new, with one share for all channels of a pixel.
fn mixed(old: &[f32], new: &[f32], shares: &[f32]) -> Vec<f32> {
    let pairs = old.iter().zip(new).zip(shares.iter().cycle());
    pairs.map(|((old, new), share)| (1.0 - share) * old + share * new).collect()
}

/// What the row starts from. Its sampler leaves out the calls that its strength does.
pub(super) fn start(
    checkpoint: &Checkpoint,
    request: &RowRequest,
    sampler: &mut dyn Sampler,
    noise: &mut NoiseSource,
) -> Result<Start> {
    let factor = checkpoint.vae_factor();
    let size = (request.width, request.height);
    let Some(init) = &request.init_image else {
        let values = checkpoint.latent_channels() * (size.0 / factor) * (size.1 / factor);
        let latent = scaled(&noise.normal(values), sampler.init_noise_sigma());
        // To a denoiser that sees a mask, all of the picture is painted anew.
        let beside = if checkpoint.inpaints() {
            beside(checkpoint, &Painted::all(size), vec![0.0; 3 * size.0 * size.1], size, None)?
        } else {
            [].into()
        };
        return Ok(Start { latent, beside, kept: None });
    };
    sampler.skip_calls(skipped(checkpoint, request.steps, init.strength, sampler)?);
    let picture = picture_values(init, size);
    match &init.mask {
        Some(mask) => masked(checkpoint, picture, &Painted::new(mask, size), init, (size, sampler, noise)),
        None if checkpoint.inpaints() => masked(checkpoint, picture, &Painted::all(size), init, (size, sampler, noise)),
        None => {
            let original = checkpoint.encode(&picture, size, Some(noise))?;
            let drawn = noise.normal(original.len());
            Ok(Start { latent: sampler.add_noise(0, &original, &drawn), beside: [].into(), kept: None })
        }
    }
}

/// The start of a row with a mask.
fn masked(
    checkpoint: &Checkpoint,
    picture: Vec<f32>,
    painted: &Painted,
    init: &InitImage,
    (size, sampler, noise): ((usize, usize), &dyn Sampler, &mut NoiseSource),
) -> Result<Start> {
    let (inpaints, factor) = (checkpoint.inpaints(), checkpoint.vae_factor());
    // A row that goes all the way begins with noise alone, and only what stays of the picture matters.
    let anew = init.strength >= 1.0;
    let original = if anew && inpaints { None } else { Some(checkpoint.encode(&picture, size, Some(noise))?) };
    let drawn = noise.normal(checkpoint.latent_channels() * (size.0 / factor) * (size.1 / factor));
    let beside = if inpaints {
        beside(checkpoint, painted, picture, size, Some(noise))?
    } else {
        // diffusers encodes what the mask leaves here, too, and makes no use of it.
        noise.normal(drawn.len());
        [].into()
    };
    let shares = painted.of_latent(factor);
    let content = init.mask.as_ref().map_or(MaskedContent::Original, |mask| mask.content);
    let latent = match &original {
        Some(original) if !anew => match content {
            MaskedContent::Original => sampler.add_noise(0, original, &drawn),
            MaskedContent::Noise => {
                let filled = mixed(original, &noise.normal(drawn.len()), &shares);
                sampler.add_noise(0, &filled, &drawn)
            }
        },
        _ => scaled(&drawn, sampler.init_noise_sigma()),
    };
    let original = original.filter(|_| !inpaints);
    let kept = original.map(|original| Kept { original, noise: drawn, painted: shares });
    Ok(Start { latent, beside, kept })
}

/// The calls that a row of this strength leaves out.
fn skipped(checkpoint: &Checkpoint, steps: usize, strength: f64, sampler: &dyn Sampler) -> Result<usize> {
    let skipped = checkpoint.skipped_calls(steps, strength);
    if skipped >= steps.min(sampler.timesteps().len()) {
        let limit = format!("so much that of {steps} steps at least one is left");
        return Err(Error::request("strength", limit, strength));
    }
    Ok(skipped)
}

/// The init image at the row's size as (height, width, 3) values from -1 to 1.
fn picture_values(init: &InitImage, size: (usize, usize)) -> Vec<f32> {
    let from = (init.picture.width() as usize, init.picture.height() as usize);
    picture::to_values(&resize::lanczos(init.picture.as_raw(), 3, from, size))
}

/// The mask at the latent's size, then the latent of the picture without what is painted anew.
fn beside(
    checkpoint: &Checkpoint,
    painted: &Painted,
    mut picture: Vec<f32>,
    size: (usize, usize),
    noise: Option<&mut NoiseSource>,
) -> Result<Arc<[f32]>> {
    painted.cover(&mut picture);
    let left = checkpoint.encode(&picture, size, noise)?;
    // The denoiser has learnt masks of all or nothing.
    let mask = painted.of_latent(checkpoint.vae_factor()).into_iter().map(|share| f32::from(share >= 0.5));
    Ok(mask.chain(left).collect())
}

fn scaled(noise: &[f32], sigma: f32) -> Vec<f32> {
    noise.iter().map(|value| value * sigma).collect()
}

/// What is wrong with a row's init image, if anything.
pub(super) fn check(init: &InitImage) -> Result<()> {
    if !(init.strength > 0.0 && init.strength <= 1.0) {
        return Err(Error::request("strength", "above 0 and at most 1", init.strength));
    }
    let empty = |(width, height): (u32, u32)| width == 0 || height == 0;
    if empty(init.picture.dimensions()) {
        return Err(Error::request("init_image", "a picture with pixels", "empty"));
    }
    let Some(Mask { picture, blur, .. }) = &init.mask else { return Ok(()) };
    if empty(picture.dimensions()) {
        return Err(Error::request("mask_image", "a picture with pixels", "empty"));
    }
    if !(*blur >= 0.0 && *blur <= MOST_BLUR) {
        return Err(Error::request("mask_blur", format!("0 to {MOST_BLUR} pixels"), blur));
    }
    Ok(())
}

/// A wider blur leaves nothing of a mask.
const MOST_BLUR: f64 = 256.0;
