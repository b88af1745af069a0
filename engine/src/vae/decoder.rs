//! From latents to pictures.
//!
//! Reference: <https://github.com/huggingface/diffusers/blob/v0.36.0/src/diffusers/models/autoencoders/vae.py>
//! (`Decoder`).

use super::bands::{self, Source};
use super::config::VaeConfig;
use super::memory::Memory;
use super::middle::{EPSILON, MidBlock, resnet};
use crate::Result;
use crate::denoiser::ResnetBlock;
use crate::ops::{Conv2d, ConvShape, GroupNorm, Tensor, UpsampleConv};
use crate::weights::Scope;

pub(super) struct Decoder {
    conv_in: Conv2d,
    mid_block: MidBlock,
    /// Innermost first, as in the checkpoint.
    up_blocks: Vec<UpBlock>,
    conv_norm_out: GroupNorm,
    conv_out: Conv2d,
}

struct UpBlock {
    /// Channels that come in and go out.
    channels: (usize, usize),
    resnets: Vec<ResnetBlock>,
    upsampler: Option<UpsampleConv>,
}

impl Decoder {
    pub fn load(scope: &Scope<'_>, config: &VaeConfig) -> Result<Self> {
        let levels = config.channels.len();
        let (outer, inner) = (config.channels[0], config.channels[levels - 1]);
        Ok(Self {
            conv_in: scope.at("conv_in").conv2d(config.latent_channels, inner, 3, ConvShape::same(3))?,
            mid_block: MidBlock::load(&scope.at("mid_block"), config, inner)?,
            up_blocks: (0..levels)
                .map(|index| UpBlock::load(&scope.at("up_blocks").at(index), config, levels - 1 - index))
                .collect::<Result<_>>()?,
            conv_norm_out: scope.at("conv_norm_out").group_norm(outer, config.groups, EPSILON)?,
            conv_out: scope.at("conv_out").conv2d(outer, 3, 3, ConvShape::same(3))?,
        })
    }

    /// (rows, height, width, latent channels) → (rows, height × factor, width × factor, 3).
    pub fn forward(&self, latents: &Tensor, memory: Memory) -> Result<Tensor> {
        let x = self.mid_block.forward(&self.conv_in.forward(latents)?)?;
        let (_, mut height, mut width, mut channels) = x.dims4()?;
        let mut map = Source::of(x)?;
        for block in &self.up_blocks {
            map = block.through_resnets(map, memory, (height, width))?;
            channels = block.channels.1;
            if let Some(upsampler) = &block.upsampler {
                (height, width) = (2 * height, 2 * width);
                map = map.enlarged(upsampler)?;
            }
        }
        match memory.cut((channels, channels), (height, width)) {
            Some(cut) => bands::finish(&self.conv_norm_out, &self.conv_out, map, cut),
            None => self.conv_out.forward(&self.conv_norm_out.forward_silu(&map.whole()?)?),
        }
    }
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
        Ok(Self { channels: (below, channels), resnets, upsampler })
    }

    fn through_resnets<'a>(&self, map: Source<'a>, memory: Memory, size: (usize, usize)) -> Result<Source<'a>> {
        match memory.cut(self.channels, size) {
            Some(cut) => self.resnets.iter().try_fold(map, |map, resnet| bands::resnet(resnet, map, cut)),
            None => Source::of(self.resnets.iter().try_fold(map.whole()?, |x, resnet| resnet.forward(&x, None))?),
        }
    }
}
