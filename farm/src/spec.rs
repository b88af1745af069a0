//! Two types for every job: [`RenderRequest`] as sent, [`RenderSpec`] valid and with its defaults
//! filled in. Only the second travels.

use std::fmt;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::catalog::{Catalog, ModelFacts};
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
}

impl Sampler {
    /// Every sampler.
    pub const ALL: [Sampler; 5] = [Self::Ddim, Self::Euler, Self::EulerAncestral, Self::Dpmpp2m, Self::Pndm];

    /// The word used in JSON and logs.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ddim => "ddim",
            Self::Euler => "euler",
            Self::EulerAncestral => "euler_ancestral",
            Self::Dpmpp2m => "dpmpp_2m",
            Self::Pndm => "pndm",
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
    /// `ddim`, `euler`, `euler_ancestral`, `dpmpp_2m` or `pndm`. Default: the checkpoint's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sampler: Option<String>,
    /// `normal`, `karras`, `exponential` or `beta`. Default: the checkpoint's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub schedule: Option<String>,
    /// Seed of the noise. Default: drawn at random and recorded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seed: Option<i64>,
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
        }
    }
}

/// A request that cannot become a job: names the field, the limit and the value.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ValidationError {
    /// The field of the request.
    pub field: String,
    /// What it must be.
    pub limit: String,
    /// What it was.
    pub value: String,
}

impl fmt::Display for ValidationError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "`{}` must be {}, but is {}", self.field, self.limit, self.value)
    }
}

impl std::error::Error for ValidationError {}

fn refuse(field: &str, limit: impl Into<String>, value: impl ToString) -> ValidationError {
    let mut value = value.to_string();
    if value.chars().count() > 120 {
        value = value.chars().take(120).chain("…".chars()).collect();
    }
    ValidationError { field: field.to_owned(), limit: limit.into(), value }
}

impl RenderRequest {
    /// Fills what this request leaves open from `defaults` (a submission's), field by field.
    pub fn or(self, defaults: &RenderRequest) -> RenderRequest {
        macro_rules! pick {
            ($($field:ident),*) => { RenderRequest { $($field: self.$field.or_else(|| defaults.$field.clone())),* } };
        }
        pick!(
            operation,
            model,
            prompt,
            negative_prompt,
            width,
            height,
            steps,
            guidance_scale,
            sampler,
            schedule,
            seed,
            lane,
            tags,
            metadata
        )
    }

    /// Checks every field and fills the defaults from the catalog. A missing seed is drawn by
    /// `draw_seed`; a missing lane becomes `default_lane`.
    pub fn validate(
        self,
        catalog: &Catalog,
        limits: &Limits,
        default_lane: Lane,
        draw_seed: impl FnOnce() -> u64,
    ) -> Result<RenderSpec, ValidationError> {
        if let Some(operation) = &self.operation
            && operation != "image_generation"
        {
            return Err(refuse("operation", "`image_generation`", format!("`{operation}`")));
        }
        let (model, facts) = catalog.find(self.model.as_deref())?;
        let prompt = self.prompt.ok_or_else(|| refuse("prompt", "present", "missing"))?;
        let negative_prompt = self.negative_prompt.unwrap_or_default();
        check_text("prompt", &prompt, limits)?;
        check_text("negative_prompt", &negative_prompt, limits)?;
        let (width, height) = check_size(self.width, self.height, facts, limits)?;
        let lane = match self.lane {
            None => default_lane,
            Some(word) => Lane::parse(&word).ok_or_else(|| one_of("lane", Lane::ALL.map(Lane::as_str), &word))?,
        };
        let sampler = self
            .sampler
            .map(|word| {
                Sampler::parse(&word).ok_or_else(|| one_of("sampler", Sampler::ALL.map(Sampler::as_str), &word))
            })
            .transpose()?;
        let schedule = self
            .schedule
            .map(|word| {
                Schedule::parse(&word).ok_or_else(|| one_of("schedule", Schedule::ALL.map(Schedule::as_str), &word))
            })
            .transpose()?;
        Ok(RenderSpec {
            model: model.to_owned(),
            prompt,
            negative_prompt,
            width,
            height,
            steps: check_steps(self.steps, facts, limits)?,
            guidance_scale: check_guidance(self.guidance_scale, facts, limits)?,
            sampler: sampler.or(facts.sampler),
            schedule: schedule.or(facts.schedule),
            seed: match self.seed {
                None => draw_seed(),
                Some(seed) => u64::try_from(seed).map_err(|_| refuse("seed", "0 to 9223372036854775807", seed))?,
            },
            lane,
            tags: check_tags(self.tags.unwrap_or_default(), limits)?,
            metadata: check_metadata(self.metadata.unwrap_or_default(), limits)?,
        })
    }
}

