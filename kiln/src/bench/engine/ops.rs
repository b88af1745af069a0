//! Each operation by itself.

use ::engine::bench::{self, Case};
use ::engine::{Device, Precision};
use anyhow::Result;
use serde::Serialize;

use super::super::table::Table;
use super::args::EngineArgs;
use super::roofline::{Reached, Roof};
use super::timing::{CacheFlush, Timed, sample, seconds};

/// What was measured.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Ops {
    /// Each operation.
    pub lines: Vec<Line>,
}

/// One operation.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Line {
    /// What it is.
    pub name: String,
    /// Its shape.
    pub shape: String,
    /// Floating-point operations.
    pub flops: f64,
    /// Bytes read and written once.
    pub bytes: f64,
    /// How long it took.
    pub timed: Timed,
    /// Of the machine's ceiling, by the median.
    pub reached: Reached,
}

/// Times every operation at the shapes of Stable Diffusion 1.5 with 512×512 pixels.
pub fn measure(device: &Device, precision: Precision, args: &EngineArgs, roof: Roof) -> Result<Ops> {
    eprintln!("kiln: operations");
    let mut flush = CacheFlush::new();
    let mut lines = Vec::new();
    for case in bench::cases(args.batch as usize) {
        let mut run = case.prepare(device, precision)?;
        let timed = sample(args.runs, || {
            flush.flush();
            seconds(|| Ok(run()?))
        })?;
        let bytes = case.bytes(precision);
        let Case { name, shape, flops, .. } = case;
        let reached = roof.reached(flops, bytes, timed.seconds.median);
        lines.push(Line { name: name.to_owned(), shape, flops, bytes, timed, reached });
    }
    Ok(Ops { lines })
}

impl Ops {
    /// For people.
    pub fn table(&self) -> Table {
        let mut table = Table::new(
            "Operations at the shapes of Stable Diffusion 1.5, 512×512",
            ["operation", "shape", "GFLOP", "MB", "ms", "GFLOP/s", "GB/s", "bound", "of the ceiling"],
        );
        for Line { name, shape, flops, bytes, timed, reached } in &self.lines {
            let median = timed.seconds.median;
            table.row([
                name.clone(),
                shape.clone(),
                format!("{:.2}", flops / 1e9),
                format!("{:.1}", bytes / 1e6),
                format!("{:.2}", 1e3 * median),
                format!("{:.0}", flops / median / 1e9),
                format!("{:.1}", bytes / median / 1e9),
                reached.bound.as_str().to_owned(),
                format!("{:.0} %", 100.0 * reached.share),
            ]);
        }
        table.note("Medians; before each run the caches are filled with something else. MB: inputs and weights");
        table.note("read and the output written once. GFLOP as defined: a convolution by minimal filtering does");
        table.note("with less, and can be above the ceiling.");
        table
    }
}
