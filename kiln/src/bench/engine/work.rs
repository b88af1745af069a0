//! How much a model is asked to do, counted from its configuration: what a share of a ceiling is a share of.
//!
//! Bytes are those of every operation reading its inputs and weights and writing its output once, in the number format
//! computed in; norms and activations count as done on the way.

use std::path::Path;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Tokens of a prompt.
const TOKENS: u64 = 77;

/// What one call of a model does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Work {
    /// Floating-point operations of convolutions larger than 1×1; a multiply-add is two.
    pub convolutions: f64,
    /// Of linear layers and 1×1 convolutions.
    pub linear: f64,
    /// Of attention's two products.
    pub attention: f64,
    /// Bytes read and written.
    pub bytes: f64,
    /// Convolutions, linear layers and attentions.
    pub operations: u64,
}

impl Work {
    /// All floating-point operations.
    pub fn flops(&self) -> f64 {
        self.convolutions + self.linear + self.attention
    }
}

/// Counts a model's operations, one after the other.
struct Counter {
    work: Work,
    /// Bytes of a number.
    element: u64,
    rows: u64,
    /// The current feature map's sides.
    side: (u64, u64),
}

impl Counter {
    fn new(element: u64, rows: u64, side: (u64, u64)) -> Self {
        Self { work: Work::default(), element, rows, side }
    }

    fn pixels(&self) -> u64 {
        self.rows * self.side.0 * self.side.1
    }

    fn moved(&mut self, numbers: u64) {
        self.work.bytes += (numbers * self.element) as f64;
        self.work.operations += 1;
    }

    /// Over the current feature map, which is the result's.
    fn convolution(&mut self, inputs: u64, outputs: u64, kernel: u64) {
        self.convolution_from(self.pixels(), inputs, outputs, kernel);
    }

    /// With an input of so many pixels: strides and upsampling change their number.
    fn convolution_from(&mut self, input_pixels: u64, inputs: u64, outputs: u64, kernel: u64) {
        if kernel == 1 {
            return self.linear(self.pixels(), inputs, outputs);
        }
        let weights = inputs * outputs * kernel * kernel;
        self.work.convolutions += 2.0 * (self.pixels() * weights) as f64;
        self.moved(input_pixels * inputs + weights + self.pixels() * outputs);
    }

    fn linear(&mut self, tokens: u64, inputs: u64, outputs: u64) {
        self.work.linear += 2.0 * (tokens * inputs * outputs) as f64;
        self.moved(tokens * inputs + inputs * outputs + tokens * outputs);
    }

    /// Of `queries` and `keys` tokens in a row; `width` over all heads.
    fn attention(&mut self, queries: u64, keys: u64, width: u64) {
        self.work.attention += 4.0 * (self.rows * queries * keys * width) as f64;
        self.moved(self.rows * (2 * queries + 2 * keys) * width);
    }

    fn residual_block(&mut self, inputs: u64, outputs: u64, time: Option<u64>) {
        self.convolution(inputs, outputs, 3);
        if let Some(width) = time {
            self.linear(self.rows, width, outputs);
        }
        self.convolution(outputs, outputs, 3);
        if inputs != outputs {
            self.convolution(inputs, outputs, 1);
        }
    }

    fn transformer(&mut self, channels: u64, context: u64, layers: u64) {
        let (tokens, pixels) = (self.side.0 * self.side.1, self.pixels());
        self.linear(pixels, channels, channels);
        for _ in 0..layers {
            self.attention_layer(channels, channels, tokens);
            self.attention_layer(channels, context, TOKENS);
            self.linear(pixels, channels, 8 * channels);
            // Half of those gate the other half.
            self.linear(pixels, 4 * channels, channels);
        }
        self.linear(pixels, channels, channels);
    }

    /// Projections, products and the way back; keys and values come from `keys` tokens of `context` channels.
    fn attention_layer(&mut self, channels: u64, context: u64, keys: u64) {
        let (tokens, pixels) = (self.side.0 * self.side.1, self.pixels());
        self.linear(pixels, channels, channels);
        self.linear(self.rows * keys, context, channels);
        self.linear(self.rows * keys, context, channels);
        self.attention(tokens, keys, channels);
        self.linear(pixels, channels, channels);
    }

