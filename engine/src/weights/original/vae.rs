//! The VAE's original names: levels counted from the outermost on both ways, where ours count the
//! decoder's from the innermost.
//!
//! Reference: <https://github.com/CompVis/latent-diffusion/blob/main/ldm/modules/diffusionmodules/model.py>

use serde_json::{Value, json};

use super::names::{Ours, begins, number, whole};
use super::tensors::Tensors;
use crate::{FamilyKind, Result};

/// As all of these VAEs have it.
const GROUPS: usize = 32;

/// Our names for an original tensor of a VAE with so many levels.
pub(super) fn ours(name: &str, levels: usize) -> Ours {
    renamed(name, levels).map(whole).unwrap_or_default()
}

fn renamed(name: &str, levels: usize) -> Option<String> {
    if name.starts_with("quant_conv.") || name.starts_with("post_quant_conv.") {
        return Some(name.to_owned());
    }
    let (half, rest) = name.split_once('.')?;
    let is_encoder = match half {
        "encoder" => true,
        "decoder" => false,
        _ => return None,
    };
    let ours = if let Some(rest) = rest.strip_prefix("down.").filter(|_| is_encoder) {
        let (level, rest) = number(rest)?;
        format!("down_blocks.{level}.{}", block(rest, "downsample.", "downsamplers.0.")?)
    } else if let Some(rest) = rest.strip_prefix("up.").filter(|_| !is_encoder) {
        let (level, rest) = number(rest)?;
        let level = levels.checked_sub(1 + level)?;
        format!("up_blocks.{level}.{}", block(rest, "upsample.", "upsamplers.0.")?)
    } else if let Some(rest) = rest.strip_prefix("mid.") {
        middle(rest)?
    } else {
        begins(rest, &[("conv_in.", "conv_in."), ("norm_out.", "conv_norm_out."), ("conv_out.", "conv_out.")])?
    };
    Some(format!("{half}.{ours}"))
}

fn block(name: &str, old_sampler: &str, sampler: &str) -> Option<String> {
    if let Some(rest) = name.strip_prefix(old_sampler) {
        return Some(format!("{sampler}{rest}"));
    }
    let (layer, rest) = number(name.strip_prefix("block.")?)?;
    Some(format!("resnets.{layer}.{}", resnet(rest)?))
}

fn middle(name: &str) -> Option<String> {
    if let Some(rest) = name.strip_prefix("attn_1.") {
        const RENAMES: [(&str, &str); 5] =
            [("norm.", "group_norm."), ("q.", "to_q."), ("k.", "to_k."), ("v.", "to_v."), ("proj_out.", "to_out.0.")];
        return Some(format!("mid_block.attentions.0.{}", begins(rest, &RENAMES)?));
    }
    let renamed = begins(name, &[("block_1.", "0."), ("block_2.", "1.")])?;
    let (layer, rest) = number(&renamed)?;
    Some(format!("mid_block.resnets.{layer}.{}", resnet(rest)?))
}

fn resnet(name: &str) -> Option<String> {
    let kept = ["norm1.", "conv1.", "norm2.", "conv2."].iter().any(|layer| name.starts_with(layer));
    if kept { Some(name.to_owned()) } else { begins(name, &[("nin_shortcut.", "conv_shortcut.")]) }
}

/// Levels of the decoder.
pub(super) fn levels(tensors: &Tensors<'_>) -> usize {
    tensors.count("decoder.up.")
}

/// What diffusers' `vae/config.json` would say.
pub(super) fn config(tensors: &Tensors<'_>, family: FamilyKind) -> Result<Value> {
    let (levels, facts) = (levels(tensors), family.facts());
    let mut channels = Vec::with_capacity(levels);
    for level in 0..levels {
        channels.push(tensors.dim(&format!("decoder.up.{level}.block.0.conv2.weight"), 0)?);
    }
    Ok(json!({
        "_class_name": "AutoencoderKL",
        "in_channels": 3,
        "out_channels": tensors.dim("decoder.conv_out.weight", 0)?,
        "latent_channels": tensors.dim("decoder.conv_in.weight", 1)?,
        "block_out_channels": channels,
        "layers_per_block": tensors.count("decoder.up.0.block.").saturating_sub(1),
        "down_block_types": vec!["DownEncoderBlock2D"; levels],
        "up_block_types": vec!["UpDecoderBlock2D"; levels],
        "norm_num_groups": GROUPS,
        "scaling_factor": facts.scaling_factor,
        "shift_factor": facts.shift_factor,
        "use_quant_conv": tensors.has("quant_conv.weight"),
        "use_post_quant_conv": tensors.has("post_quant_conv.weight"),
        "mid_block_add_attention": tensors.has("decoder.mid.attn_1.q.weight"),
    }))
}
