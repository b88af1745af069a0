//! The decoder of `AutoencoderKL`: latents in, pictures out.
//!
//! Reference: <https://github.com/huggingface/diffusers/blob/v0.36.0/src/diffusers/models/autoencoders/vae.py>
//! (`Decoder`).

use std::path::Path;

use serde_json::json;

use crate::config::ConfigFile;
use crate::denoiser::{ResnetBlock, ResnetShape};
use crate::ops::{self, Conv2d, ConvShape, GroupNorm, Linear, Mask, Place, Tensor, UpsampleConv};
use crate::weights::{Scope, Weights};
use crate::{Error, Result};

const EPSILON: f64 = 1e-6;

/// What a `vae/config.json` says.
pub(crate) struct VaeConfig {
    pub latent_channels: usize,
    /// What latents were multiplied by for the denoiser.
    pub scaling_factor: f64,
    /// Channels of each level, outermost first.
    channels: Vec<usize>,
    layers: usize,
    groups: usize,
    post_quant_conv: bool,
    mid_attention: bool,
    force_upcast: bool,
}

impl VaeConfig {
    fn read(config: &ConfigFile) -> Result<Self> {
        config.only("_class_name", &[json!("AutoencoderKL")])?;
        config.only("act_fn", &[json!("silu"), json!("swish")])?;
        config.only("out_channels", &[json!(3)])?;
        for field in ["latents_mean", "latents_std"] {
            config.only(field, &[])?;
        }
        config.only("shift_factor", &[json!(0), json!(0.0)])?;
        let channels = config.counts("block_out_channels")?;
        let types = config.words("up_block_types")?;
        if types.len() != channels.len() || types.iter().any(|word| *word != "UpDecoderBlock2D") {
            let limit = format!("a list of {}, each `UpDecoderBlock2D`", channels.len());
            return Err(config.refuse("up_block_types", limit));
        }
        Ok(Self {
            latent_channels: config.count("latent_channels", Some(4))?,
            scaling_factor: config.positive("scaling_factor", 0.18215)?,
            channels,
            layers: config.count("layers_per_block", Some(1))?,
            groups: config.count("norm_num_groups", Some(32))?,
            post_quant_conv: config.flag("use_post_quant_conv", true)?,
            mid_attention: config.flag("mid_block_add_attention", true)?,
            force_upcast: config.flag("force_upcast", true)?,
        })
    }

    /// Pixels per latent value along a side.
    pub fn factor(&self) -> usize {
        1 << (self.channels.len() - 1)
    }
}

/// Decodes latents.
pub(crate) struct Vae {
    pub config: VaeConfig,
    place: Place,
    post_quant_conv: Option<Conv2d>,
    conv_in: Conv2d,
    mid_block: MidBlock,
    /// Innermost first, as in the checkpoint.
    up_blocks: Vec<UpBlock>,
    conv_norm_out: GroupNorm,
    conv_out: Conv2d,
}

impl Vae {
    /// Loads the decoder of a `vae` folder; the encoder's tensors are left on disk.
    pub fn load(folder: &Path, place: &Place) -> Result<Self> {
        let file = ConfigFile::read(&folder.join("config.json"))?;
        let config = VaeConfig::read(&file)?;
        // f16 cannot hold the activations of decoders that say so.
        let place = if config.force_upcast { &place.in_f32() } else { place };
        let weights = Weights::open(folder, "diffusion_pytorch_model", place)?;
        let (root, decoder) = (weights.root(), weights.root().at("decoder"));
        let latent = config.latent_channels;
        let levels = config.channels.len();
        let (outer, inner) = (config.channels[0], config.channels[levels - 1]);
        let post_quant_conv = if config.post_quant_conv {
            Some(root.at("post_quant_conv").conv2d(latent, latent, 1, ConvShape::same(1))?)
        } else {
            None
        };
        let vae = Self {
            place: place.clone(),
            post_quant_conv,
            conv_in: decoder.at("conv_in").conv2d(latent, inner, 3, ConvShape::same(3))?,
            mid_block: MidBlock::load(&decoder.at("mid_block"), &config, inner)?,
            up_blocks: (0..levels)
                .map(|index| UpBlock::load(&decoder.at("up_blocks").at(index), &config, levels - 1 - index))
                .collect::<Result<_>>()?,
            conv_norm_out: decoder.at("conv_norm_out").group_norm(outer, config.groups, EPSILON)?,
            conv_out: decoder.at("conv_out").conv2d(outer, 3, 3, ConvShape::same(3))?,
            config,
        };
        weights.finish(|name| name.starts_with("encoder.") || name.starts_with("quant_conv."))?;
        if vae.config.factor() > 1 << 10 {
            return Err(Error::checkpoint(
                file.path(),
                format!("`block_out_channels` has {levels} levels, more than 11"),
            ));
        }
        Ok(vae)
    }

