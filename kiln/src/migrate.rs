//! `kiln migrate`: the store's tables at this build's version.

use std::process::ExitCode;

use anyhow::{Context, Result};
use farm::config::{Config, redact_url};

use crate::ports::store_url;
use crate::stdout;

/// Migrates the store that the configuration names.
pub async fn run(config: &Config) -> Result<ExitCode> {
    let url = store_url(config)?;
    let shown = redact_url(&url);
    farm::store::migrate(&url).await.with_context(|| format!("the store {shown} could not be migrated"))?;
    stdout::line(format_args!("the store {shown} is at this build's version"))?;
    Ok(ExitCode::SUCCESS)
}
