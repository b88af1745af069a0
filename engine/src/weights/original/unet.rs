//! The U-Net's original names (`input_blocks`, `middle_block`, `output_blocks`), counted through all
//! levels, where ours count within each.
//!
//! Reference: <https://github.com/Stability-AI/generative-models/blob/main/sgm/modules/diffusionmodules/openaimodel.py>

use serde_json::{Value, json};

use super::names::{Ours, begins, number, whole};
use super::tensors::Tensors;
use crate::FamilyKind;
use crate::Result;

/// As all of these U-Nets have it.
const GROUPS: usize = 32;
const HEAD_WIDTH: usize = 64;
const HEADS_OF_SD1: usize = 8;
/// Sinusoids per number of SDXL's micro-conditioning.
const SIZE_WAVES: usize = 256;

/// How many blocks stand at each level.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Shape {
    pub levels: usize,
    /// Residual layers per level on the way down; one more on the way up.
    pub layers: usize,
}

impl Shape {
    pub fn of(tensors: &Tensors<'_>) -> Result<Self> {
        let blocks = tensors.count("input_blocks.");
        let downsamplers: Vec<usize> =
            (0..blocks).filter(|index| tensors.has(&format!("input_blocks.{index}.0.op.weight"))).collect();
        let levels = downsamplers.len() + 1;
        let layers = downsamplers.first().copied().unwrap_or(blocks).saturating_sub(1);
        let even = downsamplers.iter().zip(1..).all(|(index, level)| *index == level * (layers + 1));
        if layers == 0 || blocks != levels * (layers + 1) || !even {
            return Err(tensors.refuse(format!("has {blocks} input blocks in {levels} uneven levels")));
        }
        Ok(Self { levels, layers })
    }

    /// Our names for an original tensor.
    pub fn ours(self, name: &str) -> Ours {
        self.renamed(name).map(whole).unwrap_or_default()
    }

    fn renamed(self, name: &str) -> Option<String> {
        const ENDS: [(&str, &str); 7] = [
            ("time_embed.0.", "time_embedding.linear_1."),
            ("time_embed.2.", "time_embedding.linear_2."),
            ("label_emb.0.0.", "add_embedding.linear_1."),
            ("label_emb.0.2.", "add_embedding.linear_2."),
            ("input_blocks.0.0.", "conv_in."),
            ("out.0.", "conv_norm_out."),
            ("out.2.", "conv_out."),
        ];
        if let Some(ours) = begins(name, &ENDS) {
            return Some(ours);
        }
        if let Some(rest) = name.strip_prefix("middle_block.") {
            let (place, rest) = number(rest)?;
            return match place {
                0 | 2 => Some(format!("mid_block.resnets.{}.{}", place / 2, resnet(rest)?)),
                1 => Some(format!("mid_block.attentions.0.{rest}")),
                _ => None,
            };
        }
        if let Some(rest) = name.strip_prefix("input_blocks.") {
            let (block, rest) = number(rest)?;
            let (level, layer) = self.split(block.checked_sub(1)?)?;
            let (place, rest) = number(rest)?;
            return match (place, rest.strip_prefix("op.")) {
                (0, Some(rest)) => Some(format!("down_blocks.{level}.downsamplers.0.conv.{rest}")),
                (0, None) => Some(format!("down_blocks.{level}.resnets.{layer}.{}", resnet(rest)?)),
                (1, None) => Some(format!("down_blocks.{level}.attentions.{layer}.{rest}")),
                _ => None,
            };
        }
        let (block, rest) = number(name.strip_prefix("output_blocks.")?)?;
        let (level, layer) = self.split(block)?;
        let (place, rest) = number(rest)?;
        // The upsampler follows the attention, or stands in its place.
        match (place, rest.strip_prefix("conv.")) {
            (1 | 2, Some(rest)) => Some(format!("up_blocks.{level}.upsamplers.0.conv.{rest}")),
            (0, None) => Some(format!("up_blocks.{level}.resnets.{layer}.{}", resnet(rest)?)),
            (1, None) => Some(format!("up_blocks.{level}.attentions.{layer}.{rest}")),
            _ => None,
        }
    }

