//! The VAEs of all families.

use std::path::Path;

use anyhow::Result;
use serde::Deserialize;

use super::{Counter, Work, read};

/// What is read of a `vae/config.json`.
#[derive(Debug, Deserialize)]
struct Vae {
    latent_channels: u64,
    block_out_channels: Vec<u64>,
    layers_per_block: u64,
}

/// Work of decoding `rows` latents of `side` (height, width), from a `vae/config.json`.
pub fn vae(config: &Path, rows: u64, side: (u64, u64), element: u64) -> Result<Work> {
    let config: Vae = read(config)?;
    let mut count = Counter::new(element, rows, side);
    let channels = &config.block_out_channels;
    let inner = channels[channels.len() - 1];
    count.convolution(config.latent_channels, config.latent_channels, 1);
    count.convolution(config.latent_channels, inner, 3);
    count.residual_block(inner, inner, None);
    count.attention_layer(inner, inner, side.0 * side.1);
    count.residual_block(inner, inner, None);
    let mut now = inner;
    for (level, &wide) in channels.iter().rev().enumerate() {
        for _ in 0..=config.layers_per_block {
            count.residual_block(now, wide, None);
            now = wide;
        }
        if level + 1 < channels.len() {
            count.upsample(now);
        }
    }
    count.convolution(channels[0], 3, 3);
    Ok(count.work)
}

#[cfg(test)]
mod tests {
    use super::super::tests::giga;
    use super::*;

    fn config(text: &str) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        file
    }

    #[test]
    fn a_decoding_of_stable_diffusion_1_5_is_what_its_modules_do() {
        let file =
            config(r#"{"latent_channels": 4, "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2}"#);
        let work = vae(file.path(), 1, (64, 64), 2).unwrap();
        assert_eq!((giga(work.flops()), giga(work.convolutions)), (2515, 2437), "{work:?}");
    }

    #[test]
    fn rows_share_the_weights() {
        let file = config(r#"{"latent_channels": 4, "block_out_channels": [32, 64], "layers_per_block": 1}"#);
        let of = |rows| vae(file.path(), rows, (8, 8), 4).unwrap();
        let (one, two, three) = (of(1), of(2), of(3));
        assert_eq!(three.flops(), 3.0 * one.flops());
        assert_eq!(three.bytes - two.bytes, two.bytes - one.bytes);
        assert!(two.bytes < 2.0 * one.bytes);
        assert_eq!(one.operations, three.operations);
    }
}
