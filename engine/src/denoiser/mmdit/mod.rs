//! `SD3Transformer2DModel`: tokens of the picture and of the prompt go side by side through joint attention, with
//! weights of their own.
//!
//! Reference: Esser et al. 2024, <https://arxiv.org/abs/2403.03206>;
//! <https://github.com/huggingface/diffusers/blob/v0.36.0/src/diffusers/models/transformers/transformer_sd3.py>

mod block;
mod config;
mod positions;

use self::block::{EPSILON, JointBlock};
use self::config::MmditConfig;
use self::positions::Positions;
use super::embedding::{VectorEmbedding, Waves};
use super::patches::{Order, from_patches, into_patches};
use crate::Result;
use crate::ops::{self, LayerNorm, Linear, Place, Tensor};
use crate::weights::Part;

/// Sinusoids of a timestep.
const WAVES: Waves = Waves { width: 256, flip_sin_to_cos: true, freq_shift: 0.0 };

/// The multimodal diffusion transformer. One timestep per row.
pub(crate) struct Mmdit {
    pub config: MmditConfig,
    /// Bytes of its weights in the checkpoint.
    pub weight_bytes: usize,
    place: Place,
    patch_embed: Linear,
    positions: Positions,
    timestep_embedder: VectorEmbedding,
    text_embedder: VectorEmbedding,
    context_embedder: Linear,
    blocks: Vec<JointBlock>,
    norm: LayerNorm,
    norm_out: Linear,
    proj_out: Linear,
}

/// What a pass listens to besides timesteps.
#[derive(Clone, Copy)]
pub(crate) struct Prompts<'a> {
    /// (rows, tokens, context width)
    pub tokens: &'a Tensor,
    /// (rows, pooled width)
    pub pooled: &'a Tensor,
}

impl Mmdit {
    /// Loads a `transformer`.
    pub fn load(part: impl Into<Part>, place: &Place) -> Result<Self> {
        let part = part.into();
        let config = MmditConfig::read(&part.config()?)?;
        let weights = part.weights("diffusion_pytorch_model", place)?;
        let root = weights.root();
        let (width, patch, side) = (config.width(), config.patch, config.most_tokens);
        let positions = if weights.contains("pos_embed.pos_embed") {
            Positions::stored(root.at("pos_embed").values("pos_embed", &[1, side * side, width])?, side, width)
        } else {
            Positions::computed(side, config.sample_size / patch, width)
        };
        let embedder = root.at("time_text_embed");
        let block = |index: usize| JointBlock::load(&root.at("transformer_blocks").at(index), &config, index);
        let model = Self {
            weight_bytes: weights.bytes(),
            place: place.clone(),
            patch_embed: root.at("pos_embed.proj").patch_linear(config.in_channels, width, patch)?,
            positions,
            timestep_embedder: VectorEmbedding::load(&embedder.at("timestep_embedder"), WAVES.width, width)?,
            text_embedder: VectorEmbedding::load(&embedder.at("text_embedder"), config.pooled, width)?,
            context_embedder: root.at("context_embedder").linear(config.context, width)?,
            blocks: (0..config.layers).map(block).collect::<Result<_>>()?,
            norm: LayerNorm::plain(width, EPSILON),
            norm_out: root.at("norm_out.linear").linear(width, 2 * width)?,
            proj_out: root.at("proj_out").linear(width, patch * patch * config.out_channels)?,
            config,
        };
        weights.finish(|_| false)?;
        Ok(model)
    }

    /// What the transformer makes of `sample`, (rows, channels, height, width) values in `dims`, with one timestep
    /// and one line of each prompt tensor per row: as many values. Height and width must be multiples of the patch.
    /// The layers in `skipped` are left out.
    pub fn forward(
        &self,
        sample: &[f32],
        dims: [usize; 4],
        timesteps: &[f32],
        prompts: Prompts<'_>,
        skipped: &[usize],
    ) -> Result<Vec<f32>> {
        let [rows, channels, height, width] = dims;
        let patch = self.config.patch;
        let (down, across) = (height / patch, width / patch);
        let tokens = [rows, down * across];
        let patches = into_patches(sample, dims, patch, Order::ChannelsFirst);
        let patches = Tensor::new(&patches, &[tokens[0], tokens[1], channels * patch * patch], &self.place)?;
        let positions = self.positions.of(rows, down, across)?;
        let positions = Tensor::new(&positions, &[tokens[0], tokens[1], self.config.width()], &self.place)?;
        let mut x = self.patch_embed.forward_add(&patches, &positions)?;

        let vector = self.text_embedder.forward(prompts.pooled)?;
        let waves = Tensor::new(&WAVES.of(timesteps), &[rows, WAVES.width], &self.place)?;
        let vector = ops::silu(&self.timestep_embedder.forward_add(&waves, &vector)?)?;
        let mut context = self.context_embedder.forward(prompts.tokens)?;

        for (_, block) in self.blocks.iter().enumerate().filter(|(index, _)| !skipped.contains(index)) {
            let (picture, prompt) = block.forward(&x, &context, &vector)?;
            x = picture;
            context = prompt.unwrap_or(context);
        }
        let told = ops::split_channels(&self.norm_out.forward(&vector)?, 2)?;
        let x = self.proj_out.forward(&self.norm.forward_modulated(&x, &told[0], &told[1])?)?;
        let dims = [rows, self.config.out_channels, height, width];
        Ok(from_patches(&x.to_values()?, dims, patch, Order::ChannelsLast))
    }

    #[cfg(test)]
    pub fn positions(&self) -> (&[f32], Vec<f32>) {
        let (side, base) = (self.config.most_tokens, self.config.sample_size / self.config.patch);
        let computed = Positions::computed(side, base, self.config.width());
        (self.positions.values(), computed.values().to_vec())
    }
}
