//! Kiln's command line: `render`, `up`, `scheduler`, `worker`, `submit`, `status`, `fetch` and their
//! small sisters.
//!
//! Reading order: [`cli`] (what can be typed), then a file per command; `embedded` runs a farm in this
//! process, `ports` opens what a configuration names, `client` speaks to a scheduler.
//!
//! Invariant: no decision about jobs is made here. What a job may be is `farm`'s, what happens to it
//! is the scheduler's and the worker's.

pub mod cli;

mod render;
mod up;

mod scheduler;
mod worker;

mod fetch;
mod inspect;
mod models;
mod status;
mod submit;

mod bench;

mod config;
mod key;
mod migrate;

mod catalog;
mod client;
mod embedded;
mod output;
mod ports;
mod progress;
mod requests;
mod shutdown;
mod stdout;

use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Parser;
use farm::config::{Environment, Loaded};
use farm::telemetry::{self, LogFormat};
use tokio_util::sync::CancellationToken;

use cli::{Cli, Command};

/// Runs the command line of this process.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(cli) {
        Ok(code) => code,
        Err(error) if stdout::has_lost_its_reader(&error) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("kiln: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli) -> Result<ExitCode> {
    let environment = Environment::of_this_process();
    let loaded = farm::config::load(cli.config.as_deref(), &environment)?;
    start_log(&cli.command, &environment)?;
    for warning in &loaded.warnings {
        tracing::warn!("{warning}");
    }
    // Fails only if it has been installed before, which is as good.
    let _installed_before = rustls::crypto::ring::default_provider().install_default();
    let runtime =
        tokio::runtime::Builder::new_multi_thread().enable_all().build().context("no threads can be started")?;
    let code = runtime.block_on(dispatch(cli.command, loaded));
    // A blocking read of standard input would otherwise keep the process.
    runtime.shutdown_background();
    code
}

/// Farm processes log what they do; the other commands only what is wrong.
fn start_log(command: &Command, environment: &Environment) -> Result<()> {
    let level = match command {
        // What a database says of each start is no news.
        Command::Up(_) | Command::Scheduler(_) | Command::Worker(_) => "info,sqlx::postgres::notice=warn",
        _ => "warn",
    };
    let format = match environment.get("KILN_LOG_FORMAT") {
        None | Some("text") => LogFormat::Text,
        Some("json") => LogFormat::Json,
        Some(other) => anyhow::bail!("the variable KILN_LOG_FORMAT must be text or json, but is `{other}`"),
    };
    telemetry::start(environment.get("KILN_LOG").unwrap_or(level), format);
    Ok(())
}

async fn dispatch(command: Command, loaded: Loaded) -> Result<ExitCode> {
    let stop = shutdown::listen()?;
    let config = loaded.config.clone();
    match command {
        Command::Render(args) => render::run(config, *args, stop).await,
        Command::Up(args) => up::run(config, args, stop).await,
        Command::Scheduler(args) => scheduler::run(config, args, stop).await,
        Command::Worker(args) => worker::run(config, args, stop).await,
        Command::Bench(args) => bench::run(config, args, stop).await,
        Command::Submit(args) => until(stop, submit::run(&config, args)).await,
        Command::Status(args) => until(stop, status::run(&config, args)).await,
        Command::Fetch(args) => until(stop, fetch::run(&config, args)).await,
        Command::Models(args) => until(stop, models::run(&config, args)).await,
        Command::Migrate(_) => until(stop, migrate::run(&config)).await,
        Command::Config(args) => config::run(&loaded, &args),
        Command::Key(args) => key::run(&args),
    }
}

/// For commands that may be cut off anywhere.
async fn until(stop: CancellationToken, command: impl Future<Output = Result<ExitCode>>) -> Result<ExitCode> {
    tokio::select! {
        outcome = command => outcome,
        () = stop.cancelled() => {
            eprintln!("kiln: interrupted");
            Ok(shutdown::interrupted())
        }
    }
}
