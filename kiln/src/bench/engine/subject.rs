//! What is timed of a checkpoint: a denoising step, a decoding, or whole pictures.

use std::path::Path;
use std::sync::Arc;

use ::engine::{Checkpoint, Latent, RowId, RowRequest, RunningBatch, bench};
use anyhow::{Context, Result};

use super::args::Part;
use super::timing::seconds;

/// More steps than are ever timed at a stretch; a batch that comes to its end begins anew.
const STEPS: usize = 50;
/// As for most of this family's pictures.
const GUIDANCE_SCALE: f64 = 7.5;

/// Pictures of one size.
#[derive(Clone, Copy, Debug)]
pub struct Pictures {
    /// Width and height in pixels.
    pub size: (usize, usize),
    /// Pictures at once.
    pub batch: usize,
    /// Denoising steps.
    pub steps: usize,
}

impl Pictures {
    /// As the command line asks, of a size that the checkpoint was made for unless it says otherwise.
    pub fn new(checkpoint: &Checkpoint, size: Option<u32>, batch: u32, steps: u32) -> Self {
        let size = size.map_or_else(|| checkpoint.native_size(), |side| (side as usize, side as usize));
        Self { size, batch: batch as usize, steps: steps as usize }
    }

    /// Height and width of a latent.
    pub fn latent_side(self, checkpoint: &Checkpoint) -> (u64, u64) {
        let factor = checkpoint.vae_factor();
        ((self.size.1 / factor) as u64, (self.size.0 / factor) as u64)
    }
}

/// A part of a checkpoint, ready to run.
pub struct Subject {
    checkpoint: Arc<Checkpoint>,
    part: Part,
    pictures: Pictures,
    running: RunningBatch,
    latents: Vec<Latent>,
}

impl Subject {
    /// Prepares what all runs share.
    pub fn new(checkpoint: &Arc<Checkpoint>, part: Part, pictures: Pictures) -> Result<Self> {
        let (width, height) = pictures.size;
        let mut subject = Self {
            checkpoint: Arc::clone(checkpoint),
            part,
            pictures,
            running: RunningBatch::new(Arc::clone(checkpoint), width, height),
            latents: bench::noise_latents(checkpoint, width, height, pictures.batch),
        };
        // Refuses a size that the checkpoint cannot serve before anything is timed.
        subject.join(STEPS)?;
        Ok(subject)
    }

    fn join(&mut self, steps: usize) -> Result<()> {
        let (width, height) = self.pictures.size;
        self.running = RunningBatch::new(Arc::clone(&self.checkpoint), width, height);
        for row in 0..self.pictures.batch {
            let request = RowRequest {
                prompt: "a large red star on a blue background".to_owned(),
                width,
                height,
                steps,
                guidance_scale: GUIDANCE_SCALE,
                seed: row as u64,
                ..RowRequest::default()
            };
            self.running.join(row as RowId, &request)?;
        }
        Ok(())
    }

    /// One run and how many seconds it took. Whole pictures write the first of them to `out`.
    pub fn run(&mut self, out: Option<&Path>) -> Result<f64> {
        match self.part {
            Part::Unet => {
                if self.running.is_empty() {
                    self.join(STEPS)?;
                }
                let rows = self.running.rows();
                seconds(|| Ok(self.running.step(&rows)?))
            }
            Part::Vae => seconds(|| Ok(self.checkpoint.decode(&self.latents)?)),
            Part::Picture => {
                let mut pictures = Vec::new();
                let seconds = seconds(|| {
                    self.join(self.pictures.steps)?;
                    let mut latents = Vec::new();
                    while !self.running.is_empty() {
                        let steps = self.running.step(&self.running.rows())?;
                        latents.extend(steps.into_iter().filter_map(|step| step.latent));
                    }
                    pictures = self.checkpoint.decode(&latents)?;
                    Ok(())
                })?;
                if let (Some(out), Some(picture)) = (out, pictures.first()) {
                    let cannot = || format!("--out must be a PNG file that can be written, but is `{}`", out.display());
                    picture.save(out).with_context(cannot)?;
                }
                Ok(seconds)
            }
        }
    }
}
