//! The catalog: the demo checkpoint, what the configuration names, and what a command line names.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use engine::{CheckpointFacts, FamilyKind};
use farm::catalog::{Catalog, DEMO, ModelConfig, ModelFacts};
use farm::config::{Config, WorkerConfig};
use tokio_util::sync::CancellationToken;
use worker::resolve::resolve;

/// What suits the demo checkpoint best (see its model card).
const DEMO_STEPS: u32 = 20;
const DEMO_GUIDANCE: f64 = 5.0;

/// The demo checkpoint was made with Kiln, not by the family that it is shaped like.
const DEMO_LICENCE: &str = "MIT OR Apache-2.0";

/// Every checkpoint that jobs can name: `demo`, unpacked in the data folder, and the configuration's.
pub async fn build(config: &Config) -> Result<Catalog> {
    let mut models = BTreeMap::from([(DEMO.to_owned(), demo_facts(config)?)]);
    for (name, model) in &config.models {
        // The facts of a checkpoint that has not been downloaded yet are the configuration's and its family's.
        let at_hand = WorkerConfig { offline: true, ..config.worker.clone() };
        let path = resolve(&model.source, &at_hand, &CancellationToken::new()).await.ok();
        let facts = facts(model, path.as_deref()).with_context(|| format!("the configuration's models.{name}"))?;
        models.insert(name.clone(), facts);
    }
    let default = config.default_model.as_deref().unwrap_or(DEMO);
    Catalog::new(models, default).context("the configuration's default_model is not right")
}

/// The data folder.
pub fn data_dir(config: &Config) -> Result<PathBuf> {
    config.data_dir.clone().context("there is no place for data: set KILN_DATA_DIR (or HOME)")
}

/// A checkpoint's facts: the configuration's, then its own files', then its family's.
fn facts(model: &ModelConfig, path: Option<&Path>) -> Result<ModelFacts> {
    let told = model.family.as_deref().map(str::parse::<FamilyKind>).transpose()?;
    let found = path.and_then(|path| match engine::facts(path, told) {
        Ok(facts) => Some(facts),
        Err(error) => {
            // Its jobs will fail with this; the farm's other checkpoints are as good as ever.
            tracing::warn!("what this checkpoint is cannot be told: {error}");
            None
        }
    });
    let found = found.or(told.map(FamilyKind::assumed));
    let facts = found.map_or_else(|| ModelFacts::assumed(&model.source), |found| in_the_farms_words(&found));
    Ok(facts.overruled(model))
}

fn in_the_farms_words(found: &CheckpointFacts) -> ModelFacts {
    // Sizes beyond what the farm can say are refused by its check.
    let number = |value: usize| u32::try_from(value).unwrap_or(u32::MAX);
    ModelFacts {
        family: Some(found.family.as_str().to_owned()),
        width: number(found.width),
        height: number(found.height),
        vae_factor: number(found.vae_factor),
        patch: number(found.patch),
        steps: found.steps,
        guidance_scale: found.guidance_scale,
        samples_by_pndm: found.samples_by_pndm,
        least_pndm_steps: found.least_pndm_steps,
        prediction: Some(found.prediction.as_str().to_owned()),
        latent_channels: Some(number(found.latent_channels)),
        scaling_factor: Some(found.scaling_factor),
        shift_factor: Some(found.shift_factor),
        licence: Some(found.licence.to_owned()),
        ..ModelFacts::assumed("")
    }
}

fn demo_facts(config: &Config) -> Result<ModelFacts> {
    let data_dir = data_dir(config)?;
    let folder = demo::unpack(&data_dir.join("checkpoints")).with_context(|| {
        format!(
            "the demo checkpoint cannot be unpacked to {}; set KILN_DATA_DIR to a folder that can be written",
            data_dir.display()
        )
    })?;
    let model = ModelConfig {
        source: folder.to_string_lossy().into_owned(),
        steps: Some(DEMO_STEPS),
        guidance_scale: Some(DEMO_GUIDANCE),
        ..ModelConfig::default()
    };
    Ok(ModelFacts { licence: Some(DEMO_LICENCE.to_owned()), ..facts(&model, Some(&folder))? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_checkpoint_that_is_not_at_hand_has_its_familys_facts() {
        let model = |family: &str| ModelConfig {
            source: "org/name".into(),
            family: Some(family.into()),
            steps: Some(7),
            ..ModelConfig::default()
        };
        let sdxl = facts(&model("sdxl"), None).unwrap();
        assert_eq!((sdxl.width, sdxl.steps, sdxl.guidance_scale), (1024, 7, 5.0));
        assert_eq!((sdxl.prediction.as_deref(), sdxl.scaling_factor), (Some("epsilon"), Some(0.13025)));
        let error = facts(&model("sdxxl"), None).unwrap_err().to_string();
        assert!(error.contains("`family`") && error.contains("sd35_medium") && error.contains("sdxxl"), "{error}");
        let unknown = facts(&ModelConfig { source: "org/name".into(), ..ModelConfig::default() }, None).unwrap();
        assert_eq!(unknown, ModelFacts::assumed("org/name"));
    }

    #[test]
    fn a_folder_that_is_no_checkpoint_does_not_stop_the_farm() {
        let folder = tempfile::tempdir().unwrap();
        let model = ModelConfig { source: "there".into(), ..ModelConfig::default() };
        assert_eq!(facts(&model, Some(folder.path())).unwrap(), ModelFacts::assumed("there"));
    }
}
