//! From a request as sent to a valid spec: every field checked, every default filled in.

use std::fmt;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use utoipa::ToSchema;

use super::{FamilyOptions, Limits, RenderRequest, RenderSpec, Sampler, Schedule, init};
use crate::catalog::{Catalog, ModelFacts};
use crate::job::Lane;

/// Levels of `metadata`: it travels within other JSON, which readers follow down to 128 levels.
const METADATA_DEPTH: usize = 64;

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

pub(super) fn refuse(field: &str, limit: impl Into<String>, value: impl ToString) -> ValidationError {
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
            micro_conditioning,
            max_sequence_length,
            true_cfg_scale,
            skip_layer_guidance,
            denoising_start,
            denoising_end,
            init_image,
            mask_image,
            strength,
            mask_blur,
            masked_content,
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
        let options = FamilyOptions::read(&self, facts, limits)?;
        let init_image = init::check(&self, facts)?;
        let (width, height) = check_size(self.width, self.height, init::latent_size(&self, facts), facts, limits)?;
        let prompt = self.prompt.ok_or_else(|| refuse("prompt", "present", "missing"))?;
        let negative_prompt = self.negative_prompt.unwrap_or_default();
        check_text("prompt", &prompt, limits)?;
        check_text("negative_prompt", &negative_prompt, limits)?;
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
            steps: check_steps(self.steps, sampler.or(facts.sampler), facts, limits)?,
            guidance_scale: check_guidance(self.guidance_scale, facts, limits)?,
            sampler: sampler.or(facts.sampler),
            schedule: schedule.or(facts.schedule),
            seed: match self.seed {
                None => draw_seed() & i64::MAX as u64,
                Some(seed) => u64::try_from(seed).map_err(|_| refuse("seed", "0 to 9223372036854775807", seed))?,
            },
            options,
            init_image,
            lane,
            tags: check_tags(self.tags.unwrap_or_default(), limits)?,
            metadata: check_metadata(self.metadata.unwrap_or_default(), limits)?,
        })
    }
}

pub(super) fn one_of<const N: usize>(field: &str, words: [&str; N], value: &str) -> ValidationError {
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

/// Width and height: those of the latent, if the job starts from one.
fn check_size(
    width: Option<i64>,
    height: Option<i64>,
    latent: Option<(i64, i64)>,
    facts: &ModelFacts,
    limits: &Limits,
) -> Result<(u32, u32), ValidationError> {
    if let Some(latent) = latent {
        let asked = (width.unwrap_or(latent.0), height.unwrap_or(latent.1));
        if asked != latent {
            let limit = format!("{} × {}, the size of the latent `init_image`, or absent", latent.0, latent.1);
            return Err(refuse("width × height", limit, format!("{} × {}", asked.0, asked.1)));
        }
    }
    let (width, height) = (width.or(latent.map(|size| size.0)), height.or(latent.map(|size| size.1)));
    let side = |field: &str, asked: Option<i64>, native: u32| {
        let value = asked.unwrap_or(i64::from(native));
        let factor = i64::from(facts.side_multiple());
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

fn check_steps(
    steps: Option<i64>,
    sampler: Option<Sampler>,
    facts: &ModelFacts,
    limits: &Limits,
) -> Result<u32, ValidationError> {
    let steps = steps.unwrap_or(i64::from(facts.steps));
    if steps < 1 || steps > i64::from(limits.steps) {
        return Err(refuse("steps", format!("1 to {}", limits.steps), steps));
    }
    let (by_pndm, least) = (sampler.map_or(facts.samples_by_pndm, |it| it == Sampler::Pndm), facts.least_pndm_steps);
    if by_pndm && steps < i64::from(least) {
        let limit = format!("at least {least} for pndm, whose Runge-Kutta steps this checkpoint does not skip");
        return Err(refuse("steps", limit, steps));
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

fn check_metadata(metadata: Map<String, Value>, limits: &Limits) -> Result<Map<String, Value>, ValidationError> {
    let text = serde_json::to_string(&metadata).expect("a JSON map can be written");
    if text.len() > limits.metadata_bytes {
        let limit = format!("at most {} bytes of JSON", limits.metadata_bytes);
        return Err(refuse("metadata", limit, format!("{} bytes", text.len())));
    }
    let depth = metadata.values().map(depth).max().map_or(1, |deepest| deepest + 1);
    if depth > METADATA_DEPTH {
        return Err(refuse("metadata", format!("at most {METADATA_DEPTH} levels deep"), format!("{depth} levels")));
    }
    // Postgres cannot hold U+0000 in jsonb.
    if metadata.iter().any(|(key, value)| key.contains('\0') || holds_nul(value)) {
        return Err(refuse("metadata", "without NUL characters", "text with one"));
    }
    Ok(metadata)
}

/// Levels of lists and maps in a value; 0 for what holds no other.
fn depth(value: &Value) -> usize {
    let below = match value {
        Value::Array(list) => list.iter().map(depth).max(),
        Value::Object(map) => map.values().map(depth).max(),
        _ => return 0,
    };
    below.unwrap_or(0) + 1
}

fn holds_nul(value: &Value) -> bool {
    match value {
        Value::String(text) => text.contains('\0'),
        Value::Array(list) => list.iter().any(holds_nul),
        Value::Object(map) => map.iter().any(|(key, value)| key.contains('\0') || holds_nul(value)),
        _ => false,
    }
}

#[cfg(test)]
mod tests;