    fn split(self, block: usize) -> Option<(usize, usize)> {
        let (level, layer) = (block / (self.layers + 1), block % (self.layers + 1));
        (level < self.levels).then_some((level, layer))
    }
}

fn resnet(name: &str) -> Option<String> {
    const RENAMES: [(&str, &str); 6] = [
        ("in_layers.0.", "norm1."),
        ("in_layers.2.", "conv1."),
        ("emb_layers.1.", "time_emb_proj."),
        ("out_layers.0.", "norm2."),
        ("out_layers.3.", "conv2."),
        ("skip_connection.", "conv_shortcut."),
    ];
    begins(name, &RENAMES)
}

/// What diffusers' `unet/config.json` would say.
pub(super) fn config(tensors: &Tensors<'_>, family: FamilyKind, sample_size: usize) -> Result<Value> {
    let shape = Shape::of(tensors)?;
    let Shape { levels, layers } = shape;
    let down = |level: usize| format!("input_blocks.{}", 1 + level * (layers + 1));
    let up = |level: usize| format!("output_blocks.{}", (levels - 1 - level) * (layers + 1));
    let depth = |block: &str| tensors.count(&format!("{block}.1.transformer_blocks."));
    let middle = tensors.count("middle_block.1.transformer_blocks.");
    let mut channels = Vec::with_capacity(levels);
    for level in 0..levels {
        channels.push(tensors.dim(&format!("{}.0.out_layers.3.weight", down(level)), 0)?);
    }
    let depths = (0..levels).map(|level| match depth(&down(level)) {
        0 if level + 1 == levels && middle > 0 => middle,
        depth => depth.max(1),
    });
    let heads = |channels: usize| match family {
        FamilyKind::Sd1 | FamilyKind::Sd1Inpaint => HEADS_OF_SD1,
        _ => (channels / HEAD_WIDTH).max(1),
    };
    let kind = |attends: bool, cross: &'static str, plain: &'static str| if attends { cross } else { plain };
    let projection = tensors.find(".1.proj_in.weight").map_or(0, |shape| shape.len());
    let context = tensors.find(".attn2.to_k.weight").and_then(|shape| shape.get(1));
    let mut config = json!({
        "_class_name": "UNet2DConditionModel",
        "sample_size": sample_size,
        "in_channels": tensors.dim("input_blocks.0.0.weight", 1)?,
        "out_channels": tensors.dim("out.2.weight", 0)?,
        "block_out_channels": channels,
        "layers_per_block": layers,
        "transformer_layers_per_block": depths.collect::<Vec<_>>(),
        "down_block_types": (0..levels)
            .map(|level| kind(depth(&down(level)) > 0, "CrossAttnDownBlock2D", "DownBlock2D"))
            .collect::<Vec<_>>(),
        "up_block_types": (0..levels)
            .rev()
            .map(|level| kind(depth(&up(level)) > 0, "CrossAttnUpBlock2D", "UpBlock2D"))
            .collect::<Vec<_>>(),
        "mid_block_type": kind(middle > 0, "UNetMidBlock2DCrossAttn", "UNetMidBlock2D"),
        "attention_head_dim": channels.iter().map(|channels| heads(*channels)).collect::<Vec<_>>(),
        "cross_attention_dim": context,
        "use_linear_projection": projection == 2,
        "norm_num_groups": GROUPS,
    });
    if tensors.has("label_emb.0.0.weight") {
        config["addition_embed_type"] = json!("text_time");
        config["addition_time_embed_dim"] = json!(SIZE_WAVES);
        config["projection_class_embeddings_input_dim"] = json!(tensors.dim("label_emb.0.0.weight", 1)?);
    }
    Ok(config)
}
