//! `kiln bench`: how fast this build is on this machine, measured so that the figures can be trusted: what is
//! compared runs in turns, every sample is kept, and the machine's load stands beside them.
//!
//! Reading order: [`farm`] (what is measured, in which order), then a file per measurement: `delivered`, `loads`,
//! `bulk`, `poll`; `alone` is the bare engine, `site` and `rig` the farm under test, `jobs` what is rendered; [`engine`]
//! is a bench of its own; `machine`, `stats`, `table`, `origin`, `report`
//! and `show` at last.
//!
//! Invariant: a bench is no test. Nothing here fails because it was slow.

mod engine;
mod farm;

mod bulk;
mod delivered;
mod journey;
mod loads;
mod poll;

mod alone;
mod jobs;
mod rig;
mod site;

mod machine;
mod origin;
mod report;
mod show;
mod stats;
mod table;

use std::path::PathBuf;
use std::process::ExitCode;

use ::farm::config::Config;
use anyhow::Result;
use clap::{Args, Subcommand, ValueEnum};
use tokio_util::sync::CancellationToken;

/// `kiln bench`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  kiln bench farm                          a table of how fast the farm is on this machine
  kiln bench farm --json farm.json         every sample as well
  kiln bench engine --model ./sd15         how close the engine comes to what this machine can do")]
pub struct BenchArgs {
    /// What to measure.
    #[command(subcommand)]
    pub what: BenchCommand,
}

/// What can be measured.
#[derive(Debug, Subcommand)]
pub enum BenchCommand {
    /// Measure the farm: pictures against the bare engine, loads, bulk submissions, status polls
    Farm(FarmArgs),
    /// Measure the engine: operations, a model, small pictures and loading against this machine's ceilings
    Engine(engine::EngineArgs),
}

/// `kiln bench farm`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  kiln bench farm --jobs 40 --only delivered      what the farm costs a picture, in minutes
  kiln bench farm --only bulk,poll                no picture is rendered
  eval \"$(infra/services.sh env)\"; kiln bench farm --json -

Without servers in the configuration it measures an embedded farm in a temporary folder (TMPDIR says
where). With servers it works in a database, queues and objects of its own, and removes them. Figures
are only worth something from a release build on an otherwise idle machine.")]
pub struct FarmArgs {
    /// Pictures of a round, rendered by the bare engine and then by the farm
    #[arg(long, value_name = "N", default_value_t = 200, value_parser = clap::value_parser!(u64).range(1..))]
    pub jobs: u64,
    /// Rounds of what is measured in turns
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    pub rounds: u32,
    /// Pictures of two checkpoints in turns, for counting loads [default: 5 times --jobs]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub load_jobs: Option<u64>,
    /// Jobs of a bulk submission
    #[arg(long, value_name = "N", default_value_t = 200_000, value_parser = clap::value_parser!(u64).range(1..))]
    pub bulk_jobs: u64,
    /// Finished jobs in the store whose status is polled
    #[arg(long, value_name = "N", default_value_t = 1_000_000, value_parser = clap::value_parser!(u64).range(1..))]
    pub finished_jobs: u64,
    /// Polls of each kind
    #[arg(long, value_name = "N", default_value_t = 500, value_parser = clap::value_parser!(u32).range(1..))]
    pub polls: u32,
    /// Rows of a batch at most [default: the configuration's worker.max_batch]
    #[arg(long, value_name = "N")]
    pub max_batch: Option<u32>,
    /// Measure only these
    #[arg(long, value_name = "WHAT,…", value_delimiter = ',', value_enum)]
    pub only: Vec<Measurement>,
    /// Write a JSON object with every sample to a file; - prints it, and the table on standard error
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
}

/// What `kiln bench farm` can measure.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Measurement {
    /// Pictures a second through the farm over those of the bare engine
    Delivered,
    /// Loads of weights for a thousand jobs
    Loads,
    /// Bulk submissions
    Bulk,
    /// Status polls
    Poll,
}

/// Measures until `stop`.
pub async fn run(config: Config, args: BenchArgs, stop: CancellationToken) -> Result<ExitCode> {
    match args.what {
        BenchCommand::Farm(args) => farm::run(config, args, stop).await,
        BenchCommand::Engine(args) => engine::run(config, args, stop).await,
    }
}
