//! The transformers of Stable Diffusion 3 and 3.5.
//!
//! Reference: <https://github.com/huggingface/diffusers/blob/v0.36.0/src/diffusers/models/transformers/transformer_sd3.py>

use std::path::Path;

use anyhow::Result;
use serde::Deserialize;

use super::tokens::TIMESTEP;
use super::{Counter, Work, read};

/// Tokens of a prompt: both CLIP encoders' side by side, then T5's.
const TOKENS: u64 = 77 + 256;

/// What is read of a `transformer/config.json`.
#[derive(Debug, Deserialize)]
struct Mmdit {
    attention_head_dim: u64,
    num_attention_heads: u64,
    num_layers: u64,
    in_channels: u64,
    out_channels: u64,
    patch_size: u64,
    joint_attention_dim: u64,
    pooled_projection_dim: u64,
    /// Layers whose picture looks at itself once more.
    #[serde(default)]
    dual_attention_layers: Vec<u64>,
}

/// Work of one denoiser call over `rows` latents of `side` (height, width).
pub(super) fn mmdit(config: &Path, rows: u64, side: (u64, u64), element: u64) -> Result<Work> {
    let config: Mmdit = read(config)?;
    let mut count = Counter::new(element, rows, side);
    let (width, patch) = (config.num_attention_heads * config.attention_head_dim, config.patch_size);
    let picture = (side.0 / patch) * (side.1 / patch);
    count.linear(rows * picture, config.in_channels * patch * patch, width);
    count.embedding(TIMESTEP, width);
    count.embedding(config.pooled_projection_dim, width);
    count.linear(rows * TOKENS, config.joint_attention_dim, width);
    for layer in 0..config.num_layers {
        let (dual, last) = (config.dual_attention_layers.contains(&layer), layer + 1 == config.num_layers);
        count.modulation(width, if dual { 9 } else { 6 });
        // Nobody looks at the prompt after the last layer.
        count.modulation(width, if last { 2 } else { 6 });
        count.projections(picture, width, 4);
        count.projections(TOKENS, width, if last { 3 } else { 4 });
        count.attention(picture + TOKENS, picture + TOKENS, width);
        if dual {
            count.projections(picture, width, 4);
            count.attention(picture, picture, width);
        }
        count.feed_forward(picture, width);
        if !last {
            count.feed_forward(TOKENS, width);
        }
    }
    count.modulation(width, 2);
    count.linear(rows * picture, width, patch * patch * config.out_channels);
    Ok(count.work)
}
