//! The transformer between two residual blocks: pixels attend to each other and to the prompt.
//!
//! Reference: <https://github.com/huggingface/diffusers/blob/v0.36.0/src/diffusers/models/transformers/transformer_2d.py>
//! and `models/attention.py` (`BasicTransformerBlock`).

use super::config::Level;
use crate::Result;
use crate::ops::{self, Activation, GroupNorm, LayerNorm, Linear, Mask, Tensor};
use crate::weights::Scope;

/// Transformer2DModel's own, whatever `norm_eps` says.
const GROUP_NORM_EPSILON: f64 = 1e-6;
const LAYER_NORM_EPSILON: f64 = 1e-5;

/// Transformer blocks over a feature map's pixels, with a residual around them.
pub(super) struct SpatialTransformer {
    norm: GroupNorm,
    /// A 1×1 convolution in Stable Diffusion 1.x, a linear layer in 2.x: the same to pixels in a row.
    proj_in: Linear,
    transformer_blocks: Vec<TransformerBlock>,
    proj_out: Linear,
}

impl SpatialTransformer {
    pub fn load(scope: &Scope<'_>, level: &Level, groups: usize) -> Result<Self> {
        let channels = level.channels;
        let blocks = scope.at("transformer_blocks");
        Ok(Self {
            norm: scope.at("norm").group_norm(channels, groups, GROUP_NORM_EPSILON)?,
            proj_in: scope.at("proj_in").linear(channels, channels)?,
            transformer_blocks: (0..level.transformer_layers)
                .map(|index| TransformerBlock::load(&blocks.at(index), level))
                .collect::<Result<_>>()?,
            proj_out: scope.at("proj_out").linear(channels, channels)?,
        })
    }

    /// (rows, height, width, channels), with `context` (rows, tokens, context width).
    pub fn forward(&self, x: &Tensor, context: &Tensor) -> Result<Tensor> {
        let (rows, height, width, channels) = x.dims4()?;
        let pixels = x.reshape(&[rows, height * width, channels])?;
        let normal = self.norm.forward(x)?.reshape(&[rows, height * width, channels])?;
        let mut hidden = self.proj_in.forward(&normal)?;
        for block in &self.transformer_blocks {
            hidden = block.forward(&hidden, context)?;
        }
        self.proj_out.forward_add(&hidden, &pixels)?.reshape(x.dims())
    }
}

struct TransformerBlock {
    norm1: LayerNorm,
    attn1: Attention,
    norm2: LayerNorm,
    attn2: Attention,
    norm3: LayerNorm,
    ff_in: Linear,
    ff_out: Linear,
    only_cross_attention: bool,
}

impl TransformerBlock {
    fn load(scope: &Scope<'_>, level: &Level) -> Result<Self> {
        let channels = level.channels;
        let first_context = if level.only_cross_attention { level.context } else { channels };
        Ok(Self {
            norm1: scope.at("norm1").layer_norm(channels, LAYER_NORM_EPSILON)?,
            attn1: Attention::load(&scope.at("attn1"), level, first_context)?,
            norm2: scope.at("norm2").layer_norm(channels, LAYER_NORM_EPSILON)?,
            attn2: Attention::load(&scope.at("attn2"), level, level.context)?,
            norm3: scope.at("norm3").layer_norm(channels, LAYER_NORM_EPSILON)?,
            ff_in: scope.at("ff.net.0.proj").linear_then(channels, 8 * channels, Activation::Gate)?,
            ff_out: scope.at("ff.net.2").linear(4 * channels, channels)?,
            only_cross_attention: level.only_cross_attention,
        })
    }

    fn forward(&self, x: &Tensor, context: &Tensor) -> Result<Tensor> {
        let normal = self.norm1.forward(x)?;
        let x = self.attn1.forward(&normal, if self.only_cross_attention { context } else { &normal }, x)?;
        let x = self.attn2.forward(&self.norm2.forward(&x)?, context, &x)?;
        let inner = self.ff_in.forward(&self.norm3.forward(&x)?)?;
        self.ff_out.forward_add(&inner, &x)
    }
}

struct Attention {
    to_q: Linear,
    to_k: Linear,
    to_v: Linear,
    to_out: Linear,
    heads: usize,
}

impl Attention {
    fn load(scope: &Scope<'_>, level: &Level, context: usize) -> Result<Self> {
        let channels = level.channels;
        Ok(Self {
            to_q: scope.at("to_q").linear_without_bias(channels, channels)?,
            to_k: scope.at("to_k").linear_without_bias(context, channels)?,
            to_v: scope.at("to_v").linear_without_bias(context, channels)?,
            to_out: scope.at("to_out.0").linear(channels, channels)?,
            heads: level.heads,
        })
    }

    fn forward(&self, x: &Tensor, context: &Tensor, residual: &Tensor) -> Result<Tensor> {
        let (q, k, v) = (self.to_q.forward(x)?, self.to_k.forward(context)?, self.to_v.forward(context)?);
        self.to_out.forward_add(&ops::attention(&q, &k, &v, self.heads, Mask::None)?, residual)
    }
}
