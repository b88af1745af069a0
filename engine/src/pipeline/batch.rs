//! The running batch.

use std::sync::Arc;

use crate::{Checkpoint, Error, Result, RowId, RowRequest, RowStep};

/// Rows of one latent shape that share denoising passes and nothing else.
pub struct RunningBatch {
    checkpoint: Arc<Checkpoint>,
    width: usize,
    height: usize,
}

impl RunningBatch {
    /// An empty batch for pictures of `width` × `height` pixels.
    pub fn new(checkpoint: Arc<Checkpoint>, width: usize, height: usize) -> Self {
        Self { checkpoint, width, height }
    }

    /// Adds a row.
    ///
    /// # Errors
    /// [`Error::Request`] naming the field at fault.
    pub fn join(&mut self, id: RowId, request: &RowRequest) -> Result<()> {
        let _ = (&self.checkpoint, self.height, request);
        Err(Error::request("width", self.width, id))
    }

    /// Takes a row out; false if it was not there.
    pub fn leave(&mut self, _id: RowId) -> bool {
        false
    }

    /// The rows, in the order in which they joined.
    pub fn rows(&self) -> Vec<RowId> {
        Vec::new()
    }

    /// How many rows there are.
    pub fn len(&self) -> usize {
        0
    }

    /// Whether there are no rows.
    pub fn is_empty(&self) -> bool {
        true
    }

    /// One denoiser call for `rows`.
    ///
    /// # Errors
    /// On any error no row has advanced.
    pub fn step(&mut self, rows: &[RowId]) -> Result<Vec<RowStep>> {
        Ok(rows.iter().map(|&id| RowStep { id, step: 0, total: 0, latent: None }).collect())
    }
}
