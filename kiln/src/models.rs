//! `kiln models`: the checkpoints that jobs can name.

use std::process::ExitCode;

use anyhow::Result;
use farm::catalog::ModelFacts;
use farm::config::Config;
use scheduler::{ModelView, Models};

use crate::cli::ModelsArgs;
use crate::client::{Client, Patience};
use crate::{catalog, stdout};

/// Lists the configuration's checkpoints, or a scheduler's if one is named.
pub async fn run(config: &Config, args: ModelsArgs) -> Result<ExitCode> {
    let models = if args.api.api.is_some() {
        let client = Client::new(&args.api, config)?;
        client.patiently(Patience::SHORT, async || client.models().await).await?
    } else {
        let catalog = catalog::build(config).await?;
        let model = |(name, facts): (&str, &ModelFacts)| ModelView { name: name.to_owned(), facts: facts.clone() };
        Models { default: catalog.default_model().to_owned(), models: catalog.models().map(model).collect() }
    };
    if args.json {
        stdout::line(serde_json::to_string(&models)?)?;
    } else {
        stdout::text(table(&models))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn table(models: &Models) -> String {
    let width = models.models.iter().map(|model| model.name.len() + 10).max().unwrap_or(0).max(14);
    let mut text = format!("{:<width$}  {:>9}  {:>5}  {:>8}  source\n", "name", "size", "steps", "guidance");
    for ModelView { name, facts } in &models.models {
        let name = if *name == models.default { format!("{name} (default)") } else { name.clone() };
        let size = format!("{}x{}", facts.width, facts.height);
        let ModelFacts { steps, guidance_scale, source, .. } = facts;
        text.push_str(&format!("{name:<width$}  {size:>9}  {steps:>5}  {guidance_scale:>8}  {source}\n"));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_marks_the_default() {
        let model = |name: &str| ModelView { name: name.into(), facts: ModelFacts::sd15("org/sd") };
        let text = table(&Models { default: "demo".into(), models: vec![model("demo"), model("sd15")] });
        assert!(text.contains("demo (default)") && text.contains("512x512") && text.contains("org/sd"), "{text}");
        assert_eq!(text.lines().count(), 3);
    }
}
