//! `kiln worker`: one device's worker in a process of its own.

use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context, Result};
use farm::config::Config;
use tokio_util::sync::CancellationToken;

use crate::cli::WorkerArgs;
use crate::ports::{Ports, require_servers};
use crate::{catalog, embedded};

/// Runs until `stop`, and then finishes or gives back what it holds.
pub async fn run(mut config: Config, args: WorkerArgs, stop: CancellationToken) -> Result<ExitCode> {
    config.worker.name = args.name.or(config.worker.name);
    config.worker.device = args.device.or(config.worker.device);
    config.worker.dtype = args.dtype.or(config.worker.dtype);
    config.check().context("the command line is not right")?;
    require_servers(&config, "worker")?;
    let catalog = Arc::new(catalog::build(&config).await?);
    let ports = tokio::select! {
        ports = Ports::open(&config) => ports?,
        () = stop.cancelled() => return Ok(ExitCode::SUCCESS),
    };
    let summary = worker::run(embedded::worker(&config, &ports, &catalog), stop.cancelled()).await?;
    eprintln!("kiln: {} ends: {} jobs done, {} given back", summary.worker_id, summary.done, summary.released);
    Ok(ExitCode::SUCCESS)
}