fn one_of<const N: usize>(field: &str, words: [&str; N], value: &str) -> ValidationError {
    refuse(field, format!("one of {}", words.join(", ")), format!("`{value}`"))
}

fn check_text(field: &str, text: &str, limits: &Limits) -> Result<(), ValidationError> {
    if text.len() > limits.prompt_bytes {
        return Err(refuse(field, format!("at most {} bytes", limits.prompt_bytes), format!("{} bytes", text.len())));
    }
    if text.contains('\0') {
        return Err(refuse(field, "without NUL characters", "text with one"));
    }
    Ok(())
}

fn check_size(
    width: Option<i64>,
    height: Option<i64>,
    facts: &ModelFacts,
    limits: &Limits,
) -> Result<(u32, u32), ValidationError> {
    let side = |field: &str, asked: Option<i64>, native: u32| {
        let value = asked.unwrap_or(i64::from(native));
        let factor = i64::from(facts.vae_factor);
        if value < factor || value > i64::from(limits.side) || value % factor != 0 {
            let limit = format!("{factor} to {} and a multiple of {factor}", limits.side);
            return Err(refuse(field, limit, value));
        }
        Ok(value as u32)
    };
    let (width, height) = (side("width", width, facts.width)?, side("height", height, facts.height)?);
    let pixels = u64::from(width) * u64::from(height);
    if pixels > limits.pixels {
        return Err(refuse("width × height", format!("at most {} pixels", limits.pixels), pixels));
    }
    Ok((width, height))
}

fn check_steps(steps: Option<i64>, facts: &ModelFacts, limits: &Limits) -> Result<u32, ValidationError> {
    let steps = steps.unwrap_or(i64::from(facts.steps));
    if steps < 1 || steps > i64::from(limits.steps) {
        return Err(refuse("steps", format!("1 to {}", limits.steps), steps));
    }
    Ok(steps as u32)
}

fn check_guidance(scale: Option<f64>, facts: &ModelFacts, limits: &Limits) -> Result<f64, ValidationError> {
    let scale = scale.unwrap_or(facts.guidance_scale);
    if !(0.0..=limits.guidance_scale).contains(&scale) {
        return Err(refuse("guidance_scale", format!("0 to {}", limits.guidance_scale), scale));
    }
    Ok(scale)
}

fn check_tags(tags: Vec<String>, limits: &Limits) -> Result<Vec<String>, ValidationError> {
    if tags.len() > limits.tags {
        return Err(refuse("tags", format!("at most {} tags", limits.tags), format!("{} tags", tags.len())));
    }
    if let Some(tag) = tags.iter().find(|tag| tag.is_empty() || tag.len() > limits.tag_bytes || tag.contains('\0')) {
        return Err(refuse("tags", format!("each 1 to {} bytes without NUL", limits.tag_bytes), format!("`{tag}`")));
    }
    Ok(tags)
}

fn check_metadata(
    metadata: serde_json::Map<String, serde_json::Value>,
    limits: &Limits,
) -> Result<serde_json::Map<String, serde_json::Value>, ValidationError> {
    let text = serde_json::to_string(&metadata).expect("a JSON map can be written");
    if text.len() > limits.metadata_bytes {
        let limit = format!("at most {} bytes of JSON", limits.metadata_bytes);
        return Err(refuse("metadata", limit, format!("{} bytes", text.len())));
    }
    // Postgres cannot hold U+0000 in jsonb.
    if text.contains("\\u0000") {
        return Err(refuse("metadata", "without NUL characters", "text with one"));
    }
    Ok(metadata)
}
