//! `kiln bench farm`: prepare a site, measure one thing after the other, leave nothing behind, report.

use std::process::ExitCode;

use anyhow::{Context, Result};
use chrono::Utc;
use farm::config::Config;
use tokio_util::sync::CancellationToken;

use super::machine::Machine;
use super::report::Report;
use super::show::show;
use super::site::Site;
use super::{FarmArgs, Measurement, bulk, delivered, loads, poll};
use crate::shutdown;

/// For each picture of a round so many for counting loads: long enough for the affinity bound to matter.
const LOAD_JOBS: u64 = 5;

/// Measures what `args` ask for.
pub async fn run(mut config: Config, args: FarmArgs, stop: CancellationToken) -> Result<ExitCode> {
    config.worker.max_batch = args.max_batch.unwrap_or(config.worker.max_batch);
    config.check().context("the command line is not right")?;
    if cfg!(debug_assertions) {
        eprintln!("kiln: this is a debug build: its figures say nothing about a release build");
    }
    // Before anything runs, so that the load is other people's.
    let machine = Machine::look();
    let site = Site::prepare(&config).await?;
    let mut report = Report::new(machine, site.footing(), Utc::now());
    let outcome = tokio::select! {
        outcome = measure(&site, &args, &mut report) => outcome.map(|()| ExitCode::SUCCESS),
        () = stop.cancelled() => Ok(shutdown::interrupted()),
    };
    // Also after a failure, which is the one to be told of.
    let cleared = site.clear().await;
    let code = outcome?;
    cleared?;
    if code == ExitCode::SUCCESS {
        show(&report, args.json.as_deref())?;
    }
    Ok(code)
}

async fn measure(site: &Site, args: &FarmArgs, report: &mut Report) -> Result<()> {
    let wanted = |what| args.only.is_empty() || args.only.contains(&what);
    if wanted(Measurement::Delivered) {
        report.delivered = Some(delivered::measure(site, args.jobs, args.rounds).await?);
    }
    if wanted(Measurement::Loads) {
        let jobs = args.load_jobs.unwrap_or_else(|| args.jobs.saturating_mul(LOAD_JOBS));
        report.loads = Some(loads::measure(site, jobs).await?);
    }
    if wanted(Measurement::Bulk) {
        report.bulk = Some(bulk::measure(site, args.bulk_jobs, args.rounds).await?);
    }
    if wanted(Measurement::Poll) {
        report.polls = Some(poll::measure(site, args.finished_jobs, args.polls).await?);
    }
    Ok(())
}