    /// `latents`, (rows, channels, height, width) values in `dims`, divided by the scaling factor →
    /// pictures (rows, height × factor, width × factor, 3), about -1 to 1.
    pub fn decode(&self, latents: &[f32], dims: [usize; 4]) -> Result<Tensor> {
        let mut x = ops::feature_map(latents, dims, &self.place)?;
        if let Some(conv) = &self.post_quant_conv {
            x = conv.forward(&x)?;
        }
        x = self.mid_block.forward(&self.conv_in.forward(&x)?)?;
        for block in &self.up_blocks {
            x = block.forward(x)?;
        }
        self.conv_out.forward(&self.conv_norm_out.forward_silu(&x)?)
    }
}

fn resnet(scope: &Scope<'_>, config: &VaeConfig, inputs: usize, outputs: usize) -> Result<ResnetBlock> {
    let shape = ResnetShape { inputs, outputs, time_width: None, groups: config.groups, epsilon: EPSILON };
    ResnetBlock::load(scope, shape)
}

struct MidBlock {
    first: ResnetBlock,
    attention: Option<PixelAttention>,
    second: ResnetBlock,
}

impl MidBlock {
    fn load(scope: &Scope<'_>, config: &VaeConfig, channels: usize) -> Result<Self> {
        let resnets = scope.at("resnets");
        let attention = if config.mid_attention {
            Some(PixelAttention::load(&scope.at("attentions.0"), channels, config.groups)?)
        } else {
            None
        };
        Ok(Self {
            first: resnet(&resnets.at(0), config, channels, channels)?,
            attention,
            second: resnet(&resnets.at(1), config, channels, channels)?,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let x = self.first.forward(x, None)?;
        let x = match &self.attention {
            Some(attention) => attention.forward(&x)?,
            None => x,
        };
        self.second.forward(&x, None)
    }
}

/// Each pixel attends to all others, with one head as wide as the map is deep.
struct PixelAttention {
    group_norm: GroupNorm,
    to_q: Linear,
    to_k: Linear,
    to_v: Linear,
    to_out: Linear,
}

impl PixelAttention {
    fn load(scope: &Scope<'_>, channels: usize, groups: usize) -> Result<Self> {
        // Older files have the names on the right, and 1×1 convolutions in place of linear layers.
        let linear = |name: &str, old: &str| scope.at_or(name, old).linear(channels, channels);
        Ok(Self {
            group_norm: scope.at("group_norm").group_norm(channels, groups, EPSILON)?,
            to_q: linear("to_q", "query")?,
            to_k: linear("to_k", "key")?,
            to_v: linear("to_v", "value")?,
            to_out: linear("to_out.0", "proj_attn")?,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (rows, height, width, channels) = x.dims4()?;
        let flat = [rows, height * width, channels];
        let normal = self.group_norm.forward(x)?.reshape(&flat)?;
        let (q, k, v) = (self.to_q.forward(&normal)?, self.to_k.forward(&normal)?, self.to_v.forward(&normal)?);
        let hidden = ops::attention(&q, &k, &v, 1, Mask::None)?;
        self.to_out.forward_add(&hidden, &x.reshape(&flat)?)?.reshape(x.dims())
    }
}

struct UpBlock {
    resnets: Vec<ResnetBlock>,
    upsampler: Option<UpsampleConv>,
}

impl UpBlock {
    /// The block of level `index` (outermost 0).
    fn load(scope: &Scope<'_>, config: &VaeConfig, index: usize) -> Result<Self> {
        let channels = config.channels[index];
        let below = config.channels.get(index + 1).copied().unwrap_or(channels);
        let resnets = (0..=config.layers).map(|layer| {
            let inputs = if layer == 0 { below } else { channels };
            resnet(&scope.at("resnets").at(layer), config, inputs, channels)
        });
        let resnets = resnets.collect::<Result<_>>()?;
        let upsampler =
            if index == 0 { None } else { Some(scope.at("upsamplers.0.conv").upsample_conv(channels, channels)?) };
        Ok(Self { resnets, upsampler })
    }

    fn forward(&self, x: Tensor) -> Result<Tensor> {
        let mut x = x;
        for resnet in &self.resnets {
            x = resnet.forward(&x, None)?;
        }
        if let Some(upsampler) = &self.upsampler {
            let (_, height, width, _) = x.dims4()?;
            x = upsampler.forward(&x, 2 * height, 2 * width)?;
        }
        Ok(x)
    }
}
