//! Options that only some families of models read, and their checks.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::validate::{ValidationError, refuse};
use super::{Limits, RenderRequest};
use crate::catalog::ModelFacts;

/// The largest side that micro-conditioning may name: larger pictures nobody trained on.
const LARGEST_SIDE: u32 = 65_536;

/// Tokens that no T5 encoder reads more of.
const MOST_TOKENS: i64 = 512;

/// More layers than any denoiser has.
const MOST_LAYERS: usize = 256;

/// What only some families of models read.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct FamilyOptions {
    /// Stable Diffusion XL: the sizes that the picture shall look as if it had.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub micro_conditioning: Option<MicroConditioning>,
    /// Families with T5: tokens of the prompt that it reads at most; `None`: as many as the checkpoint is used to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_sequence_length: Option<u32>,
    /// FLUX: the scale of guidance by the negative prompt; 1 or less is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub true_cfg_scale: Option<f64>,
    /// Stable Diffusion 3: guidance away from what the denoiser predicts without some layers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub skip_layer_guidance: Option<SkipLayerGuidance>,
    /// Stable Diffusion XL: the share of the way from noise that lies behind the init image.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub denoising_start: Option<f64>,
    /// Stable Diffusion XL: the share of the way from noise after which the job ends, in a latent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub denoising_end: Option<f64>,
}

/// The sizes, in pixels, that a Stable Diffusion XL picture shall look as if it had.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct MicroConditioning {
    /// Width and height before cropping and scaling. Default: the picture's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub original_size: Option<(u32, u32)>,
    /// What was cut off on the left and at the top. Default: nothing.
    pub crop: (u32, u32),
    /// Width and height that were aimed at. Default: the picture's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub target_size: Option<(u32, u32)>,
}

/// Guidance away from what the denoiser predicts without some of its layers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SkipLayerGuidance {
    /// The layers that are left out, counted from 0.
    pub layers: Vec<u32>,
    /// How far the difference is followed.
    #[serde(default = "SkipLayerGuidance::usual_scale")]
    pub scale: f64,
    /// The share of the steps after which it begins.
    #[serde(default = "SkipLayerGuidance::usual_start")]
    pub start: f64,
    /// The share of the steps after which it ends.
    #[serde(default = "SkipLayerGuidance::usual_stop")]
    pub stop: f64,
}

impl SkipLayerGuidance {
    // What Stability AI gives for Stable Diffusion 3.5 medium.
    fn usual_scale() -> f64 {
        2.8
    }

    fn usual_start() -> f64 {
        0.01
    }

    fn usual_stop() -> f64 {
        0.2
    }

    fn check(&self) -> Result<(), ValidationError> {
        if self.layers.is_empty() || self.layers.len() > MOST_LAYERS {
            let value = format!("{} layers", self.layers.len());
            return Err(refuse("skip_layer_guidance.layers", format!("1 to {MOST_LAYERS} layers"), value));
        }
        if !(0.0..=100.0).contains(&self.scale) {
            return Err(refuse("skip_layer_guidance.scale", "0 to 100", self.scale));
        }
        for (field, share) in [("start", self.start), ("stop", self.stop)] {
            if !(0.0..=1.0).contains(&share) {
                return Err(refuse(&format!("skip_layer_guidance.{field}"), "0 to 1", share));
            }
        }
        Ok(())
    }
}

impl MicroConditioning {
    fn check(&self) -> Result<(), ValidationError> {
        let sizes = [("original_size", self.original_size), ("target_size", self.target_size)];
        for (field, size) in sizes.into_iter().filter_map(|(field, size)| Some((field, size?))) {
            if [size.0, size.1].into_iter().any(|side| !(1..=LARGEST_SIDE).contains(&side)) {
                let limit = format!("two sides of 1 to {LARGEST_SIDE}");
                return Err(refuse(&format!("micro_conditioning.{field}"), limit, format!("{size:?}")));
            }
        }
        if self.crop.0.max(self.crop.1) > LARGEST_SIDE {
            let limit = format!("two numbers of 0 to {LARGEST_SIDE}");
            return Err(refuse("micro_conditioning.crop", limit, format!("{:?}", self.crop)));
        }
        Ok(())
    }
}

impl FamilyOptions {
    /// Whether nothing is asked for.
    pub fn are_default(&self) -> bool {
        *self == Self::default()
    }

    /// The options of a request to a checkpoint with these facts. What its family does not read is refused:
    /// silently ignored, it would be missed in the picture.
    pub(super) fn read(request: &RenderRequest, facts: &ModelFacts, limits: &Limits) -> Result<Self, ValidationError> {
        let asked = [
            ("micro_conditioning", request.micro_conditioning.is_some(), &["sdxl"][..]),
            ("max_sequence_length", request.max_sequence_length.is_some(), &["sd3", "flux"]),
            ("true_cfg_scale", request.true_cfg_scale.is_some(), &["flux"]),
            ("skip_layer_guidance", request.skip_layer_guidance.is_some(), &["sd3"]),
            ("denoising_start", request.denoising_start.is_some(), &["sdxl"]),
            ("denoising_end", request.denoising_end.is_some(), &["sdxl"]),
        ];
        for (field, present, families) in asked {
            if let Some(family) = facts.family.as_deref().filter(|_| present)
                && !families.iter().any(|reads| family.starts_with(reads))
            {
                return Err(refuse(field, format!("absent for a checkpoint of the family {family}"), "present"));
            }
        }
        if let Some(tokens) = request.max_sequence_length.filter(|tokens| !(1..=MOST_TOKENS).contains(tokens)) {
            return Err(refuse("max_sequence_length", format!("1 to {MOST_TOKENS}"), tokens));
        }
        if let Some(scale) = request.true_cfg_scale.filter(|scale| !(0.0..=limits.guidance_scale).contains(scale)) {
            return Err(refuse("true_cfg_scale", format!("0 to {}", limits.guidance_scale), scale));
        }
        request.micro_conditioning.as_ref().map_or(Ok(()), MicroConditioning::check)?;
        request.skip_layer_guidance.as_ref().map_or(Ok(()), SkipLayerGuidance::check)?;
        check_way(request.denoising_start, request.denoising_end)?;
        Ok(Self {
            micro_conditioning: request.micro_conditioning,
            max_sequence_length: request.max_sequence_length.map(|tokens| tokens as u32),
            true_cfg_scale: request.true_cfg_scale,
            skip_layer_guidance: request.skip_layer_guidance.clone(),
            denoising_start: request.denoising_start,
            denoising_end: request.denoising_end,
        })
    }
}

/// Where on the way from noise a job begins and ends.
fn check_way(start: Option<f64>, end: Option<f64>) -> Result<(), ValidationError> {
    for (field, share) in [("denoising_start", start), ("denoising_end", end)] {
        if let Some(share) = share.filter(|share| !(*share > 0.0 && *share < 1.0)) {
            return Err(refuse(field, "above 0 and below 1", share));
        }
    }
    match (start, end) {
        (Some(start), Some(end)) if start >= end => {
            Err(refuse("denoising_start", format!("below `denoising_end`, which is {end}"), start))
        }
        _ => Ok(()),
    }
}
