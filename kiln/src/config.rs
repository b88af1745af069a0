//! `kiln config`: what is in force, and what can be set.

use std::process::ExitCode;

use anyhow::Result;
use farm::config::{Loaded, keys};

use crate::cli::ConfigArgs;
use crate::stdout;

/// Prints the configuration, or its keys.
pub fn run(loaded: &Loaded, args: &ConfigArgs) -> Result<ExitCode> {
    if args.variables {
        for key in keys() {
            stdout::line(format_args!("{:<45} {:<36} {}", key.variable(), key.name(), key.kind.describe()))?;
        }
        return Ok(ExitCode::SUCCESS);
    }
    match &loaded.file {
        Some(path) => stdout::line(format_args!("# from {} and the environment", path.display()))?,
        None => stdout::line(format_args!("# from the environment and the defaults; no configuration file was found"))?,
    }
    stdout::text(toml::to_string(&loaded.config.redacted())?)?;
    Ok(ExitCode::SUCCESS)
}
