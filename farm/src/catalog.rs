//! Which checkpoints the farm knows, and the facts about each that defaults and checks need.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::spec::{Sampler, Schedule, ValidationError};

/// The name of the checkpoint that the binary carries.
pub const DEMO: &str = "demo";

/// Facts about one checkpoint.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ModelFacts {
    /// Where the weights come from: a folder in diffusers layout, or a hub id (`org/name[@revision]`).
    pub source: String,
    /// Native width in pixels.
    pub width: u32,
    /// Native height in pixels.
    pub height: u32,
    /// Pixels a latent cell covers; both sides of a picture are multiples of it.
    pub vae_factor: u32,
    /// Default number of steps.
    pub steps: u32,
    /// Default guidance scale.
    pub guidance_scale: f64,
    /// Default sampler; `None`: what the checkpoint's scheduler configuration says.
    pub sampler: Option<Sampler>,
    /// Default schedule; `None`: what the checkpoint's scheduler configuration says.
    pub schedule: Option<Schedule>,
}

/// A checkpoint as the configuration names it (`[models.NAME]`). What is left open is read from the
/// checkpoint's own files where they are at hand, else taken from [`ModelFacts::sd15`].
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ModelConfig {
    /// A folder in diffusers layout, or a hub id (`org/name[@revision]`).
    pub source: String,
    /// Native width in pixels.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub width: Option<u32>,
    /// Native height in pixels.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub height: Option<u32>,
    /// Pixels a latent cell covers.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vae_factor: Option<u32>,
    /// Default number of steps.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub steps: Option<u32>,
    /// Default guidance scale.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub guidance_scale: Option<f64>,
    /// Default sampler.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sampler: Option<Sampler>,
    /// Default schedule.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub schedule: Option<Schedule>,
}

impl ModelFacts {
    /// Stable Diffusion 1.5's, the fallback for what neither configuration nor files say.
    pub fn sd15(source: impl Into<String>) -> Self {
        Self {
            source: source.into(),
            width: 512,
            height: 512,
            vae_factor: 8,
            steps: 25,
            guidance_scale: 7.5,
            sampler: None,
            schedule: None,
        }
    }

    /// Facts for `config`, its gaps filled from the checkpoint's `unet/config.json` and
    /// `vae/config.json` if `folder` holds them.
    pub fn read(config: &ModelConfig, folder: Option<&Path>) -> Self {
        let mut facts = Self::sd15(config.source.clone());
        if let Some((side, factor)) = folder.and_then(native_size) {
            (facts.width, facts.height, facts.vae_factor) = (side, side, factor);
        }
        facts.width = config.width.unwrap_or(facts.width);
        facts.height = config.height.unwrap_or(facts.height);
        facts.vae_factor = config.vae_factor.unwrap_or(facts.vae_factor);
        facts.steps = config.steps.unwrap_or(facts.steps);
        facts.guidance_scale = config.guidance_scale.unwrap_or(facts.guidance_scale);
        facts.sampler = config.sampler;
        facts.schedule = config.schedule;
        facts
    }
}

/// Native side and VAE factor: `sample_size` of the UNet, and a halving for every VAE block but one.
fn native_size(folder: &Path) -> Option<(u32, u32)> {
    let read = |part: &str| -> Option<serde_json::Value> {
        serde_json::from_slice(&std::fs::read(folder.join(part).join("config.json")).ok()?).ok()
    };
    let levels = read("vae")?.get("block_out_channels")?.as_array()?.len();
    let factor = 1u32.checked_shl(levels.checked_sub(1)? as u32)?;
    let side = read("unet")?.get("sample_size")?.as_u64()?;
    Some((u32::try_from(side).ok()?.checked_mul(factor)?, factor))
}

/// Every checkpoint by name, and the one to use where none is named.
#[derive(Clone, Debug, PartialEq)]
pub struct Catalog {
    models: BTreeMap<String, ModelFacts>,
    default: String,
}

impl Catalog {
    /// A catalog of `models`, one of which is the default.
    pub fn new(models: BTreeMap<String, ModelFacts>, default: impl Into<String>) -> Result<Self, ValidationError> {
        let catalog = Self { models, default: default.into() };
        catalog.find(None)?;
        Ok(catalog)
    }

    /// The checkpoint of that name, or the default one. An unknown name is answered with the known.
    pub fn find(&self, name: Option<&str>) -> Result<(&str, &ModelFacts), ValidationError> {
        let name = name.unwrap_or(&self.default);
        self.models.get_key_value(name).map(|(name, facts)| (name.as_str(), facts)).ok_or_else(|| ValidationError {
            field: "model".into(),
            limit: format!("one of {}", self.models.keys().cloned().collect::<Vec<_>>().join(", ")),
            value: format!("`{}`", name.chars().take(120).collect::<String>()),
        })
    }

    /// All checkpoints, by name.
    pub fn models(&self) -> impl Iterator<Item = (&str, &ModelFacts)> {
        self.models.iter().map(|(name, facts)| (name.as_str(), facts))
    }

    /// The name used where a job names none.
    pub fn default_model(&self) -> &str {
        &self.default
    }
}
