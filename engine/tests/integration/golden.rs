//! Pictures that diffusers made, and how far ours are from them.

use std::path::Path;
use std::sync::Arc;

use engine::{Checkpoint, Mask, MicroConditioning, RowRequest, SkipLayerGuidance, render};
use image::RgbImage;
use serde::Deserialize;

use crate::support::{fixtures, init, largest_difference, mask};

/// One entry of a list of pictures; what a family does not have is absent.
#[derive(Deserialize)]
pub struct Golden {
    pub checkpoint: String,
    #[serde(default)]
    pub file: String,
    prompt: String,
    negative_prompt: String,
    pub width: usize,
    pub height: usize,
    steps: usize,
    guidance_scale: f64,
    sampler: Option<String>,
    schedule: Option<String>,
    seed: u64,
    original_size: Option<(usize, usize)>,
    #[serde(default)]
    crop: (usize, usize),
    target_size: Option<(usize, usize)>,
    max_sequence_length: Option<usize>,
    true_cfg_scale: Option<f64>,
    skip_layer_guidance: Option<SkipLayers>,
    init_image: Option<String>,
    mask_image: Option<String>,
    strength: Option<f64>,
    denoising_start: Option<f64>,
    denoising_end: Option<f64>,
}

/// Skip-layer guidance as the lists have it.
#[derive(Clone, Deserialize)]
struct SkipLayers {
    layers: Vec<usize>,
    scale: f64,
    start: f64,
    stop: f64,
}

impl SkipLayers {
    fn asked(self) -> SkipLayerGuidance {
        let Self { layers, scale, start, stop } = self;
        SkipLayerGuidance { layers, scale, start, stop }
    }
}

/// The entries of a list.
pub fn read(list: &Path) -> Vec<Golden> {
    serde_json::from_str(&std::fs::read_to_string(list).unwrap()).unwrap()
}

impl Golden {
    /// What was asked for, but for a latent to start from.
    pub fn request(&self) -> RowRequest {
        let mask = self.mask();
        RowRequest {
            prompt: self.prompt.clone(),
            negative_prompt: self.negative_prompt.clone(),
            width: self.width,
            height: self.height,
            steps: self.steps,
            guidance_scale: self.guidance_scale,
            sampler: self.sampler.as_deref().map(|word| word.parse().unwrap()),
            schedule: self.schedule.as_deref().map(|word| word.parse().unwrap()),
            seed: self.seed,
            micro_conditioning: MicroConditioning {
                original_size: self.original_size,
                crop: self.crop,
                target_size: self.target_size,
            },
            max_sequence_length: self.max_sequence_length,
            true_cfg_scale: self.true_cfg_scale,
            skip_layer_guidance: self.skip_layer_guidance.clone().map(SkipLayers::asked),
            init_image: self.init_image.as_deref().and_then(|picture| init(picture, self.strength(), mask)),
            denoising_start: self.denoising_start,
            denoising_end: self.denoising_end,
        }
    }

    /// The mask, where there is one.
    pub fn mask(&self) -> Option<Mask> {
        self.mask_image.as_deref().map(mask)
    }

    /// The strength, or the whole way.
    pub fn strength(&self) -> f64 {
        self.strength.unwrap_or(1.0)
    }

    /// How many levels of 255 the picture of `checkpoint` is off diffusers' at most.
    pub fn difference(&self, checkpoint: &Arc<Checkpoint>) -> u8 {
        largest_difference(&render(checkpoint, &self.request(), |_, _| {}).unwrap(), &self.expected())
    }

    /// The picture that diffusers made.
    pub fn expected(&self) -> RgbImage {
        image::open(fixtures().join("pictures").join(&self.file)).unwrap().into_rgb8()
    }
}
