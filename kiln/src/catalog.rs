//! The catalog: the demo checkpoint, what the configuration names, and what a command line names.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::{Context, Result};
use farm::catalog::{Catalog, DEMO, ModelConfig, ModelFacts};
use farm::config::{Config, WorkerConfig};
use tokio_util::sync::CancellationToken;
use worker::resolve::resolve;

/// What suits the demo checkpoint best (see its model card).
const DEMO_STEPS: u32 = 20;
const DEMO_GUIDANCE: f64 = 5.0;

/// Every checkpoint that jobs can name: `demo`, unpacked in the data folder, and the configuration's.
pub async fn build(config: &Config) -> Result<Catalog> {
    let mut models = BTreeMap::from([(DEMO.to_owned(), demo_facts(config)?)]);
    for (name, model) in &config.models {
        // The facts of a checkpoint that has not been downloaded yet are the configuration's and the usual ones.
        let at_hand = WorkerConfig { offline: true, ..config.worker.clone() };
        let folder = resolve(&model.source, &at_hand, &CancellationToken::new()).await.ok();
        models.insert(name.clone(), ModelFacts::read(model, folder.as_deref()));
    }
    let default = config.default_model.as_deref().unwrap_or(DEMO);
    Catalog::new(models, default).context("the configuration's default_model is not right")
}

/// The data folder.
pub fn data_dir(config: &Config) -> Result<PathBuf> {
    config.data_dir.clone().context("there is no place for data: set KILN_DATA_DIR (or HOME)")
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
    Ok(ModelFacts::read(&model, Some(&folder)))
}
