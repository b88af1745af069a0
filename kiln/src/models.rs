//! `kiln models`: the checkpoints that jobs can name.

use std::process::ExitCode;

use anyhow::Result;
use farm::catalog::ModelFacts;
use farm::config::Config;
use scheduler::{ModelView, Models};

use crate::cli::{ModelsArgs, ModelsCommand};
use crate::client::{Client, Patience};
use crate::{catalog, inspect, stdout};

/// Lists the configuration's checkpoints, or a scheduler's if one is named.
pub async fn run(config: &Config, args: ModelsArgs) -> Result<ExitCode> {
    if let Some(ModelsCommand::Inspect(args)) = args.command {
        return inspect::run(config, args).await;
    }
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

/// What stands where nothing is known.
const UNKNOWN: &str = "-";

const COLUMNS: usize = 10;

fn table(models: &Models) -> String {
    let head: [&str; COLUMNS] =
        ["name", "family", "size", "steps", "guidance", "predicts", "channels", "scale", "licence", "source"];
    let mut rows = vec![head.map(str::to_owned)];
    rows.extend(models.models.iter().map(|model| row(model, model.name == models.default)));
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..head.len()).map(width).collect();
    let line = |row: &[String; COLUMNS]| {
        let cells = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}"));
        format!("{}\n", cells.collect::<Vec<_>>().join("  ").trim_end())
    };
    rows.iter().map(line).collect()
}

fn row(ModelView { name, facts }: &ModelView, is_default: bool) -> [String; COLUMNS] {
    let known = |word: &Option<String>| word.clone().unwrap_or_else(|| UNKNOWN.to_owned());
    let scale = match (facts.scaling_factor, facts.shift_factor) {
        (Some(scale), None | Some(0.0)) => scale.to_string(),
        (Some(scale), Some(shift)) => format!("{scale} (shift {shift})"),
        (None, _) => UNKNOWN.to_owned(),
    };
    [
        if is_default { format!("{name} (default)") } else { name.clone() },
        known(&facts.family),
        format!("{}x{}", facts.width, facts.height),
        facts.steps.to_string(),
        facts.guidance_scale.to_string(),
        known(&facts.prediction),
        facts.latent_channels.map_or_else(|| UNKNOWN.to_owned(), |channels| channels.to_string()),
        scale,
        known(&facts.licence),
        facts.source.clone(),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_marks_the_default_and_shows_what_is_known() {
        let unknown = ModelView { name: "sd15".into(), facts: ModelFacts::assumed("org/sd") };
        let facts = ModelFacts {
            family: Some("flux_dev".into()),
            prediction: Some("flow".into()),
            latent_channels: Some(16),
            scaling_factor: Some(0.3611),
            shift_factor: Some(0.1159),
            licence: Some("a licence".into()),
            ..ModelFacts::assumed("org/flux")
        };
        let known = ModelView { name: "flux".into(), facts };
        let text = table(&Models { default: "flux".into(), models: vec![known, unknown] });
        let lines: Vec<&str> = text.lines().collect();
        let expected =
            ["flux (default)", "flux_dev", "flow", "  16  ", "0.3611 (shift 0.1159)", "a licence", "org/flux"];
        assert!(expected.iter().all(|word| lines[1].contains(word)), "{text}");
        assert!(lines[2].starts_with("sd15  ") && lines[2].contains("512x512"), "{text}");
        assert_eq!(lines.len(), 3);
    }
}
