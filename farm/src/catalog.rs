//! Which checkpoints the farm knows, and the facts about each that defaults and checks need. What is
//! true of a family of models stands in the engine's table; whoever builds a [`Catalog`] brings it here.

use std::collections::BTreeMap;

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
    /// Where the weights come from: a folder in diffusers layout, a single file, or a hub id
    /// (`org/name[@revision]`).
    pub source: String,
    /// Where the parts come from that a single file lacks: a folder in diffusers layout or a hub id.
    #[serde(default)]
    pub parts: Option<String>,
    /// The family of models that it belongs to (`sdxl`); `None`: nobody could tell yet.
    #[serde(default)]
    pub family: Option<String>,
    /// Native width in pixels.
    pub width: u32,
    /// Native height in pixels.
    pub height: u32,
    /// Pixels a latent cell covers.
    pub vae_factor: u32,
    /// Latent cells along a side that the denoiser takes as one.
    #[serde(default = "ModelFacts::one")]
    pub patch: u32,
    /// Default number of steps.
    pub steps: u32,
    /// Default guidance scale.
    pub guidance_scale: f64,
    /// Default sampler; `None`: what the checkpoint's scheduler configuration says.
    pub sampler: Option<Sampler>,
    /// Default schedule; `None`: what the checkpoint's scheduler configuration says.
    pub schedule: Option<Schedule>,
    /// Whether PNDM is the sampler that the checkpoint's scheduler configuration names.
    #[serde(default)]
    pub samples_by_pndm: bool,
    /// The fewest steps that PNDM takes with it.
    #[serde(default = "ModelFacts::one")]
    pub least_pndm_steps: u32,
    /// What its denoiser predicts: `epsilon`, `v_prediction`, `sample` or `flow`.
    #[serde(default)]
    pub prediction: Option<String>,
    /// Channels of a latent.
    #[serde(default)]
    pub latent_channels: Option<u32>,
    /// What latents are multiplied by for the denoiser.
    #[serde(default)]
    pub scaling_factor: Option<f64>,
    /// What is taken off latents before.
    #[serde(default)]
    pub shift_factor: Option<f64>,
    /// The licence that its family came with; a finetune's may differ.
    #[serde(default)]
    pub licence: Option<String>,
}

/// A checkpoint as the configuration names it (`[models.NAME]`). What is left open is read from the
/// checkpoint's own files where they are at hand, else taken from its family.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ModelConfig {
    /// A folder in diffusers layout, a single file, or a hub id (`org/name[@revision]`).
    pub source: String,
    /// A folder in diffusers layout or a hub id with the parts that a single file lacks.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub parts: Option<String>,
    /// The family of models that it belongs to, where its files are not at hand or do not tell.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub family: Option<String>,
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
    /// What is assumed of a checkpoint as long as nothing is known but where it comes from.
    pub fn assumed(source: impl Into<String>) -> Self {
        Self {
            source: source.into(),
            parts: None,
            family: None,
            width: 512,
            height: 512,
            vae_factor: 8,
            patch: 1,
            steps: 25,
            guidance_scale: 7.5,
            sampler: None,
            schedule: None,
            samples_by_pndm: false,
            least_pndm_steps: 1,
            prediction: None,
            latent_channels: None,
            scaling_factor: None,
            shift_factor: None,
            licence: None,
        }
    }

    fn one() -> u32 {
        1
    }

    /// Pixels that both sides of a picture are multiples of.
    pub fn side_multiple(&self) -> u32 {
        self.vae_factor.saturating_mul(self.patch)
    }

    /// These facts, but what `config` says.
    pub fn overruled(self, config: &ModelConfig) -> Self {
        Self {
            source: config.source.clone(),
            parts: config.parts.clone(),
            family: config.family.clone().or(self.family),
            width: config.width.unwrap_or(self.width),
            height: config.height.unwrap_or(self.height),
            vae_factor: config.vae_factor.unwrap_or(self.vae_factor),
            steps: config.steps.unwrap_or(self.steps),
            guidance_scale: config.guidance_scale.unwrap_or(self.guidance_scale),
            sampler: config.sampler.or(self.sampler),
            schedule: config.schedule.or(self.schedule),
            ..self
        }
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
        let factor = self.side_multiple();
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
        Catalog::new(BTreeMap::from([("b".to_owned(), ModelFacts::assumed("hub/b")), ("a".to_owned(), facts)]), "a")
    }

    #[test]
    fn without_a_name_the_default_is_found() {
        let catalog = catalog(ModelFacts::assumed("hub/a")).unwrap();
        assert_eq!(catalog.default_model(), "a");
        assert_eq!(catalog.find(None).unwrap().0, "a");
        assert_eq!(catalog.find(Some("b")).unwrap().1.source, "hub/b");
        assert_eq!(catalog.models().map(|(name, _)| name).collect::<Vec<_>>(), ["a", "b"]);
    }

    #[test]
    fn an_unknown_name_is_answered_with_the_known() {
        let catalog = catalog(ModelFacts::assumed("hub/a")).unwrap();
        let error = catalog.find(Some("c")).unwrap_err();
        assert_eq!(error.to_string(), "`model` must be one of a, b, but is `c`");
        let long = catalog.find(Some(&"x".repeat(1000))).unwrap_err();
        assert_eq!(long.value.len(), 122, "a long name is cut");
    }

    #[test]
    fn the_default_must_be_one_of_the_checkpoints() {
        let models = BTreeMap::from([("a".to_owned(), ModelFacts::assumed("hub/a"))]);
        assert_eq!(Catalog::new(models, "z").unwrap_err().field, "model");
    }

    #[test]
    fn facts_that_no_picture_could_have_are_refused() {
        let good = ModelFacts::assumed("hub/a");
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
    fn what_the_configuration_says_wins_over_what_was_found() {
        let found = ModelFacts {
            family: Some("sdxl".into()),
            width: 1024,
            height: 1024,
            licence: Some("a licence".into()),
            ..ModelFacts::assumed("")
        };
        let config = ModelConfig { source: "here".into(), height: Some(64), steps: Some(4), ..Default::default() };
        let facts = found.overruled(&config);
        assert_eq!((facts.source.as_str(), facts.width, facts.height, facts.steps), ("here", 1024, 64, 4));
        assert_eq!((facts.guidance_scale, facts.licence.as_deref()), (7.5, Some("a licence")));
        let told = ModelConfig { family: Some("sdxl_turbo".into()), ..Default::default() };
        assert_eq!(facts.overruled(&told).family.as_deref(), Some("sdxl_turbo"));
    }

    #[test]
    fn facts_of_an_older_scheduler_are_read() {
        let mut value = serde_json::to_value(ModelFacts::assumed("hub/a")).unwrap();
        for newer in ["parts", "family", "prediction", "latent_channels", "scaling_factor", "shift_factor", "licence"] {
            value.as_object_mut().unwrap().remove(newer).unwrap();
        }
        assert_eq!(serde_json::from_value::<ModelFacts>(value).unwrap(), ModelFacts::assumed("hub/a"));
    }
}
