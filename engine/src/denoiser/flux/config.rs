//! What a `transformer/config.json` says.

use serde_json::json;

use super::SIDE;
use crate::Result;
use crate::config::ConfigFile;

/// The transformer's sizes.
pub(crate) struct FluxConfig {
    /// Values of a patch, and as many come out.
    pub in_channels: usize,
    /// Blocks with streams of their own for picture and prompt,
    pub layers: usize,
    /// and blocks with one for both.
    pub single_layers: usize,
    pub heads: usize,
    pub head_width: usize,
    /// Width of the prompt's tokens,
    pub joint_width: usize,
    /// and of the prompt in one vector.
    pub pooled_width: usize,
    /// Whether the transformer is told of the guidance.
    pub guidance_embeds: bool,
    /// Channels of a head for each axis of a place.
    pub axes: Vec<usize>,
}

impl FluxConfig {
    pub fn read(config: &ConfigFile) -> Result<Self> {
        config.only("_class_name", &[json!("FluxTransformer2DModel")])?;
        config.only("patch_size", &[json!(1)])?;
        let in_channels = config.count("in_channels", Some(64))?;
        config.only("out_channels", &[json!(in_channels)])?;
        if !in_channels.is_multiple_of(SIDE * SIDE) {
            return Err(config.refuse("in_channels", format!("a multiple of {}", SIDE * SIDE)));
        }
        let head_width = config.count("attention_head_dim", Some(128))?;
        let axes =
            if config.get("axes_dims_rope").is_some() { config.counts("axes_dims_rope")? } else { vec![16, 56, 56] };
        let fitting = axes.iter().all(|axis| axis.is_multiple_of(2)) && axes.iter().sum::<usize>() == head_width;
        if axes.len() != 3 || !fitting {
            let limit = format!("three even numbers that make `attention_head_dim` ({head_width}) together");
            return Err(config.refuse("axes_dims_rope", limit));
        }
        Ok(Self {
            in_channels,
            layers: config.count("num_layers", Some(19))?,
            single_layers: config.count("num_single_layers", Some(38))?,
            heads: config.count("num_attention_heads", Some(24))?,
            head_width,
            joint_width: config.count("joint_attention_dim", Some(4096))?,
            pooled_width: config.count("pooled_projection_dim", Some(768))?,
            guidance_embeds: config.flag("guidance_embeds", false)?,
            axes,
        })
    }

    /// Width of a token within the transformer.
    pub fn width(&self) -> usize {
        self.heads * self.head_width
    }
}
