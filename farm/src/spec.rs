//! Two types for every job: [`RenderRequest`] as sent, [`RenderSpec`] valid and with its defaults
//! filled in. Only the second travels.

mod init;
mod options;
mod validate;

pub use init::{InitImage, Mask, MaskedContent};
pub use options::{FamilyOptions, MicroConditioning, SkipLayerGuidance};
pub use validate::ValidationError;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::job::Lane;

/// The step rule that turns the denoiser's predictions into the next latent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Sampler {
    /// Deterministic DDIM (eta 0).
    Ddim,
    /// Euler.
    Euler,
    /// Euler with fresh noise at each step.
    EulerAncestral,
    /// DPM-Solver++ of second order, multistep.
    #[serde(rename = "dpmpp_2m")]
    Dpmpp2m,
    /// Pseudo numerical methods (PLMS).
    Pndm,
    /// Euler, for models that were trained by flow matching.
    FlowMatchEuler,
}

impl Sampler {
    /// Every sampler.
    pub const ALL: [Sampler; 6] =
        [Self::Ddim, Self::Euler, Self::EulerAncestral, Self::Dpmpp2m, Self::Pndm, Self::FlowMatchEuler];

    /// The word used in JSON and logs.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ddim => "ddim",
            Self::Euler => "euler",
            Self::EulerAncestral => "euler_ancestral",
            Self::Dpmpp2m => "dpmpp_2m",
            Self::Pndm => "pndm",
            Self::FlowMatchEuler => "flow_match_euler",
        }
    }

    /// Reads the word back.
    pub fn parse(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|sampler| sampler.as_str() == word)
    }
}

/// How the noise levels are spread over the steps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Schedule {
    /// The training schedule's own levels.
    Normal,
    /// Karras et al. 2022, eq. 5.
    Karras,
    /// Evenly spaced in log sigma.
    Exponential,
    /// Quantiles of a beta distribution.
    Beta,
}

impl Schedule {
    /// Every schedule.
    pub const ALL: [Schedule; 4] = [Self::Normal, Self::Karras, Self::Exponential, Self::Beta];

    /// The word used in JSON and logs.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Normal => "normal",
            Self::Karras => "karras",
            Self::Exponential => "exponential",
            Self::Beta => "beta",
        }
    }

    /// Reads the word back.
    pub fn parse(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|schedule| schedule.as_str() == word)
    }
}

/// A job as a client asks for it: only the prompt is required. Numbers are wider than any limit, so
/// that a value out of range is answered with the limit and not with a parse error.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RenderRequest {
    /// Accepted for compatibility; the only value is `image_generation`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub operation: Option<String>,
    /// The checkpoint, as the catalog names it. Default: the catalog's default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    /// What to draw.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prompt: Option<String>,
    /// What to steer away from. Default: empty.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub negative_prompt: Option<String>,
    /// Width in pixels. Default: the checkpoint's native width.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub width: Option<i64>,
    /// Height in pixels. Default: the checkpoint's native height.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub height: Option<i64>,
    /// Denoising steps. Default: the checkpoint's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub steps: Option<i64>,
    /// Classifier-free guidance scale; 1 or less turns guidance off. Default: the checkpoint's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guidance_scale: Option<f64>,
    /// `ddim`, `euler`, `euler_ancestral`, `dpmpp_2m`, `pndm` or `flow_match_euler`. Default: the checkpoint's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sampler: Option<String>,
    /// `normal`, `karras`, `exponential` or `beta`. Default: the checkpoint's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub schedule: Option<String>,
    /// Seed of the noise. Default: drawn at random and recorded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seed: Option<i64>,
    /// Stable Diffusion XL: the sizes that the picture shall look as if it had. Default: its own, uncropped.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub micro_conditioning: Option<MicroConditioning>,
    /// Families with T5: tokens of the prompt that it reads at most. Default: the checkpoint's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_sequence_length: Option<i64>,
    /// FLUX: the scale of guidance by the negative prompt; 1 or less is none. Default: none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub true_cfg_scale: Option<f64>,
    /// Stable Diffusion 3: guidance away from what the denoiser predicts without some layers. Default: none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub skip_layer_guidance: Option<SkipLayerGuidance>,
    /// Stable Diffusion XL: the share of the way from noise, above 0 and below 1, that lies behind the init image: the
    /// job begins there, without noise, and has no `strength`. Default: the strength says where it begins.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub denoising_start: Option<f64>,
    /// Stable Diffusion XL: the share of the way from noise, above 0 and below 1, after which the job ends. What it
    /// makes is then a latent, which another job may start from. Default: the whole way, to a picture.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub denoising_end: Option<f64>,
    /// A picture to start from: a key that `POST /v1/artifacts` answered, a data URL of a PNG, JPEG or WebP, or an
    /// `s3://` address in the farm's bucket. Resized to the job's size. Stable Diffusion XL: or a latent, in the same
    /// forms, which the job takes its size from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub init_image: Option<String>,
    /// What of the init image is painted anew: white is, black stays. In the same forms.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mask_image: Option<String>,
    /// How much of the way from noise the job goes, above 0 and at most 1. Default: 0.8, with a mask 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub strength: Option<f64>,
    /// The deviation in pixels by which the mask's edges are blurred, 0 to 256. Default: 0, a mask of all or nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mask_blur: Option<f64>,
    /// What the painted part starts from: `original` or `noise`. Default: `original`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub masked_content: Option<String>,
    /// `interactive` or `bulk`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lane: Option<String>,
    /// Labels to filter listings by.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tags: Option<Vec<String>>,
    /// Anything of the client's own; handed back with the job and written to the sidecar.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metadata: Option<serde_json::Map<String, serde_json::Value>>,
}

