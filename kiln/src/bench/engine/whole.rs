//! Whole pictures of a checkpoint of any family: text, steps, decoding. How many come out per second?

use std::path::Path;
use std::sync::Arc;

use ::engine::{Checkpoint, Device, Error, Precision};
use anyhow::Result;
use serde::Serialize;

use super::super::table::Table;
use super::args::{EngineArgs, Part};
use super::subject::{Pictures, Subject};
use super::timing::{Timed, sample};

/// Pictures at once.
const BATCHES: [u32; 3] = [1, 4, 16];

/// What was measured, a line for each batch that memory sufficed for.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Whole {
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
    /// All of them.
    pub timed: Timed,
    /// By the median.
    pub pictures_per_second: f64,
}

/// Times pictures of the checkpoint in `folder`.
pub fn measure(folder: &Path, device: &Device, precision: Precision, args: &EngineArgs) -> Result<Whole> {
    let checkpoint = Arc::new(Checkpoint::load(folder, device, precision)?);
    let mut whole = Whole { size: (0, 0), steps: args.steps as usize, lines: Vec::new() };
    for batch in BATCHES {
        eprintln!("kiln: whole pictures, {batch} at once");
        let pictures = Pictures::new(&checkpoint, args.size, batch, args.steps);
        whole.size = pictures.size;
        let timed = Subject::new(&checkpoint, Part::Picture, pictures)
            .and_then(|mut subject| sample(args.runs, || subject.run(None)));
        let timed = match timed {
            Err(error) if matches!(error.downcast_ref(), Some(Error::OutOfMemory(_))) => {
                eprintln!("kiln: {batch} at once do not fit: {error}");
                break;
            }
            timed => timed?,
        };
        let pictures_per_second = f64::from(batch) / timed.seconds.median;
        whole.lines.push(Line { batch: pictures.batch, timed, pictures_per_second });
    }
    Ok(whole)
}

impl Whole {
    /// For people.
    pub fn table(&self) -> Table {
        let Self { size: (width, height), steps, lines } = self;
        let mut table = Table::new(
            format!("Whole pictures: {width}×{height}, {steps} steps"),
            ["at once", "s, median (min–max)", "pictures/s"],
        );
        for Line { batch, timed, pictures_per_second } in lines {
            table.row([batch.to_string(), timed.seconds.shown(3), format!("{pictures_per_second:.3}")]);
        }
        table
            .note("Text, steps and decoding, from the second picture on: what loads on first use is not counted. With");
        table.note("guidance each step is two rows for a picture, where the family has it.");
        table
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_for_each_batch() {
        let timed = Timed::of(vec![2.0, 4.0, 3.0]).unwrap();
        let lines = vec![Line { batch: 16, timed, pictures_per_second: 16.0 / 3.0 }];
        let text = Whole { size: (1024, 512), steps: 28, lines }.table().to_string();
        for part in ["1024×512, 28 steps", "16", "3.000 (2.000–4.000)", "5.333"] {
            assert!(text.contains(part), "{part}: {text}");
        }
    }
}
