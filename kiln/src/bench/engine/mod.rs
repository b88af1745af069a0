//! `kiln bench engine`: how close the engine comes to what this machine can do.
//!
//! Reading order: [`run`] (what is measured, in which order), `args` (what can be asked); `ceilings` is the machine's
//! own limit and `roofline` what share of it something reaches; then a file per measurement: `ops`, `model`, `small`,
//! `loading`; `work` counts what a model is asked to do; `on_demand` is the other way to use it, a timed run whenever
//! a script says so; `subject` is what both of them time; `report` at last.

mod args;

mod ceilings;
mod roofline;

mod loading;
mod model;
mod ops;
mod small;
mod whole;

mod on_demand;
mod subject;
mod timing;
mod work;

mod report;

use std::process::ExitCode;

use ::engine::{Device, Precision};
use ::farm::config::Config;
use anyhow::{Context, Result, bail};
use chrono::Utc;
use tokio_util::sync::CancellationToken;

pub use args::EngineArgs;
use args::Measurement;
use report::Report;

use super::machine::{self, Machine};
use super::show::show;
use crate::shutdown;

/// Measures what `args` ask for, or serves timed runs.
pub async fn run(mut config: Config, args: EngineArgs, stop: CancellationToken) -> Result<ExitCode> {
    config.worker.device = args.device.clone().or(config.worker.device);
    config.worker.dtype = args.dtype.clone().or(config.worker.dtype);
    config.check().context("the command line is not right")?;
    if cfg!(debug_assertions) {
        eprintln!("kiln: this is a debug build: its figures say nothing about a release build");
    }
    // The engine computes on threads of its own, and this one waits.
    let measuring = tokio::task::spawn_blocking(move || measure(&config, &args));
    tokio::select! {
        outcome = measuring => outcome.context("the measuring thread broke down")?.map(|()| ExitCode::SUCCESS),
        () = stop.cancelled() => Ok(shutdown::interrupted()),
    }
}

fn measure(config: &Config, args: &EngineArgs) -> Result<()> {
    // Before anything runs, so that the load is other people's.
    let machine = Machine::look();
    if let Some(word) = &args.instructions {
        ::engine::bench::limit_instructions(word)?;
    }
    let (device, precision) = worker::open_device(&config.worker)?;
    if args.on_demand {
        return on_demand::serve(args, &device, precision);
    }
    let mut report = Report::new(machine, device.describe(), precision.as_str(), Utc::now());
    fill(&mut report, args, &device, precision)?;
    report.load_average_after = machine::load_average();
    report.peak_resident_mib = machine::peak_resident_mib();
    show(&report, args.json.as_deref())
}

fn fill(report: &mut Report, args: &EngineArgs, device: &Device, precision: Precision) -> Result<()> {
    let wanted = |what| args.only.is_empty() || args.only.contains(&what);
    let of_a_model = [Measurement::Model, Measurement::Pictures, Measurement::Load];
    if args.model.is_none() && of_a_model.iter().any(|what| args.only.contains(what)) {
        bail!("--model must name a checkpoint's folder for `model`, `pictures` and `load`, but is missing");
    }
    eprintln!("kiln: ceilings");
    let ceilings = ceilings::measure(device, precision)?;
    let roof = ceilings.roof(precision);
    report.ceilings = Some(ceilings);
    if wanted(Measurement::Ops) {
        report.ops = Some(ops::measure(device, precision, args, roof)?);
    }
    if wanted(Measurement::Small) {
        report.small = Some(small::measure(device, precision, args, roof)?);
    }
    if let Some(folder) = &args.model {
        if wanted(Measurement::Load) {
            report.loading = Some(loading::measure(folder, device, precision, args)?);
        }
        if wanted(Measurement::Model) {
            report.model = Some(model::measure(folder, device, precision, args, roof)?);
        }
        // Takes too long to be done unasked.
        if args.only.contains(&Measurement::Pictures) {
            report.pictures = Some(whole::measure(folder, device, precision, args)?);
        }
    }
    Ok(())
}
