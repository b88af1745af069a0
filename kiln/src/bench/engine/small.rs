//! Small pictures, the demo checkpoint's: there what surrounds an operation counts, not the operation.

use std::path::Path;
use std::sync::Arc;

use ::engine::{Checkpoint, Device, Precision};
use anyhow::{Context, Result};
use serde::Serialize;

use super::super::stats::Spread;
use super::super::table::Table;
use super::args::{EngineArgs, Part};
use super::model::element_bytes;
use super::roofline::Roof;
use super::subject::{Pictures, Subject};
use super::timing::{Timed, sample};
use super::work;

/// Denoising steps of a picture.
const STEPS: usize = 20;
/// Rows of a farm's batch, and one alone.
const BATCHES: [usize; 2] = [1, 8];
/// A picture takes a fraction of a second.
const RUNS_FOR_EACH: u32 = 4;

/// What was measured, a line for each batch.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Small {
    /// Width and height in pixels.
    pub size: (usize, usize),
    /// Denoising steps.
    pub steps: usize,
    /// Each batch.
    pub lines: Vec<Line>,
}

/// One batch.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Line {
    /// Pictures at once.
    pub batch: usize,
    /// All of them, decoded.
    pub batch_seconds: Timed,
    /// Floating-point operations of all of them.
    pub flops: f64,
    /// Convolutions, linear layers and attentions that were called, for all of them together.
    pub operations: u64,
    /// How long they would take at the multiply-add ceiling.
    pub ceiling_seconds: f64,
}

impl Line {
    fn each(&self, seconds: f64) -> f64 {
        seconds / self.batch as f64
    }

    /// Seconds for each operation of each picture that the ceiling does not explain: for one picture an upper bound of
    /// what a call costs by itself.
    fn surplus(&self) -> f64 {
        self.each(self.batch_seconds.seconds.median - self.ceiling_seconds) / self.operations as f64
    }
}

/// Renders the demo checkpoint's pictures.
pub fn measure(device: &Device, precision: Precision, args: &EngineArgs, roof: Roof) -> Result<Small> {
    eprintln!("kiln: small pictures");
    let temporary = tempfile::tempdir().context("a temporary folder cannot be made")?;
    let folder = demo::unpack(temporary.path()).context("the demo checkpoint cannot be unpacked")?;
    let checkpoint = Arc::new(Checkpoint::load(&folder, device, precision)?);
    let lines = BATCHES.map(|batch| line(&checkpoint, &folder, batch, precision, args.runs, roof));
    let lines = lines.into_iter().collect::<Result<_>>()?;
    Ok(Small { size: checkpoint.native_size(), steps: STEPS, lines })
}

fn line(
    checkpoint: &Arc<Checkpoint>,
    folder: &Path,
    batch: usize,
    precision: Precision,
    runs: u32,
    roof: Roof,
) -> Result<Line> {
    let pictures = Pictures { size: checkpoint.native_size(), batch, steps: STEPS };
    let mut subject = Subject::new(checkpoint, Part::Picture, pictures)?;
    let batch_seconds = sample(RUNS_FOR_EACH * runs, || subject.run(None))?;
    let (side, element) = (pictures.latent_side(checkpoint), element_bytes(precision));
    let step = work::denoising_step(folder, batch as u64, side, element)?;
    let decoding = work::vae(&folder.join("vae/config.json"), batch as u64, side, element)?;
    let flops = STEPS as f64 * step.flops() + decoding.flops();
    Ok(Line {
        batch,
        batch_seconds,
        flops,
        operations: STEPS as u64 * step.operations + decoding.operations,
        ceiling_seconds: flops / roof.flops,
    })
}

impl Small {
    /// For people.
    pub fn table(&self) -> Table {
        let (width, height) = self.size;
        let mut table = Table::new(
            format!("Small pictures: the demo checkpoint, {width}×{height}, {} steps with guidance", self.steps),
            [
                "pictures at once",
                "ms each, median (min–max)",
                "GFLOP/s",
                "of the ceiling",
                "operations",
                "µs beside each",
            ],
        );
        for line in &self.lines {
            let Spread { median, min, max } = line.batch_seconds.seconds;
            let each = |seconds: f64| format!("{:.1}", 1e3 * line.each(seconds));
            table.row([
                line.batch.to_string(),
                format!("{} ({}–{})", each(median), each(min), each(max)),
                format!("{:.1}", line.flops / median / 1e9),
                format!("{:.0} %", 100.0 * line.ceiling_seconds / median),
                line.operations.to_string(),
                format!("{:.1}", 1e6 * line.surplus()),
            ]);
        }
        table.note("Operations are convolutions, linear layers and attentions; what the multiply-add ceiling does not");
        table.note("explain of the time, divided among them, bounds what a call costs by itself.");
        table
    }
}
