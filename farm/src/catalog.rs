//! Which checkpoints the farm knows, and the facts about each that defaults and checks need.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::spec::{Sampler, Schedule, ValidationError};

/// The name of the checkpoint that the binary carries.
pub const DEMO: &str = "demo";

/// The coarsest latents there are, with room to spare.
const MAX_VAE_FACTOR: u32 = 128;

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

    fn check(&self, name: &str) -> Result<(), ValidationError> {
        let must = |key: &str, limit: String, value: String, holds: bool| match holds {
            true => Ok(()),
            false => Err(ValidationError { field: format!("models.{name}.{key}"), limit, value }),
        };
        let factor = self.vae_factor;
        must(
            "vae_factor",
            format!("1 to {MAX_VAE_FACTOR}"),
            factor.to_string(),
            (1..=MAX_VAE_FACTOR).contains(&factor),
        )?;
        for (key, side) in [("width", self.width), ("height", self.height)] {
            must(
                key,
                format!("a multiple of {factor}, at least {factor}"),
                side.to_string(),
                side > 0 && side % factor == 0,
            )?;
        }
        must("steps", "at least 1".into(), self.steps.to_string(), self.steps >= 1)?;
        let scale = self.guidance_scale;
        must("guidance_scale", "0 or more".into(), scale.to_string(), scale.is_finite() && scale >= 0.0)
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
    /// A catalog of `models`, one of which is the default. Facts that no picture could have are refused,
    /// naming the key of the configuration.
    pub fn new(models: BTreeMap<String, ModelFacts>, default: impl Into<String>) -> Result<Self, ValidationError> {
        for (name, facts) in &models {
            facts.check(name)?;
        }
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

#[cfg(test)]
mod tests {
    use super::*;

    fn catalog(facts: ModelFacts) -> Result<Catalog, ValidationError> {
        Catalog::new(BTreeMap::from([("b".to_owned(), ModelFacts::sd15("hub/b")), ("a".to_owned(), facts)]), "a")
    }

    #[test]
    fn without_a_name_the_default_is_found() {
        let catalog = catalog(ModelFacts::sd15("hub/a")).unwrap();
        assert_eq!(catalog.default_model(), "a");
        assert_eq!(catalog.find(None).unwrap().0, "a");
        assert_eq!(catalog.find(Some("b")).unwrap().1.source, "hub/b");
        assert_eq!(catalog.models().map(|(name, _)| name).collect::<Vec<_>>(), ["a", "b"]);
    }

    #[test]
    fn an_unknown_name_is_answered_with_the_known() {
        let catalog = catalog(ModelFacts::sd15("hub/a")).unwrap();
        let error = catalog.find(Some("c")).unwrap_err();
        assert_eq!(error.to_string(), "`model` must be one of a, b, but is `c`");
        let long = catalog.find(Some(&"x".repeat(1000))).unwrap_err();
        assert_eq!(long.value.len(), 122, "a long name is cut");
    }

    #[test]
    fn the_default_must_be_one_of_the_checkpoints() {
        let models = BTreeMap::from([("a".to_owned(), ModelFacts::sd15("hub/a"))]);
        assert_eq!(Catalog::new(models, "z").unwrap_err().field, "model");
    }

    #[test]
    fn facts_that_no_picture_could_have_are_refused() {
        let good = ModelFacts::sd15("hub/a");
        let bad = [
            (ModelFacts { vae_factor: 0, ..good.clone() }, "models.a.vae_factor", "0"),
            (ModelFacts { width: 500, ..good.clone() }, "models.a.width", "500"),
            (ModelFacts { height: 0, ..good.clone() }, "models.a.height", "0"),
            (ModelFacts { steps: 0, ..good.clone() }, "models.a.steps", "0"),
            (ModelFacts { guidance_scale: f64::NAN, ..good.clone() }, "models.a.guidance_scale", "NaN"),
        ];
        for (facts, field, value) in bad {
            let error = catalog(facts).unwrap_err();
            assert_eq!((error.field.as_str(), error.value.as_str()), (field, value));
        }
    }

    #[test]
    fn facts_come_from_the_configuration_then_from_the_files_then_from_sd15() {
        let folder = tempfile::tempdir().unwrap();
        for (part, json) in [("unet", r#"{"sample_size": 16}"#), ("vae", r#"{"block_out_channels": [8, 16, 16, 16]}"#)]
        {
            std::fs::create_dir(folder.path().join(part)).unwrap();
            std::fs::write(folder.path().join(part).join("config.json"), json).unwrap();
        }
        let config = ModelConfig { source: "here".into(), height: Some(64), steps: Some(4), ..Default::default() };
        let facts = ModelFacts::read(&config, Some(folder.path()));
        assert_eq!((facts.width, facts.height, facts.vae_factor), (128, 64, 8));
        assert_eq!((facts.steps, facts.guidance_scale), (4, 7.5));
        let without_files = ModelFacts::read(&config, None);
        assert_eq!((without_files.width, without_files.height), (512, 64));
    }

    #[test]
    fn files_that_make_no_sense_are_passed_over() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join("vae")).unwrap();
        std::fs::write(folder.path().join("vae/config.json"), r#"{"block_out_channels": []}"#).unwrap();
        let facts = ModelFacts::read(&ModelConfig::default(), Some(folder.path()));
        assert_eq!((facts.width, facts.vae_factor), (512, 8));
    }
}
