//! A loaded checkpoint.

use std::path::Path;

use image::RgbImage;

use crate::{Device, Error, Latent, Precision, Result};

/// A base model's weights on a device, ready to render. Shared through an `Arc` by the batches that
/// use it.
pub struct Checkpoint {
    device: Device,
    precision: Precision,
}

impl Checkpoint {
    /// Loads a diffusers folder.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] naming the file and the tensors or fields at fault.
    pub fn load(folder: &Path, device: &Device, precision: Precision) -> Result<Self> {
        let _ = (device, precision);
        Err(Error::checkpoint(folder, "loading is not available yet"))
    }

    /// Width and height in pixels that the checkpoint was trained at.
    pub fn native_size(&self) -> (usize, usize) {
        let _ = (&self.device, self.precision);
        (512, 512)
    }

    /// Pixels per latent value along a side.
    pub fn vae_factor(&self) -> usize {
        8
    }

    /// Turns final latents into pictures.
    ///
    /// # Errors
    /// [`Error::NotFinite`] naming the row whose picture holds a value that is not finite.
    pub fn decode(&self, latents: &[Latent]) -> Result<Vec<RgbImage>> {
        Err(Error::NotFinite { row: latents.first().map_or(0, |latent| latent.row) })
    }
}
