//! The transformers of FLUX.1.
//!
//! Reference: <https://github.com/huggingface/diffusers/blob/v0.36.0/src/diffusers/models/transformers/transformer_flux.py>

use std::path::Path;

use anyhow::Result;
use serde::Deserialize;

use super::tokens::TIMESTEP;
use super::{Counter, Work, read};

/// Tokens of a prompt, of the model that takes guidance as an input and of the one that does not.
const TOKENS: (u64, u64) = (512, 256);
/// Latent values along a side that make a token.
const PATCH: u64 = 2;

/// What is read of a `transformer/config.json`.
#[derive(Debug, Deserialize)]
struct Flux {
    attention_head_dim: u64,
    num_attention_heads: u64,
    num_layers: u64,
    num_single_layers: u64,
    in_channels: u64,
    out_channels: Option<u64>,
    joint_attention_dim: u64,
    pooled_projection_dim: u64,
    guidance_embeds: bool,
}

/// Work of one denoiser call over `rows` latents of `side` (height, width).
pub(super) fn flux(config: &Path, rows: u64, side: (u64, u64), element: u64) -> Result<Work> {
    let config: Flux = read(config)?;
    let mut count = Counter::new(element, rows, side);
    let width = config.num_attention_heads * config.attention_head_dim;
    let picture = (side.0 / PATCH) * (side.1 / PATCH);
    let prompt = if config.guidance_embeds { TOKENS.0 } else { TOKENS.1 };
    let all = picture + prompt;
    count.linear(rows * picture, config.in_channels, width);
    count.linear(rows * prompt, config.joint_attention_dim, width);
    count.embedding(TIMESTEP, width);
    count.embedding(config.pooled_projection_dim, width);
    if config.guidance_embeds {
        count.embedding(TIMESTEP, width);
    }
    for _ in 0..config.num_layers {
        for tokens in [picture, prompt] {
            count.modulation(width, 6);
            count.projections(tokens, width, 4);
            count.feed_forward(tokens, width);
        }
        count.attention(all, all, width);
    }
    for _ in 0..config.num_single_layers {
        count.modulation(width, 3);
        count.projections(all, width, 3);
        count.attention(all, all, width);
        count.linear(rows * all, width, 4 * width);
        count.linear(rows * all, 5 * width, width);
    }
    count.modulation(width, 2);
    count.linear(rows * picture, width, config.out_channels.unwrap_or(config.in_channels));
    Ok(count.work)
}
