//! What encoder and decoder have between their ways down and up.
//!
//! Reference: <https://github.com/huggingface/diffusers/blob/v0.36.0/src/diffusers/models/unets/unet_2d_blocks.py>
//! (`UNetMidBlock2D`).

use super::config::VaeConfig;
use crate::Result;
use crate::denoiser::{ResnetBlock, ResnetShape};
use crate::ops::{self, GroupNorm, Linear, Mask, Tensor};
use crate::weights::Scope;

pub(super) const EPSILON: f64 = 1e-6;

pub(super) fn resnet(scope: &Scope<'_>, config: &VaeConfig, inputs: usize, outputs: usize) -> Result<ResnetBlock> {
    let shape = ResnetShape { inputs, outputs, time_width: None, groups: config.groups, epsilon: EPSILON };
    ResnetBlock::load(scope, shape)
}

pub(super) struct MidBlock {
    first: ResnetBlock,
    attention: Option<PixelAttention>,
    second: ResnetBlock,
}

impl MidBlock {
    pub fn load(scope: &Scope<'_>, config: &VaeConfig, channels: usize) -> Result<Self> {
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

    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
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
