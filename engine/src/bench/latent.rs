//! Latents without a batch that makes them: a decoder's speed does not depend on what it decodes.

use crate::noise::NoiseSource;
use crate::{Checkpoint, Latent, RowId};

/// `count` latents of unit noise for pictures of `width` × `height` pixels.
pub fn noise_latents(checkpoint: &Checkpoint, width: usize, height: usize, count: usize) -> Vec<Latent> {
    let factor = checkpoint.vae_factor();
    let (channels, height, width) = (checkpoint.latent_channels(), height / factor, width / factor);
    let latent = |row: RowId| Latent {
        values: NoiseSource::new(row).normal(channels * height * width),
        channels,
        height,
        width,
        row,
    };
    (0..count as RowId).map(latent).collect()
}
