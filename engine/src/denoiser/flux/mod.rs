//! `FluxTransformer2DModel`: patches of the latent and the words of the prompt as the tokens of one
//! transformer, which predicts the velocity from noise to picture.
//!
//! Reference: <https://github.com/huggingface/diffusers/blob/v0.36.0/src/diffusers/models/transformers/transformer_flux.py>

mod blocks;
mod config;
mod places;

use self::blocks::{Conditions, DoubleBlock, SingleBlock};
use self::config::FluxConfig;
use super::embedding::{VectorEmbedding, Waves};
use super::patches::{Order, from_patches, into_patches};
use crate::Result;
use crate::ops::{self, LayerNorm, Linear, Place, Rotation, Tensor};
use crate::weights::Part;

/// What time and guidance become.
const WAVES: Waves = Waves { width: 256, flip_sin_to_cos: true, freq_shift: 0.0 };

/// What the time is counted in: the transformer was made for times from 0 to 1.
const TIMES: f32 = 1000.0;

/// Latent values along a side of a patch, which is one token.
pub(crate) const SIDE: usize = 2;

/// A denoiser that takes one timestep, and one guidance where it listens to that, per row.
pub(crate) struct FluxTransformer {
    pub config: FluxConfig,
    /// Bytes of its weights in the checkpoint.
    pub weight_bytes: usize,
    place: Place,
    x_embedder: Linear,
    context_embedder: Linear,
    timestep_embedder: VectorEmbedding,
    guidance_embedder: Option<VectorEmbedding>,
    text_embedder: VectorEmbedding,
    transformer_blocks: Vec<DoubleBlock>,
    single_transformer_blocks: Vec<SingleBlock>,
    norm_out: LayerNorm,
    /// To two vectors per row: scale and shift.
    norm_out_linear: Linear,
    proj_out: Linear,
}

/// What the rows of a call listen to.
pub(crate) struct FluxInputs<'a> {
    /// One per row, of 1000.
    pub timesteps: &'a [f32],
    /// One per row; only read if the transformer listens to it.
    pub guidance: &'a [f32],
    /// (rows, tokens, joint width)
    pub prompts: &'a Tensor,
    /// (rows, pooled width)
    pub pooled: &'a Tensor,
}

impl FluxTransformer {
    /// Loads a `transformer`.
    pub fn load(part: impl Into<Part>, place: &Place) -> Result<Self> {
        let part = part.into();
        let config = FluxConfig::read(&part.config()?)?;
        let weights = part.weights("diffusion_pytorch_model", place)?;
        let (root, width) = (weights.root(), config.width());
        let embedders = root.at("time_text_embed");
        let embedder = |name: &str, inputs| VectorEmbedding::load(&embedders.at(name), inputs, width);
        let (blocks, single_blocks) = (root.at("transformer_blocks"), root.at("single_transformer_blocks"));
        let transformer = Self {
            weight_bytes: weights.bytes(),
            place: place.clone(),
            x_embedder: root.at("x_embedder").linear(config.in_channels, width)?,
            context_embedder: root.at("context_embedder").linear(config.joint_width, width)?,
            timestep_embedder: embedder("timestep_embedder", WAVES.width)?,
            guidance_embedder: config
                .guidance_embeds
                .then(|| embedder("guidance_embedder", WAVES.width))
                .transpose()?,
            text_embedder: embedder("text_embedder", config.pooled_width)?,
            transformer_blocks: (0..config.layers)
                .map(|index| DoubleBlock::load(&blocks.at(index), &config))
                .collect::<Result<_>>()?,
            single_transformer_blocks: (0..config.single_layers)
                .map(|index| SingleBlock::load(&single_blocks.at(index), &config))
                .collect::<Result<_>>()?,
            norm_out: LayerNorm::plain(width, 1e-6),
            norm_out_linear: root.at("norm_out.linear").linear(width, 2 * width)?,
            proj_out: root.at("proj_out").linear(width, config.in_channels)?,
            config,
        };
        weights.finish(|_| false)?;
        Ok(transformer)
    }

    /// What the denoiser makes of `sample`, (rows, channels, height, width) values in `dims`, height and
    /// width even: as many values.
    pub fn forward(&self, sample: &[f32], dims: [usize; 4], inputs: &FluxInputs<'_>) -> Result<Vec<f32>> {
        let [rows, _, height, width] = dims;
        let grid = [height / SIDE, width / SIDE];
        let tokens = [rows, grid[0] * grid[1], self.config.in_channels];
        let patches = into_patches(sample, dims, SIDE, Order::ChannelsFirst);
        let patches = Tensor::new(&patches, &tokens, &self.place)?;
        let words = inputs.prompts.dims3()?.1;
        let angles = places::angles(&self.config.axes, words, grid);
        let rotation = Rotation::new(&angles, self.config.head_width, &self.place)?;
        let time = ops::silu(&self.embed(inputs)?)?;
        let conditions = Conditions { time: &time, rotation: &rotation };

        let mut picture = self.x_embedder.forward(&patches)?;
        let mut prompt = self.context_embedder.forward(inputs.prompts)?;
        for block in &self.transformer_blocks {
            (picture, prompt) = block.forward(&picture, &prompt, conditions)?;
        }
        let mut joined = ops::cat_tokens(&[&prompt, &picture])?;
        for block in &self.single_transformer_blocks {
            joined = block.forward(&joined, conditions)?;
        }
        let (_, picture) = ops::split_tokens(&joined, words)?;
        let modulation = ops::split_channels(&self.norm_out_linear.forward(&time)?, 2)?;
        let normal = self.norm_out.forward_modulated(&picture, &modulation[0], &modulation[1])?;
        Ok(from_patches(&self.proj_out.forward(&normal)?.to_values()?, dims, SIDE, Order::ChannelsFirst))
    }

    /// (rows, width): time, guidance and pooled prompt as one vector.
    fn embed(&self, inputs: &FluxInputs<'_>) -> Result<Tensor> {
        // As the reference rounds them on their way from the sampler to the transformer.
        let times: Vec<f32> = inputs.timesteps.iter().map(|time| time / TIMES * TIMES).collect();
        let mut vectors = self.timestep_embedder.forward_values(&WAVES.of(&times), &self.place)?;
        if let Some(embedder) = &self.guidance_embedder {
            let guidance: Vec<f32> = inputs.guidance.iter().map(|guidance| guidance * TIMES).collect();
            let waves = WAVES.of(&guidance);
            let waves = Tensor::new(&waves, &[guidance.len(), WAVES.width], &self.place)?;
            vectors = embedder.forward_add(&waves, &vectors)?;
        }
        self.text_embedder.forward_add(inputs.pooled, &vectors)
    }
}
