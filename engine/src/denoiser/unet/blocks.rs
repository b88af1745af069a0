//! The levels of the U: down, middle, up.
//!
//! Reference: <https://github.com/huggingface/diffusers/blob/v0.36.0/src/diffusers/models/unets/unet_2d_blocks.py>

use super::config::{Level, Middle, UNetConfig};
use super::transformer::SpatialTransformer;
use crate::Result;
use crate::denoiser::{ResnetBlock, ResnetShape};
use crate::ops::{self, Conv2d, ConvShape, Tensor, UpsampleConv};
use crate::weights::Scope;

/// What every block of a pass is told.
#[derive(Clone, Copy)]
pub(super) struct Conditions<'a> {
    /// (rows, time width), after its SiLU.
    pub time: &'a Tensor,
    /// (rows, tokens, context width): the prompts.
    pub context: &'a Tensor,
}

fn resnet_shape(config: &UNetConfig, inputs: usize, outputs: usize) -> ResnetShape {
    ResnetShape { inputs, outputs, time_width: Some(config.time_width), groups: config.groups, epsilon: config.epsilon }
}

/// The attentions of a block, if it attends: one per residual block.
fn attentions(scope: &Scope<'_>, config: &UNetConfig, level: &Level, count: usize) -> Result<Vec<SpatialTransformer>> {
    let scope = scope.at("attentions");
    (0..count).map(|index| SpatialTransformer::load(&scope.at(index), level, config.groups)).collect()
}

/// `DownBlock2D` and `CrossAttnDownBlock2D`.
pub(super) struct DownBlock {
    resnets: Vec<ResnetBlock>,
    attentions: Vec<SpatialTransformer>,
    downsampler: Option<Conv2d>,
}

impl DownBlock {
    pub fn load(scope: &Scope<'_>, config: &UNetConfig, index: usize) -> Result<Self> {
        let level = &config.levels[index];
        let inputs = config.levels[index.saturating_sub(1)].channels;
        let resnets = (0..level.layers).map(|layer| {
            let inputs = if layer == 0 { inputs } else { level.channels };
            ResnetBlock::load(&scope.at("resnets").at(layer), resnet_shape(config, inputs, level.channels))
        });
        let resnets = resnets.collect::<Result<_>>()?;
        let downsampler = if index + 1 == config.levels.len() {
            None
        } else {
            let padding = config.downsample_padding;
            // Without padding of its own the convolution still needs a last row and column.
            let shape = ConvShape { stride: 2, padding: (padding, 1) };
            Some(scope.at("downsamplers.0.conv").conv2d(level.channels, level.channels, 3, shape)?)
        };
        let count = if level.down_attends { level.layers } else { 0 };
        Ok(Self { resnets, attentions: attentions(scope, config, level, count)?, downsampler })
    }

    /// The block's result; what the way up will need is pushed onto `skips`.
    pub fn forward(&self, x: Tensor, conditions: Conditions<'_>, skips: &mut Vec<Tensor>) -> Result<Tensor> {
        let mut x = x;
        for (index, resnet) in self.resnets.iter().enumerate() {
            x = resnet.forward(&x, Some(conditions.time))?;
            if let Some(attention) = self.attentions.get(index) {
                x = attention.forward(&x, conditions.context)?;
            }
            skips.push(x.clone());
        }
        if let Some(downsampler) = &self.downsampler {
            x = downsampler.forward(&x)?;
            skips.push(x.clone());
        }
        Ok(x)
    }
}

/// `UNetMidBlock2DCrossAttn`, or the first residual block of it alone (`UNetMidBlock2D`).
pub(super) struct MidBlock {
    first: ResnetBlock,
    rest: Option<(SpatialTransformer, ResnetBlock)>,
}

impl MidBlock {
    /// `None` where the configuration has no middle.
    pub fn load(scope: &Scope<'_>, config: &UNetConfig) -> Result<Option<Self>> {
        if config.middle == Middle::Nothing {
            return Ok(None);
        }
        let level = &config.levels[config.levels.len() - 1];
        let shape = resnet_shape(config, level.channels, level.channels);
        let resnet = |index: usize| ResnetBlock::load(&scope.at("resnets").at(index), shape);
        let first = resnet(0)?;
        let rest = if config.middle == Middle::CrossAttention {
            let level = Level { only_cross_attention: false, ..level.clone() };
            let attention = SpatialTransformer::load(&scope.at("attentions.0"), &level, config.groups)?;
            Some((attention, resnet(1)?))
        } else {
            None
        };
        Ok(Some(Self { first, rest }))
    }

    pub fn forward(&self, x: &Tensor, conditions: Conditions<'_>) -> Result<Tensor> {
        let x = self.first.forward(x, Some(conditions.time))?;
        match &self.rest {
            None => Ok(x),
            Some((attention, resnet)) => {
                resnet.forward(&attention.forward(&x, conditions.context)?, Some(conditions.time))
            }
        }
    }
}

/// `UpBlock2D` and `CrossAttnUpBlock2D`.
pub(super) struct UpBlock {
    resnets: Vec<ResnetBlock>,
    attentions: Vec<SpatialTransformer>,
    upsampler: Option<UpsampleConv>,
}

impl UpBlock {
    /// The block of level `index` (outermost 0), which takes one residual block more than its way down.
    pub fn load(scope: &Scope<'_>, config: &UNetConfig, index: usize) -> Result<Self> {
        let level = &config.levels[index];
        let below = config.levels.get(index + 1).unwrap_or(level).channels;
        let above = config.levels[index.saturating_sub(1)].channels;
        let count = level.layers + 1;
        let resnets = (0..count).map(|layer| {
            let from_below = if layer == 0 { below } else { level.channels };
            let skipped = if layer + 1 == count { above } else { level.channels };
            let shape = resnet_shape(config, from_below + skipped, level.channels);
            ResnetBlock::load(&scope.at("resnets").at(layer), shape)
        });
        let resnets = resnets.collect::<Result<_>>()?;
        let upsampler = if index == 0 {
            None
        } else {
            Some(scope.at("upsamplers.0.conv").upsample_conv(level.channels, level.channels)?)
        };
        let attending = if level.up_attends { count } else { 0 };
        Ok(Self { resnets, attentions: attentions(scope, config, level, attending)?, upsampler })
    }

    /// The block's result; it takes its own from the end of `skips`, and grows to the size of the one
    /// that the next block will take.
    pub fn forward(&self, x: Tensor, conditions: Conditions<'_>, skips: &mut Vec<Tensor>) -> Result<Tensor> {
        let mut x = x;
        for (index, resnet) in self.resnets.iter().enumerate() {
            if let Some(skip) = skips.pop() {
                x = ops::concat_channels(&x, &skip)?;
            }
            x = resnet.forward(&x, Some(conditions.time))?;
            if let Some(attention) = self.attentions.get(index) {
                x = attention.forward(&x, conditions.context)?;
            }
        }
        if let (Some(upsampler), Some(next)) = (&self.upsampler, skips.last()) {
            let (_, height, width, _) = next.dims4()?;
            x = upsampler.forward(&x, height, width)?;
        }
        Ok(x)
    }
}
