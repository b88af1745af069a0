//! `kiln config`: what is in force, and what can be set.

use std::process::ExitCode;

use anyhow::Result;
use farm::config::{Loaded, keys};

use crate::cli::ConfigArgs;

/// Prints the configuration, or its keys.
pub fn run(loaded: &Loaded, args: &ConfigArgs) -> Result<ExitCode> {
    if args.variables {
        for key in keys() {
            println!("{:<45} {:<36} {}", key.variable(), key.name(), key.kind.describe());
        }
        return Ok(ExitCode::SUCCESS);
    }
    match &loaded.file {
        Some(path) => println!("# from {} and the environment", path.display()),
        None => println!("# from the environment and the defaults; no configuration file was found"),
    }
    print!("{}", toml::to_string(&loaded.config.redacted())?);
    Ok(ExitCode::SUCCESS)
}
