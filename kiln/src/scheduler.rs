//! `kiln scheduler`: a farm's scheduler in a process of its own.

use std::net::SocketAddr;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context, Result};
use farm::config::Config;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::cli::SchedulerArgs;
use crate::ports::{Ports, require_servers};
use crate::{catalog, embedded};

/// Runs until `stop`.
pub async fn run(mut config: Config, args: SchedulerArgs, stop: CancellationToken) -> Result<ExitCode> {
    config.api.listen = args.listen.unwrap_or(config.api.listen);
    require_servers(&config, "scheduler")?;
    let listener = bind(config.api.listen).await?;
    let catalog = Arc::new(catalog::build(&config).await?);
    let ports = tokio::select! {
        ports = Ports::open(&config) => ports?,
        () = stop.cancelled() => return Ok(ExitCode::SUCCESS),
    };
    scheduler::run(embedded::scheduler(&config, &ports, &catalog), listener, stop.cancelled()).await?;
    Ok(ExitCode::SUCCESS)
}

/// The API's socket.
pub async fn bind(address: SocketAddr) -> Result<TcpListener> {
    TcpListener::bind(address).await.with_context(|| {
        format!(
            "the API cannot listen at {address}; name another place with --listen, for instance --listen 127.0.0.1:8601"
        )
    })
}
