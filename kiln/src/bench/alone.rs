//! The bare engine: a running batch on one thread, without queue, store or PNG. What a farm is measured against.

use std::path::Path;
use std::sync::Arc;

use anyhow::Result;
use engine::{Checkpoint, Latent, Precision, RowId, RunningBatch};
use farm::config::WorkerConfig;

use super::jobs;

/// The engine on one device with the demo checkpoint loaded.
pub struct Alone {
    checkpoint: Arc<Checkpoint>,
    max_batch: usize,
    device: String,
    precision: Precision,
}

impl Alone {
    /// Loads the checkpoint in `folder` on the device and in the number format that a worker would choose.
    pub fn load(folder: &Path, config: &WorkerConfig) -> Result<Self> {
        let (device, precision) = worker::open_device(config)?;
        let checkpoint = Checkpoint::load(folder, &device, precision)?;
        Ok(Self {
            checkpoint: Arc::new(checkpoint),
            max_batch: config.max_batch as usize,
            device: device.describe(),
            precision,
        })
    }

    /// The device, for people.
    pub fn device(&self) -> &str {
        &self.device
    }

    /// The number format (`f32`).
    pub fn dtype(&self) -> &'static str {
        self.precision.as_str()
    }

    /// Renders jobs `first` to `first + count`, decoded, each joining as soon as there is room. How many pictures
    /// came out.
    pub fn render(&self, first: u64, count: u64) -> Result<u64> {
        let mut batch = RunningBatch::new(Arc::clone(&self.checkpoint), jobs::SIDE, jobs::SIDE);
        let mut waiting = first..first + count;
        let mut pictures = 0;
        loop {
            while batch.len() < self.max_batch
                && let Some(index) = waiting.next()
            {
                batch.join(index as RowId, &jobs::row(index))?;
            }
            if batch.is_empty() {
                return Ok(pictures);
            }
            let steps = batch.step(&batch.rows())?;
            let finished: Vec<Latent> = steps.into_iter().filter_map(|step| step.latent).collect();
            if !finished.is_empty() {
                pictures += self.checkpoint.decode(&finished)?.len() as u64;
            }
        }
    }
}
