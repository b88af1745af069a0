//! `UNet2DConditionModel`: down the levels, through the middle, up again with what was seen on the way.
//!
//! Reference: <https://github.com/huggingface/diffusers/blob/v0.36.0/src/diffusers/models/unets/unet_2d_condition.py>

mod blocks;
mod config;
mod transformer;

use self::blocks::{Conditions, DownBlock, MidBlock, UpBlock};
use self::config::UNetConfig;
use super::embedding::{VectorEmbedding, Waves};
use crate::Result;
use crate::ops::{self, Conv2d, ConvShape, GroupNorm, Place, Tensor};
use crate::weights::Part;

/// What SDXL's U-Nets are told beside timestep and prompt.
#[derive(Clone, Copy)]
pub(crate) struct Added<'a> {
    /// (rows, pooled width): the prompts in one vector each.
    pub pooled: &'a Tensor,
    /// Sizes and the like, equally many for each row, row after row.
    pub numbers: &'a [f32],
}

/// A denoiser that takes one timestep per row.
pub(crate) struct UNet {
    pub config: UNetConfig,
    /// Bytes of its weights in the checkpoint.
    pub weight_bytes: usize,
    place: Place,
    conv_in: Conv2d,
    time_embedding: VectorEmbedding,
    add_embedding: Option<VectorEmbedding>,
    down_blocks: Vec<DownBlock>,
    mid_block: Option<MidBlock>,
    /// Innermost first, as in the checkpoint.
    up_blocks: Vec<UpBlock>,
    conv_norm_out: GroupNorm,
    conv_out: Conv2d,
}

impl UNet {
    /// Loads a `unet`.
    pub fn load(part: impl Into<Part>, place: &Place) -> Result<Self> {
        let part = part.into();
        let config = UNetConfig::read(&part.config()?)?;
        let weights = part.weights("diffusion_pytorch_model", place)?;
        let root = weights.root();
        let (levels, outer) = (config.levels.len(), config.levels[0].channels);
        let same = ConvShape::same;
        let unet = Self {
            weight_bytes: weights.bytes(),
            place: place.clone(),
            conv_in: root.at("conv_in").conv2d(
                config.in_channels,
                outer,
                config.conv_in_kernel,
                same(config.conv_in_kernel),
            )?,
            time_embedding: VectorEmbedding::load(&root.at("time_embedding"), outer, config.time_width)?,
            add_embedding: match config.added {
                None => None,
                Some(added) => Some(VectorEmbedding::load(&root.at("add_embedding"), added.inputs, config.time_width)?),
            },
            down_blocks: (0..levels)
                .map(|index| DownBlock::load(&root.at("down_blocks").at(index), &config, index))
                .collect::<Result<_>>()?,
            mid_block: MidBlock::load(&root.at("mid_block"), &config)?,
            up_blocks: (0..levels)
                .map(|index| UpBlock::load(&root.at("up_blocks").at(index), &config, levels - 1 - index))
                .collect::<Result<_>>()?,
            conv_norm_out: root.at("conv_norm_out").group_norm(outer, config.groups, config.epsilon)?,
            conv_out: root.at("conv_out").conv2d(
                outer,
                config.out_channels,
                config.conv_out_kernel,
                same(config.conv_out_kernel),
            )?,
            config,
        };
        weights.finish(|_| false)?;
        Ok(unet)
    }

    /// What the denoiser makes of `sample`, (rows, channels, height, width) values in `dims`, with one
    /// timestep and one line of `context` (rows, tokens, context width) per row: as many values. A U-Net
    /// that is told more ([`UNetConfig::added`]) gets it as `added`.
    pub fn forward(
        &self,
        sample: &[f32],
        dims: [usize; 4],
        timesteps: &[f32],
        context: &Tensor,
        added: Option<Added<'_>>,
    ) -> Result<Vec<f32>> {
        let sample = if self.config.center_input_sample {
            ops::feature_map(&sample.iter().map(|value| 2.0 * value - 1.0).collect::<Vec<_>>(), dims, &self.place)?
        } else {
            ops::feature_map(sample, dims, &self.place)?
        };
        let time = ops::silu(&self.time(timesteps, added)?)?;
        let conditions = Conditions { time: &time, context };

        let mut x = self.conv_in.forward(&sample)?;
        let mut skips = vec![x.clone()];
        for block in &self.down_blocks {
            x = block.forward(x, conditions, &mut skips)?;
        }
        if let Some(block) = &self.mid_block {
            x = block.forward(&x, conditions)?;
        }
        for block in &self.up_blocks {
            x = block.forward(x, conditions, &mut skips)?;
        }
        ops::channels_first(&self.conv_out.forward(&self.conv_norm_out.forward_silu(&x)?)?)
    }

    /// (rows, time width): the timesteps, and what else the rows are told.
    fn time(&self, timesteps: &[f32], added: Option<Added<'_>>) -> Result<Tensor> {
        let time = self.time_embedding.forward_values(&self.config.waves.of(timesteps), &self.place)?;
        let (Some(embedding), Some(config), Some(added)) = (&self.add_embedding, self.config.added, added) else {
            return Ok(time);
        };
        let waves = Waves { width: config.waves, ..self.config.waves }.of(added.numbers);
        let rows = timesteps.len();
        let waves = Tensor::new(&waves, &[rows, waves.len() / rows], &self.place)?;
        embedding.forward_add(&ops::concat_channels(added.pooled, &waves)?, &time)
    }
}
