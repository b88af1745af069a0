//! The U-Nets of Stable Diffusion 1.x, 2.x and XL.

use std::path::Path;

use anyhow::Result;
use serde::Deserialize;

use super::{Counter, Work, read};

/// What is read of a `unet/config.json`.
#[derive(Debug, Deserialize)]
struct UNet {
    in_channels: u64,
    out_channels: u64,
    block_out_channels: Vec<u64>,
    down_block_types: Vec<String>,
    up_block_types: Vec<String>,
    layers_per_block: u64,
    cross_attention_dim: u64,
    #[serde(default)]
    transformer_layers_per_block: Layers,
    /// Stable Diffusion XL's: what its sizes and its prompt's pooled states make together.
    projection_class_embeddings_input_dim: Option<u64>,
}

/// Transformer layers at each level.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Layers {
    Alike(u64),
    Each(Vec<u64>),
}

impl Default for Layers {
    fn default() -> Self {
        Self::Alike(1)
    }
}

impl Layers {
    /// Of the level so many from the outermost.
    fn at(&self, level: usize) -> u64 {
        match self {
            Self::Alike(layers) => *layers,
            Self::Each(layers) => layers.get(level).copied().unwrap_or(1),
        }
    }
}

/// Work of one denoiser call over `rows` latents of `side` (height, width), from a `unet/config.json`.
pub(super) fn unet(config: &Path, rows: u64, side: (u64, u64), element: u64) -> Result<Work> {
    let config: UNet = read(config)?;
    let mut count = Counter::new(element, rows, side);
    let (channels, context) = (&config.block_out_channels, config.cross_attention_dim);
    let (outer, inner) = (channels[0], channels[channels.len() - 1]);
    let time = 4 * outer;
    count.linear(rows, outer, time);
    count.linear(rows, time, time);
    if let Some(width) = config.projection_class_embeddings_input_dim {
        count.linear(rows, width, time);
        count.linear(rows, time, time);
    }
    count.convolution(config.in_channels, outer, 3);

    let layers = &config.transformer_layers_per_block;
    let (mut now, mut skips) = (outer, vec![outer]);
    for (level, (&wide, kind)) in channels.iter().zip(&config.down_block_types).enumerate() {
        for _ in 0..config.layers_per_block {
            count.residual_block(now, wide, Some(time));
            now = wide;
            if kind.starts_with("CrossAttn") {
                count.transformer(wide, context, layers.at(level));
            }
            skips.push(now);
        }
        if level + 1 < channels.len() {
            count.downsample(now);
            skips.push(now);
        }
    }
    count.residual_block(inner, inner, Some(time));
    count.transformer(inner, context, layers.at(channels.len() - 1));
    count.residual_block(inner, inner, Some(time));
    for (level, (&wide, kind)) in channels.iter().rev().zip(&config.up_block_types).enumerate() {
        for _ in 0..=config.layers_per_block {
            count.residual_block(now + skips.pop().unwrap_or(0), wide, Some(time));
            now = wide;
            if kind.starts_with("CrossAttn") {
                count.transformer(wide, context, layers.at(channels.len() - 1 - level));
            }
        }
        if level + 1 < channels.len() {
            count.upsample(now);
        }
    }
    count.convolution(outer, config.out_channels, 3);
    Ok(count.work)
}

#[cfg(test)]
mod tests {
    use super::super::tests::giga;
    use super::*;

    #[test]
    fn a_step_of_stable_diffusion_1_5_is_what_its_modules_do() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(
            file.path(),
            r#"{"in_channels": 4, "out_channels": 4, "block_out_channels": [320, 640, 1280, 1280], "layers_per_block": 2,
                "cross_attention_dim": 768,
                "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
                "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"]}"#,
        )
        .unwrap();
        let work = unet(file.path(), 2, (64, 64), 2).unwrap();
        assert_eq!(giga(work.flops()), 1607, "{work:?}");
        assert_eq!(
            (giga(work.convolutions), giga(work.linear), giga(work.attention)),
            (801, 467 + 87, 252),
            "{work:?}"
        );
    }
}
