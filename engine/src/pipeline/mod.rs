//! From a request to a picture: encode the prompts, draw the noise, step the running batch, decode.

mod batch;
mod calls;
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
    InitContent, InitImage, Latent, Mask, MaskedContent, MicroConditioning, RowId, RowRequest, RowStep,
    SkipLayerGuidance,
};

/// Denoises one row alone: a running batch of it. `on_step` is called with the steps done and the steps in total
/// after each denoiser call.
///
/// # Errors
/// As [`RunningBatch::join`] and [`RunningBatch::step`].
pub fn denoise(
    checkpoint: &Arc<Checkpoint>,
    request: &RowRequest,
    mut on_step: impl FnMut(usize, usize),
) -> Result<Latent> {
    const ONLY: RowId = 0;
    let mut batch = RunningBatch::new(Arc::clone(checkpoint), request.width, request.height);
    batch.join(ONLY, request)?;
    loop {
        for row in batch.step(&[ONLY])? {
            on_step(row.step, row.total);
            if let Some(latent) = row.latent {
                return Ok(latent);
            }
        }
    }
}

/// Renders one picture alone: [`denoise`], then the decoder.
///
/// # Errors
/// As [`denoise`] and [`Checkpoint::decode`].
pub fn render(
    checkpoint: &Arc<Checkpoint>,
    request: &RowRequest,
    on_step: impl FnMut(usize, usize),
) -> Result<RgbImage> {
    let latent = denoise(checkpoint, request, on_step)?;
    let row = latent.row;
    checkpoint.decode(&[latent])?.pop().ok_or(Error::NotFinite { row })
}