    /// A convolution of stride 2.
    fn downsample(&mut self, channels: u64) {
        let before = self.pixels();
        self.side = (self.side.0.div_ceil(2), self.side.1.div_ceil(2));
        self.convolution_from(before, channels, channels, 3);
    }

    /// To sides twice as long, then a convolution; the longer map need not exist.
    fn upsample(&mut self, channels: u64) {
        let before = self.pixels();
        self.side = (2 * self.side.0, 2 * self.side.1);
        self.convolution_from(before, channels, channels, 3);
    }
}

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
    #[serde(default = "one")]
    transformer_layers_per_block: u64,
}

/// What is read of a `vae/config.json`.
#[derive(Debug, Deserialize)]
struct Vae {
    latent_channels: u64,
    block_out_channels: Vec<u64>,
    layers_per_block: u64,
}

fn one() -> u64 {
    1
}

fn read<T: for<'a> Deserialize<'a>>(file: &Path) -> Result<T> {
    let text = std::fs::read_to_string(file).with_context(|| format!("`{}` cannot be read", file.display()))?;
    let value: Value = serde_json::from_str(&text).with_context(|| format!("`{}` is not JSON", file.display()))?;
    let odd = || format!("the operations of `{}` cannot be counted: it is built in another way", file.display());
    T::deserialize(value).with_context(odd)
}

/// Work of one denoiser call over `rows` latents of `side` (height, width), from a `unet/config.json`.
pub fn unet(config: &Path, rows: u64, side: (u64, u64), element: u64) -> Result<Work> {
    let config: UNet = read(config)?;
    let mut count = Counter::new(element, rows, side);
    let (channels, context) = (&config.block_out_channels, config.cross_attention_dim);
    let (outer, inner) = (channels[0], channels[channels.len() - 1]);
    let time = 4 * outer;
    count.linear(rows, outer, time);
    count.linear(rows, time, time);
    count.convolution(config.in_channels, outer, 3);

    let layers = config.transformer_layers_per_block;
    let (mut now, mut skips) = (outer, vec![outer]);
    for (level, (&wide, kind)) in channels.iter().zip(&config.down_block_types).enumerate() {
        for _ in 0..config.layers_per_block {
            count.residual_block(now, wide, Some(time));
            now = wide;
            if kind.starts_with("CrossAttn") {
                count.transformer(wide, context, layers);
            }
            skips.push(now);
        }
        if level + 1 < channels.len() {
            count.downsample(now);
            skips.push(now);
        }
    }
    count.residual_block(inner, inner, Some(time));
    count.transformer(inner, context, layers);
    count.residual_block(inner, inner, Some(time));
    for (level, (&wide, kind)) in channels.iter().rev().zip(&config.up_block_types).enumerate() {
        for _ in 0..=config.layers_per_block {
            count.residual_block(now + skips.pop().unwrap_or(0), wide, Some(time));
            now = wide;
            if kind.starts_with("CrossAttn") {
                count.transformer(wide, context, layers);
            }
        }
        if level + 1 < channels.len() {
            count.upsample(now);
        }
    }
    count.convolution(outer, config.out_channels, 3);
    Ok(count.work)
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
    use super::*;

    fn config(text: &str) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        file
    }

    /// In units of 10^9, rounded.
    fn giga(number: f64) -> u64 {
        (number / 1e9).round() as u64
    }

    // Both were counted with another tool before: by diffusers' own modules on tensors without data.
    #[test]
    fn a_step_of_stable_diffusion_1_5_is_what_its_modules_do() {
        let file = config(
            r#"{"in_channels": 4, "out_channels": 4, "block_out_channels": [320, 640, 1280, 1280], "layers_per_block": 2,
                "cross_attention_dim": 768,
                "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
                "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"]}"#,
        );
        let work = unet(file.path(), 2, (64, 64), 2).unwrap();
        assert_eq!(giga(work.flops()), 1607, "{work:?}");
        assert_eq!(
            (giga(work.convolutions), giga(work.linear), giga(work.attention)),
            (801, 467 + 87, 252),
            "{work:?}"
        );
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

    #[test]
    fn a_configuration_of_another_kind_is_named() {
        let file = config(r#"{"patch_size": 2}"#);
        let error = format!("{:#}", unet(file.path(), 2, (8, 8), 4).unwrap_err());
        assert!(error.contains(&file.path().display().to_string()) && error.contains("in_channels"), "{error}");
    }
}
