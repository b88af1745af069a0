//! How much a model is asked to do, counted from its configuration: what a share of a ceiling is a share of.
//!
//! Bytes are those of every operation reading its inputs and weights and writing its output once, in the number format
//! computed in; norms and activations count as done on the way.

use std::path::Path;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use serde_json::Value;

mod flux;
mod maps;
mod mmdit;
mod tokens;
mod unet;
mod vae;

pub use vae::vae;

/// Rows of a picture that is guided away from a negative prompt.
const GUIDED: u64 = 2;

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
}

fn read<T: for<'a> Deserialize<'a>>(file: &Path) -> Result<T> {
    let text = std::fs::read_to_string(file).with_context(|| format!("`{}` cannot be read", file.display()))?;
    let value: Value = serde_json::from_str(&text).with_context(|| format!("`{}` is not JSON", file.display()))?;
    let odd = || format!("the operations of `{}` cannot be counted: it is built in another way", file.display());
    T::deserialize(value).with_context(odd)
}

/// Work of one guided denoising step of so many pictures, whose latents have this `side` (height, width), by the
/// checkpoint in `folder`.
pub fn denoising_step(folder: &Path, pictures: u64, side: (u64, u64), element: u64) -> Result<Work> {
    #[derive(Deserialize)]
    struct Kind {
        _class_name: String,
    }
    let file = folder.join("unet/config.json");
    if file.exists() {
        return unet::unet(&file, GUIDED * pictures, side, element);
    }
    let file = folder.join("transformer/config.json");
    match read::<Kind>(&file)?._class_name.as_str() {
        "SD3Transformer2DModel" => mmdit::mmdit(&file, GUIDED * pictures, side, element),
        // Guidance is one of its inputs.
        "FluxTransformer2DModel" => flux::flux(&file, pictures, side, element),
        other => bail!("the operations of `{}` cannot be counted: `{other}` is not known", file.display()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// In units of 10^9, rounded.
    pub(super) fn giga(number: f64) -> u64 {
        (number / 1e9).round() as u64
    }

    /// A checkpoint with one denoiser, and so many billions of floating-point operations in a step of one picture. They
    /// were counted with another tool before: torch's counter over diffusers' own modules on tensors without data.
    fn check(part: &str, config: &str, side: (u64, u64), giga: f64) {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join(part)).unwrap();
        std::fs::write(folder.path().join(part).join("config.json"), config).unwrap();
        let work = denoising_step(folder.path(), 1, side, 2).unwrap();
        assert!((work.flops() / 1e9 - giga).abs() < 0.06, "{work:?}");
        let three = denoising_step(folder.path(), 3, side, 2).unwrap();
        assert_eq!(three.flops(), 3.0 * work.flops());
        // Rows share the weights.
        assert!(three.bytes < 3.0 * work.bytes && three.operations == work.operations, "{three:?}");
    }

    #[test]
    fn a_step_is_what_diffusers_modules_do() {
        check(
            "unet",
            r#"{"in_channels": 4, "out_channels": 4, "block_out_channels": [320, 640, 1280, 1280], "layers_per_block": 2,
                "cross_attention_dim": 1024, "sample_size": 96,
                "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
                "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"]}"#,
            (96, 96),
            4298.2,
        );
        check(
            "unet",
            r#"{"in_channels": 4, "out_channels": 4, "block_out_channels": [320, 640, 1280], "layers_per_block": 2,
                "cross_attention_dim": 2048, "transformer_layers_per_block": [1, 2, 10],
                "projection_class_embeddings_input_dim": 2816,
                "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
                "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"]}"#,
            (128, 128),
            13_522.5,
        );
        check(
            "transformer",
            r#"{"_class_name": "SD3Transformer2DModel", "attention_head_dim": 64, "caption_projection_dim": 1536,
                "dual_attention_layers": [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12], "in_channels": 16,
                "joint_attention_dim": 4096, "num_attention_heads": 24, "num_layers": 24, "out_channels": 16,
                "patch_size": 2, "pooled_projection_dim": 2048}"#,
            (128, 128),
            22_499.1,
        );
        check(
            "transformer",
            r#"{"_class_name": "FluxTransformer2DModel", "attention_head_dim": 128, "guidance_embeds": true,
                "in_channels": 64, "joint_attention_dim": 4096, "num_attention_heads": 24, "num_layers": 19,
                "num_single_layers": 38, "out_channels": null, "patch_size": 1, "pooled_projection_dim": 768}"#,
            (128, 128),
            74_384.7,
        );
    }

    #[test]
    fn a_denoiser_of_another_kind_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let refusal = || format!("{:#}", denoising_step(folder.path(), 1, (8, 8), 4).unwrap_err());
        assert!(refusal().contains("transformer/config.json"), "{}", refusal());
        std::fs::create_dir(folder.path().join("transformer")).unwrap();
        let file = folder.path().join("transformer/config.json");
        std::fs::write(&file, r#"{"_class_name": "PixArtTransformer2DModel"}"#).unwrap();
        assert!(refusal().contains(&file.display().to_string()) && refusal().contains("PixArt"), "{}", refusal());
        std::fs::write(&file, r#"{"_class_name": "FluxTransformer2DModel"}"#).unwrap();
        assert!(refusal().contains("attention_head_dim"), "{}", refusal());
        std::fs::create_dir(folder.path().join("unet")).unwrap();
        let file = folder.path().join("unet/config.json");
        std::fs::write(&file, r#"{"patch_size": 2}"#).unwrap();
        assert!(refusal().contains(&file.display().to_string()) && refusal().contains("in_channels"), "{}", refusal());
    }
}
