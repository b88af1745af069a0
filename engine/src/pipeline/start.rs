//! What a row starts from: noise, or a picture with noise on it, all of it or where a mask lets it be painted
//! anew, or a latent from the middle of the way.
//!
//! Reference: <https://github.com/huggingface/diffusers/blob/v0.36.0/src/diffusers/pipelines/stable_diffusion/>
//! (`pipeline_stable_diffusion_img2img.py`, `pipeline_stable_diffusion_inpaint.py`), whose order of draws from
//! the seed this is.

use std::sync::Arc;

use image::RgbImage;

use super::mask::Painted;
use super::{picture, resize};
use crate::noise::NoiseSource;
use crate::sampler::Sampler;
use crate::{Checkpoint, Error, InitContent, InitImage, Latent, Mask, MaskedContent, Result, RowRequest};

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

/// What the row starts from; `sampler` has only the calls that it takes.
pub(super) fn start(
    checkpoint: &Checkpoint,
    request: &RowRequest,
    sampler: &dyn Sampler,
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
    let origin = Origin { init, size, noised: request.denoising_start.is_none() };
    match &init.mask {
        Some(mask) => origin.masked(checkpoint, &Painted::new(mask, size), sampler, noise),
        None if checkpoint.inpaints() => origin.masked(checkpoint, &Painted::all(size), sampler, noise),
        None => {
            let original = origin.original(checkpoint, noise)?;
            let latent = match origin.noised {
                true => sampler.add_noise(0, &original, &noise.normal(original.len())),
                false => original,
            };
            Ok(Start { latent, beside: [].into(), kept: None })
        }
    }
}

/// An init image on its way into a row.
struct Origin<'a> {
    init: &'a InitImage,
    /// The row's width and height.
    size: (usize, usize),
    /// Whether noise is added to it: not where it lies in the middle of the way already.
    noised: bool,
}

impl Origin<'_> {
    /// The init image as a latent without more noise on it.
    fn original(&self, checkpoint: &Checkpoint, noise: &mut NoiseSource) -> Result<Vec<f32>> {
        match &self.init.content {
            InitContent::Picture(picture) => {
                checkpoint.encode(&picture_values(picture, self.size), self.size, Some(noise))
            }
            InitContent::Latent(latent) => Ok(latent.values.clone()),
        }
    }

    /// The start of a row with a mask.
    fn masked(
        &self,
        checkpoint: &Checkpoint,
        painted: &Painted,
        sampler: &dyn Sampler,
        noise: &mut NoiseSource,
    ) -> Result<Start> {
        let (inpaints, factor, init) = (checkpoint.inpaints(), checkpoint.vae_factor(), self.init);
        // A row that goes all the way begins with noise alone, and only what stays of the picture matters.
        let anew = self.noised && init.strength >= 1.0;
        let original = if anew && inpaints { None } else { Some(self.original(checkpoint, noise)?) };
        let drawn = noise.normal(checkpoint.latent_channels() * (self.size.0 / factor) * (self.size.1 / factor));
        let beside: Arc<[f32]> = match &init.content {
            InitContent::Picture(picture) if inpaints => {
                beside(checkpoint, painted, picture_values(picture, self.size), self.size, Some(noise))?
            }
            InitContent::Picture(_) => {
                // diffusers encodes what the mask leaves here, too, and makes no use of it.
                noise.normal(drawn.len());
                [].into()
            }
            InitContent::Latent(_) => [].into(),
        };
        let shares = painted.of_latent(factor);
        let content = init.mask.as_ref().map_or(MaskedContent::Original, |mask| mask.content);
        let latent = match &original {
            Some(original) if !self.noised => original.clone(),
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
}

/// A picture at the row's size as (height, width, 3) values from -1 to 1.
fn picture_values(picture: &RgbImage, size: (usize, usize)) -> Vec<f32> {
    let from = (picture.width() as usize, picture.height() as usize);
    picture::to_values(&resize::lanczos(picture.as_raw(), 3, from, size))
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

/// What is wrong with a row's init image, if anything; its latent has `shape`'s channels, height and width.
pub(super) fn check(checkpoint: &Checkpoint, request: &RowRequest, shape: [usize; 3]) -> Result<()> {
    let Some(init) = &request.init_image else { return Ok(()) };
    if request.denoising_start.is_none() && !(init.strength > 0.0 && init.strength <= 1.0) {
        return Err(Error::request("strength", "above 0 and at most 1", init.strength));
    }
    let empty = |(width, height): (u32, u32)| width == 0 || height == 0;
    match &init.content {
        InitContent::Picture(picture) if empty(picture.dimensions()) => {
            return Err(Error::request("init_image", "a picture with pixels", "empty"));
        }
        InitContent::Picture(_) => {}
        InitContent::Latent(latent) => check_latent(checkpoint, latent, shape)?,
    }
    let Some(Mask { picture, blur, content }) = &init.mask else { return Ok(()) };
    if empty(picture.dimensions()) {
        return Err(Error::request("mask_image", "a picture with pixels", "empty"));
    }
    if !(*blur >= 0.0 && *blur <= MOST_BLUR) {
        return Err(Error::request("mask_blur", format!("0 to {MOST_BLUR} pixels"), blur));
    }
    if *content == MaskedContent::Noise && request.denoising_start.is_some() {
        return Err(Error::request("masked_content", "original with `denoising_start`", content.as_str()));
    }
    Ok(())
}

fn check_latent(checkpoint: &Checkpoint, latent: &Latent, shape: [usize; 3]) -> Result<()> {
    if !checkpoint.hands_over() {
        return Err(Error::request("init_image", "a picture for this checkpoint's family", "a latent"));
    }
    if checkpoint.inpaints() {
        return Err(Error::request("init_image", "a picture for a denoiser that sees a mask", "a latent"));
    }
    let named = |[channels, height, width]: [usize; 3]| format!("{channels} × {height} × {width}");
    if latent.shape() != shape {
        let limit = format!("a latent of {}, as the row's `width` and `height` ask for", named(shape));
        return Err(Error::request("init_image", limit, named(latent.shape())));
    }
    Ok(())
}

/// A wider blur leaves nothing of a mask.
const MOST_BLUR: f64 = 256.0;