/// A valid job, complete: the picture is a function of this (and of the checkpoint's weights).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct RenderSpec {
    /// The checkpoint, as the catalog names it.
    pub model: String,
    /// What to draw.
    pub prompt: String,
    /// What to steer away from.
    pub negative_prompt: String,
    /// Width in pixels, a multiple of the checkpoint's VAE factor.
    pub width: u32,
    /// Height in pixels, a multiple of the checkpoint's VAE factor.
    pub height: u32,
    /// Denoising steps.
    pub steps: u32,
    /// Classifier-free guidance scale; 1 or less: one denoiser pass a step.
    pub guidance_scale: f64,
    /// `None`: what the checkpoint's scheduler configuration says.
    pub sampler: Option<Sampler>,
    /// `None`: what the checkpoint's scheduler configuration says.
    pub schedule: Option<Schedule>,
    /// Seed of the noise, 0 to 2^63-1.
    pub seed: u64,
    /// What only some families read.
    #[serde(default, skip_serializing_if = "FamilyOptions::are_default")]
    pub options: FamilyOptions,
    /// A picture or a latent to start from; absent: from noise alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub init_image: Option<InitImage>,
    /// The lane.
    pub lane: Lane,
    /// The client's labels.
    #[serde(default)]
    pub tags: Vec<String>,
    /// The client's own data.
    #[serde(default)]
    pub metadata: serde_json::Map<String, serde_json::Value>,
}

/// What a request may ask for at most. In the configuration under `limits`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Limits {
    /// Bytes of a prompt or negative prompt.
    pub prompt_bytes: usize,
    /// Pixels of a side.
    pub side: u32,
    /// Pixels of a picture.
    pub pixels: u64,
    /// Denoising steps.
    pub steps: u32,
    /// Guidance scale.
    pub guidance_scale: f64,
    /// Tags of a job.
    pub tags: usize,
    /// Bytes of a tag.
    pub tag_bytes: usize,
    /// Bytes of `metadata` as JSON.
    pub metadata_bytes: usize,
    /// Jobs of a submission.
    pub submission_jobs: u64,
    /// Bytes of a JSON body (streamed JSON Lines are bounded a line at a time by this).
    pub body_bytes: usize,
    /// Bytes of an init image, mask or latent as it is sent.
    pub init_image_bytes: usize,
    /// Pixels of an init image or mask, looked at before it is decoded.
    pub init_image_pixels: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            prompt_bytes: 10_000,
            side: 4096,
            pixels: 4096 * 4096,
            steps: 1000,
            guidance_scale: 100.0,
            tags: 32,
            tag_bytes: 128,
            metadata_bytes: 16 * 1024,
            submission_jobs: 10_000_000,
            body_bytes: 32 * 1024 * 1024,
            init_image_bytes: 16 * 1024 * 1024,
            init_image_pixels: 8192 * 8192,
        }
    }
}
