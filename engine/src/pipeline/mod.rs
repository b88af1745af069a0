//! From a request to a picture: encode the prompts, draw the noise, step the running batch, decode.

mod batch;
mod checkpoint;
mod row;

mod encoders;
mod family;
mod flux;
mod sd;
mod sd3;
mod sdxl;

mod mask;
mod picture;
mod resize;
mod start;

use std::sync::Arc;

use image::RgbImage;

use crate::{Error, Result};

pub use batch::RunningBatch;
pub use checkpoint::{Checkpoint, LoadOptions};
pub use encoders::{EncoderCounts, TextEncoders};
pub use mask::gray;
pub use resize::resized;
pub use row::{
    InitImage, Latent, Mask, MaskedContent, MicroConditioning, RowId, RowRequest, RowStep, SkipLayerGuidance,
};

/// Renders one picture alone: a running batch of one row, then the decoder. `on_step` is called with
/// the steps done and the steps in total after each denoiser call.
///
/// # Errors
/// As [`RunningBatch::join`], [`RunningBatch::step`] and [`Checkpoint::decode`].
pub fn render(
    checkpoint: &Arc<Checkpoint>,
    request: &RowRequest,
    mut on_step: impl FnMut(usize, usize),
) -> Result<RgbImage> {
    const ONLY: RowId = 0;
    let mut batch = RunningBatch::new(Arc::clone(checkpoint), request.width, request.height);
    batch.join(ONLY, request)?;
    loop {
        for row in batch.step(&[ONLY])? {
            on_step(row.step, row.total);
            if let Some(latent) = row.latent {
                let mut pictures = checkpoint.decode(&[latent])?;
                return pictures.pop().ok_or(Error::NotFinite { row: ONLY });
            }
        }
    }
}
