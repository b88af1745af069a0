//! The whole model: a denoising step with guidance, and a decoding.

use std::path::Path;
use std::sync::Arc;

use ::engine::{Checkpoint, Device, Precision};
use anyhow::Result;
use serde::Serialize;

use super::super::table::Table;
use super::args::{EngineArgs, Part};
use super::roofline::{Reached, Roof};
use super::subject::{Pictures, Subject};
use super::timing::{Timed, sample};
use super::work::{self, Work};

/// What was measured.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Model {
    /// Width and height in pixels.
    pub size: (usize, usize),
    /// Pictures at once.
    pub batch: usize,
    /// Each part.
    pub parts: Vec<PartTime>,
}

/// One part of the model.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct PartTime {
    /// For people.
    pub name: &'static str,
    /// What it did.
    pub work: Work,
    /// Floating-point operations of that.
    pub flops: f64,
    /// How long it took.
    pub timed: Timed,
    /// Of the machine's ceiling, by the median.
    pub reached: Reached,
}

/// Times both parts of the checkpoint in `folder`.
pub fn measure(folder: &Path, device: &Device, precision: Precision, args: &EngineArgs, roof: Roof) -> Result<Model> {
    eprintln!("kiln: the model");
    let checkpoint = Arc::new(Checkpoint::load(folder, device, precision)?);
    let pictures = Pictures::new(&checkpoint, args.size, args.batch, 1);
    let (pictures_at_once, side) = (u64::from(args.batch), pictures.latent_side(&checkpoint));
    let element = element_bytes(precision);
    let parts = [
        ("denoising step", Part::Unet, work::denoising_step(folder, pictures_at_once, side, element)?),
        ("decoding", Part::Vae, work::vae(&folder.join("vae/config.json"), pictures_at_once, side, element)?),
    ];
    let parts = parts.map(|(name, part, work)| {
        let mut subject = Subject::new(&checkpoint, part, pictures)?;
        let timed = sample(args.runs, || subject.run(None))?;
        let (flops, reached) = (work.flops(), roof.reached(work.flops(), work.bytes, timed.seconds.median));
        Ok(PartTime { name, work, flops, timed, reached })
    });
    let parts = parts.into_iter().collect::<Result<_>>()?;
    Ok(Model { size: pictures.size, batch: pictures.batch, parts })
}

/// Bytes of a number in `precision`.
pub fn element_bytes(precision: Precision) -> u64 {
    match precision {
        Precision::F32 => 4,
        Precision::F16 | Precision::Bf16 => 2,
    }
}

impl Model {
    /// For people.
    pub fn table(&self) -> Table {
        let (width, height) = self.size;
        let pictures = if self.batch == 1 { "1 picture".to_owned() } else { format!("{} pictures", self.batch) };
        let mut table = Table::new(
            format!("Model: {width}×{height}, {pictures} at once"),
            ["what", "GFLOP", "GB", "s, median (min–max)", "GFLOP/s", "bound", "of the ceiling"],
        );
        for PartTime { name, work, flops, timed, reached } in &self.parts {
            table.row([
                (*name).to_owned(),
                format!("{:.0}", flops / 1e9),
                format!("{:.1}", work.bytes / 1e9),
                timed.seconds.shown(3),
                format!("{:.0}", flops / timed.seconds.median / 1e9),
                reached.bound.as_str().to_owned(),
                format!("{:.0} %", 100.0 * reached.share),
            ]);
        }
        table.note("Guided by a negative prompt, a step calls the denoiser with two rows a picture. GFLOP as its");
        table.note("operations are defined: minimal filtering and folded upsampling do with less. GB: every operation");
        table.note("reads its inputs and weights and writes its output once, in the number format computed in.");
        table
    }
}
