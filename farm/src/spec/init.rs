//! Pictures and latents that a job starts from, and masks.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::RenderRequest;
use super::validate::{ValidationError, one_of, refuse};
use crate::catalog::ModelFacts;
use crate::latent;

/// A picture or a latent that a job starts from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[schema(as = InitImageSpec)]
pub struct InitImage {
    /// Its key in the artifact store. It names what never changes: the job's picture stays a function of the job.
    pub key: String,
    /// How much of the way from noise the job goes: above 0, at most 1. Absent: the option `denoising_start` says
    /// where it begins.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub strength: Option<f64>,
    /// What of the picture is painted anew; absent: all of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mask: Option<Mask>,
}

/// What of an init image is painted anew.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[schema(as = MaskSpec)]
pub struct Mask {
    /// The mask's key in the artifact store; white is painted anew.
    pub key: String,
    /// The deviation in pixels by which its edges are blurred.
    pub blur: f64,
    /// What the painted part starts from.
    pub content: MaskedContent,
}

/// What the painted part of a picture starts from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum MaskedContent {
    /// What the init image has there.
    Original,
    /// Noise.
    Noise,
}

impl MaskedContent {
    /// Every one.
    pub const ALL: [MaskedContent; 2] = [Self::Original, Self::Noise];

    /// The word used in JSON and logs.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Original => "original",
            Self::Noise => "noise",
        }
    }

    /// Reads the word back.
    pub fn parse(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|content| content.as_str() == word)
    }
}

/// Without a choice: as much as diffusers' pipelines do, which paint a masked part wholly anew.
const STRENGTH: f64 = 0.8;
const MASKED_STRENGTH: f64 = 1.0;

/// Pixels; a wider blur leaves nothing of a mask.
const MOST_BLUR: f64 = 256.0;

/// Bytes of a key.
const KEY_BYTES: usize = 512;

/// The fields of a request about init image and mask, which hang together.
pub(super) fn check(request: &RenderRequest, facts: &ModelFacts) -> Result<Option<InitImage>, ValidationError> {
    let needs = |field: &str, given: bool, other: &str| match given {
        true => Err(refuse(field, format!("absent without `{other}`"), "present")),
        false => Ok(()),
    };
    if request.mask_image.is_none() {
        needs("mask_blur", request.mask_blur.is_some(), "mask_image")?;
        needs("masked_content", request.masked_content.is_some(), "mask_image")?;
    }
    let Some(key) = &request.init_image else {
        needs("mask_image", request.mask_image.is_some(), "init_image")?;
        needs("strength", request.strength.is_some(), "init_image")?;
        needs("denoising_start", request.denoising_start.is_some(), "init_image")?;
        return Ok(None);
    };
    let key = check_key("init_image", key)?;
    if let Some(family) = facts.family.as_deref().filter(|family| latent::is_latent(&key) && !takes_latents(family)) {
        return Err(refuse("init_image", format!("a picture for a checkpoint of the family {family}"), "a latent"));
    }
    let mask = request.mask_image.as_deref().map(|key| check_mask(key, request)).transpose()?;
    Ok(Some(InitImage { key, strength: check_strength(request, facts)?, mask }))
}

/// Whether checkpoints of the family may start from latents: those that can end in one, but for those that must see
/// what a mask leaves of a picture.
fn takes_latents(family: &str) -> bool {
    family.starts_with("sdxl") && family != "sdxl_inpaint"
}

/// Where the job begins, unless its `denoising_start` says that.
fn check_strength(request: &RenderRequest, facts: &ModelFacts) -> Result<Option<f64>, ValidationError> {
    if request.denoising_start.is_some() {
        return match request.strength {
            Some(strength) => Err(refuse("strength", "absent with `denoising_start`", strength)),
            None => Ok(None),
        };
    }
    let masked = request.mask_image.is_some();
    let strength = request.strength.unwrap_or(if masked { MASKED_STRENGTH } else { STRENGTH });
    if !(strength > 0.0 && strength <= 1.0) {
        return Err(refuse("strength", "above 0 and at most 1", strength));
    }
    // Flow matching leaves a step to any strength; others cut the steps that are left to whole ones.
    let steps = request.steps.unwrap_or(i64::from(facts.steps));
    let cuts = facts.prediction.as_deref().is_some_and(|prediction| prediction != "flow");
    if cuts && steps > 0 && steps as f64 * strength < 1.0 {
        return Err(refuse("strength", format!("so much that of {steps} steps at least one is left"), strength));
    }
    Ok(Some(strength))
}

/// The width and height in pixels of the latent that a request starts from, where its name tells them.
pub(super) fn latent_size(request: &RenderRequest, facts: &ModelFacts) -> Option<(i64, i64)> {
    let (width, height) = latent::size_in_name(request.init_image.as_deref()?)?;
    let pixels = |values: u32| i64::from(values) * i64::from(facts.vae_factor);
    Some((pixels(width), pixels(height)))
}

fn check_mask(key: &str, request: &RenderRequest) -> Result<Mask, ValidationError> {
    let blur = request.mask_blur.unwrap_or(0.0);
    if !(0.0..=MOST_BLUR).contains(&blur) {
        return Err(refuse("mask_blur", format!("0 to {MOST_BLUR}"), blur));
    }
    let content = match request.masked_content.as_deref() {
        None => MaskedContent::Original,
        Some(word) => MaskedContent::parse(word)
            .ok_or_else(|| one_of("masked_content", MaskedContent::ALL.map(MaskedContent::as_str), word))?,
    };
    if content == MaskedContent::Noise && request.denoising_start.is_some() {
        return Err(refuse("masked_content", "`original` with `denoising_start`, which adds no noise", "`noise`"));
    }
    Ok(Mask { key: check_key("mask_image", key)?, blur, content })
}

/// A key of the artifact store. What a client may send beside such has been turned into one by now.
fn check_key(field: &str, key: &str) -> Result<String, ValidationError> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    let names_are_plain =
        key.split('/').all(|name| !name.is_empty() && !name.starts_with('.') && name.chars().all(plain));
    let end = key.rsplit_once('.').map_or("", |(_, end)| end);
    let picture = ["png", "jpg", "webp"].contains(&end);
    // A mask is a picture always.
    let fits = picture || (field == "init_image" && latent::is_latent(key));
    if key.len() > KEY_BYTES || !names_are_plain || !fits {
        let limit = "the key of a picture in the farm's artifact store (`POST /v1/artifacts` answers one), a data URL \
                     or an `s3://` address of that store";
        return Err(refuse(field, limit, format!("`{key}`")));
    }
    Ok(key.to_owned())
}
