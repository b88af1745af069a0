//! From pictures to what a latent is drawn from.
//!
//! Reference: <https://github.com/huggingface/diffusers/blob/v0.36.0/src/diffusers/models/autoencoders/vae.py>
//! (`Encoder`).

use super::bands::{self, Source};
use super::config::VaeConfig;
use super::memory::Memory;
use super::middle::{EPSILON, MidBlock, resnet};
use crate::Result;
use crate::denoiser::ResnetBlock;
use crate::ops::{Conv2d, ConvShape, GroupNorm, Tensor};
use crate::weights::Scope;

pub(super) struct Encoder {
    conv_in: Conv2d,
    /// Outermost first.
    down_blocks: Vec<DownBlock>,
    mid_block: MidBlock,
    conv_norm_out: GroupNorm,
    conv_out: Conv2d,
}

struct DownBlock {
    /// Channels that come in and go out.
    channels: (usize, usize),
    resnets: Vec<ResnetBlock>,
    downsampler: Option<Conv2d>,
}

impl Encoder {
    pub fn load(scope: &Scope<'_>, config: &VaeConfig) -> Result<Self> {
        let levels = config.channels.len();
        let (outer, inner) = (config.channels[0], config.channels[levels - 1]);
        Ok(Self {
            conv_in: scope.at("conv_in").conv2d(3, outer, 3, ConvShape::same(3))?,
            down_blocks: (0..levels)
                .map(|index| DownBlock::load(&scope.at("down_blocks").at(index), config, index))
                .collect::<Result<_>>()?,
            mid_block: MidBlock::load(&scope.at("mid_block"), config, inner)?,
            conv_norm_out: scope.at("conv_norm_out").group_norm(inner, config.groups, EPSILON)?,
            conv_out: scope.at("conv_out").conv2d(inner, 2 * config.latent_channels, 3, ConvShape::same(3))?,
        })
    }

    /// (rows, height, width, 3) → (rows, height / factor, width / factor, 2 × latent channels): means, then
    /// logarithms of variances.
    pub fn forward(&self, pictures: Tensor, memory: Memory) -> Result<Tensor> {
        let (_, mut height, mut width, _) = pictures.dims4()?;
        let mut map = Source::of(pictures)?.convolved(&self.conv_in)?;
        for block in &self.down_blocks {
            map = block.forward(map, memory, (height, width))?;
            if block.downsampler.is_some() {
                (height, width) = (height / 2, width / 2);
            }
        }
        let x = self.mid_block.forward(&map.whole()?)?;
        self.conv_out.forward(&self.conv_norm_out.forward_silu(&x)?)
    }
}

impl DownBlock {
    /// The block of level `index` (outermost 0).
    fn load(scope: &Scope<'_>, config: &VaeConfig, index: usize) -> Result<Self> {
        let channels = config.channels[index];
        let above = config.channels[index.saturating_sub(1)];
        let resnets = (0..config.layers).map(|layer| {
            let inputs = if layer == 0 { above } else { channels };
            resnet(&scope.at("resnets").at(layer), config, inputs, channels)
        });
        let resnets = resnets.collect::<Result<_>>()?;
        let downsampler = if index + 1 == config.channels.len() {
            None
        } else {
            // A last line and column of zeros, and none before the first.
            let shape = ConvShape { stride: 2, padding: (0, 1) };
            Some(scope.at("downsamplers.0.conv").conv2d(channels, channels, 3, shape)?)
        };
        Ok(Self { channels: (above, channels), resnets, downsampler })
    }

    fn forward<'a>(&self, map: Source<'a>, memory: Memory, size: (usize, usize)) -> Result<Source<'a>> {
        let Some(cut) = memory.cut(self.channels, size) else {
            let x = self.resnets.iter().try_fold(map.whole()?, |x, resnet| resnet.forward(&x, None))?;
            return Source::of(match &self.downsampler {
                Some(downsampler) => downsampler.forward(&x)?,
                None => x,
            });
        };
        let map = self.resnets.iter().try_fold(map, |map, resnet| bands::resnet(resnet, map, cut))?;
        match &self.downsampler {
            Some(downsampler) => bands::halve(downsampler, map, cut),
            None => Ok(map),
        }
    }
}
