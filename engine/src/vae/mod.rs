//! `AutoencoderKL` of every family: pictures in, latents out, and back.
//!
//! Reading order: `encoder` and `decoder` (what is between their two ways is `middle`), `gaussian` (what an
//! encoder says), `config`; `memory` and `bands` are for pictures that are too large for the memory at hand.

mod config;
mod decoder;
mod encoder;
mod gaussian;
mod middle;

mod bands;
mod memory;

use crate::ops::{self, Conv2d, ConvShape, Place, Tensor};
use crate::weights::Part;
use crate::{Error, Result};

pub(crate) use config::VaeConfig;
use decoder::Decoder;
use encoder::Encoder;
pub(crate) use gaussian::Gaussian;
use memory::Memory;

/// Encodes pictures and decodes latents.
pub(crate) struct Vae {
    pub config: VaeConfig,
    place: Place,
    /// Some files have only what decodes.
    encoder: Option<(Encoder, Option<Conv2d>)>,
    post_quant_conv: Option<Conv2d>,
    decoder: Decoder,
}

impl Vae {
    /// Loads a `vae`.
    pub fn load(part: impl Into<Part>, place: &Place) -> Result<Self> {
        let part = part.into();
        let config = VaeConfig::read(&part.config()?)?;
        // f16 cannot hold the activations of decoders that say so; bf16 reaches as far as f32.
        let place = if config.force_upcast && place.is_f16() { &place.in_f32() } else { place };
        let weights = part.weights("diffusion_pytorch_model", place)?;
        let root = weights.root();
        let pointwise = |name: &str, channels: usize| root.at(name).conv2d(channels, channels, 1, ConvShape::same(1));
        let latent = config.latent_channels;
        let encoder = if weights.contains("encoder.conv_in.weight") {
            let quant_conv = config.quant_conv.then(|| pointwise("quant_conv", 2 * latent)).transpose()?;
            Some((Encoder::load(&root.at("encoder"), &config)?, quant_conv))
        } else {
            None
        };
        let vae = Self {
            place: place.clone(),
            encoder,
            post_quant_conv: config.post_quant_conv.then(|| pointwise("post_quant_conv", latent)).transpose()?,
            decoder: Decoder::load(&root.at("decoder"), &config)?,
            config,
        };
        let decodes_only = vae.encoder.is_none();
        weights.finish(|name| decodes_only && (name.starts_with("encoder.") || name.starts_with("quant_conv.")))?;
        Ok(vae)
    }

    /// Bytes that the activations of one picture of this size take as a whole.
    pub fn picture_bytes(&self, height: usize, width: usize) -> usize {
        self.memory(usize::MAX).of_picture(&self.config, height, width)
    }

    /// `latents`, (rows, channels, height, width) values in `dims` as [`VaeConfig::to_decoder`] gives them →
    /// pictures (rows, height × factor, width × factor, 3), about -1 to 1. Maps of which a row would take more
    /// than `budget` bytes are computed in bands.
    pub fn decode(&self, latents: &[f32], dims: [usize; 4], budget: usize) -> Result<Tensor> {
        let mut x = ops::feature_map(latents, dims, &self.place)?;
        if let Some(conv) = &self.post_quant_conv {
            x = conv.forward(&x)?;
        }
        self.decoder.forward(&x, self.memory(budget))
    }

    /// `picture`, (height, width, 3) values from -1 to 1 whose sides are multiples of the factor → what its latent
    /// is drawn from. As [`Vae::decode`] with the budget.
    pub fn encode(&self, picture: &[f32], (height, width): (usize, usize), budget: usize) -> Result<Gaussian> {
        let Some((encoder, quant_conv)) = &self.encoder else {
            return Err(Error::request("init_image", "left out: this checkpoint's VAE has no encoder", "given"));
        };
        let x = Tensor::new(picture, &[1, height, width, 3], &self.place)?;
        let x = encoder.forward(x, self.memory(budget))?;
        let x = match quant_conv {
            Some(conv) => conv.forward(&x)?,
            None => x,
        };
        Ok(Gaussian::new(&ops::channels_first(&x)?))
    }

    fn memory(&self, budget: usize) -> Memory {
        Memory { value: self.place.value_bytes(), budget }
    }
}
