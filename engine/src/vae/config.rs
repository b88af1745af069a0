//! What a `vae/config.json` says.

use serde_json::json;

use crate::Result;
use crate::config::ConfigFile;

/// An `AutoencoderKL` of any family: 4 or 16 channels, with and without a shift and the convolutions around
/// the latent.
pub(crate) struct VaeConfig {
    pub latent_channels: usize,
    /// What latents are multiplied by for the denoiser, after `shift_factor` has been taken off.
    pub scaling_factor: f64,
    pub shift_factor: f64,
    /// Channels of each level, outermost first.
    pub(super) channels: Vec<usize>,
    pub(super) layers: usize,
    pub(super) groups: usize,
    pub(super) quant_conv: bool,
    pub(super) post_quant_conv: bool,
    pub(super) mid_attention: bool,
    pub(super) force_upcast: bool,
}

impl VaeConfig {
    pub(super) fn read(config: &ConfigFile) -> Result<Self> {
        config.only("_class_name", &[json!("AutoencoderKL")])?;
        config.only("act_fn", &[json!("silu"), json!("swish")])?;
        config.only("in_channels", &[json!(3)])?;
        config.only("out_channels", &[json!(3)])?;
        for field in ["latents_mean", "latents_std"] {
            config.only(field, &[])?;
        }
        let channels = config.counts("block_out_channels")?;
        for (field, known) in [("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")] {
            let types = config.words(field)?;
            if types.len() != channels.len() || types.iter().any(|word| *word != known) {
                return Err(config.refuse(field, format!("a list of {}, each `{known}`", channels.len())));
            }
        }
        if channels.len() > 11 {
            return Err(config.refuse("block_out_channels", "a list of at most 11 levels"));
        }
        Ok(Self {
            latent_channels: config.count("latent_channels", Some(4))?,
            scaling_factor: config.positive("scaling_factor", 0.18215)?,
            shift_factor: config.number("shift_factor", 0.0)?,
            channels,
            layers: config.count("layers_per_block", Some(1))?,
            groups: config.count("norm_num_groups", Some(32))?,
            quant_conv: config.flag("use_quant_conv", true)?,
            post_quant_conv: config.flag("use_post_quant_conv", true)?,
            mid_attention: config.flag("mid_block_add_attention", true)?,
            force_upcast: config.flag("force_upcast", true)?,
        })
    }

    /// Pixels per latent value along a side.
    pub fn factor(&self) -> usize {
        1 << (self.channels.len() - 1)
    }

    /// What the VAE made → what the denoiser works on.
    pub fn to_denoiser(&self, latent: &mut [f32]) {
        let (scale, shift) = (self.scaling_factor as f32, self.shift_factor as f32);
        latent.iter_mut().for_each(|value| *value = (*value - shift) * scale);
    }

    /// What the denoiser works on → what the VAE decodes.
    pub fn to_decoder(&self, latent: &mut [f32]) {
        let (scale, shift) = (self.scaling_factor as f32, self.shift_factor as f32);
        latent.iter_mut().for_each(|value| *value = *value / scale + shift);
    }
}
