//! Stable Diffusion 3's original names: `x_block` is the picture's side of a block, `context_block` the
//! text's; queries, keys and values are one tensor, and the last modulations give shift before scale.
//!
//! Reference: <https://github.com/Stability-AI/sd3.5/blob/main/mmditx.py>

use serde_json::{Value, json};

use super::names::{Ours, Share, begins, number, stacked, whole};
use super::tensors::Tensors;
use crate::Result;

/// Where nothing normalises queries and thereby tells their width.
const HEAD_WIDTH: usize = 64;

/// Our names for an original tensor of a transformer with so many blocks.
pub(super) fn ours(name: &str, blocks: usize) -> Ours {
    const ENDS: [(&str, &str); 7] = [
        ("x_embedder.proj.", "pos_embed.proj."),
        ("t_embedder.mlp.0.", "time_text_embed.timestep_embedder.linear_1."),
        ("t_embedder.mlp.2.", "time_text_embed.timestep_embedder.linear_2."),
        ("y_embedder.mlp.0.", "time_text_embed.text_embedder.linear_1."),
        ("y_embedder.mlp.2.", "time_text_embed.text_embedder.linear_2."),
        ("context_embedder.", "context_embedder."),
        ("final_layer.linear.", "proj_out."),
    ];
    if name == "pos_embed" {
        return whole("pos_embed.pos_embed");
    }
    if let Some(of) = name.strip_prefix("final_layer.adaLN_modulation.1.") {
        return vec![(format!("norm_out.linear.{of}"), Share::HalvesSwapped)];
    }
    if let Some(ours) = begins(name, &ENDS) {
        return whole(ours);
    }
    let Some((block, rest)) = name.strip_prefix("joint_blocks.").and_then(number) else { return Vec::new() };
    let at = format!("transformer_blocks.{block}");
    if let Some(rest) = rest.strip_prefix("x_block.") {
        picture(&at, rest)
    } else if let Some(rest) = rest.strip_prefix("context_block.") {
        text(&at, rest, block + 1 == blocks)
    } else {
        Vec::new()
    }
}

fn picture(at: &str, name: &str) -> Ours {
    for attention in ["attn", "attn2"] {
        let Some(rest) = name.strip_prefix(&format!("{attention}.")) else { continue };
        if let Some(of) = rest.strip_prefix("qkv.") {
            return stacked(["to_q", "to_k", "to_v"].map(|ours| format!("{at}.{attention}.{ours}.{of}")));
        }
        let ours = begins(rest, &[("proj.", "to_out.0."), ("ln_q.", "norm_q."), ("ln_k.", "norm_k.")]);
        return ours.map(|ours| whole(format!("{at}.{attention}.{ours}"))).unwrap_or_default();
    }
    const RENAMES: [(&str, &str); 3] =
        [("adaLN_modulation.1.", "norm1.linear."), ("mlp.fc1.", "ff.net.0.proj."), ("mlp.fc2.", "ff.net.2.")];
    begins(name, &RENAMES).map(|ours| whole(format!("{at}.{ours}"))).unwrap_or_default()
}

fn text(at: &str, name: &str, is_last: bool) -> Ours {
    if let Some(of) = name.strip_prefix("attn.qkv.") {
        return stacked(["add_q_proj", "add_k_proj", "add_v_proj"].map(|ours| format!("{at}.attn.{ours}.{of}")));
    }
    if let Some(of) = name.strip_prefix("adaLN_modulation.1.") {
        let share = if is_last { Share::HalvesSwapped } else { Share::Whole };
        return vec![(format!("{at}.norm1_context.linear.{of}"), share)];
    }
    const RENAMES: [(&str, &str); 5] = [
        ("attn.proj.", "attn.to_add_out."),
        ("attn.ln_q.", "attn.norm_added_q."),
        ("attn.ln_k.", "attn.norm_added_k."),
        ("mlp.fc1.", "ff_context.net.0.proj."),
        ("mlp.fc2.", "ff_context.net.2."),
    ];
    begins(name, &RENAMES).map(|ours| whole(format!("{at}.{ours}"))).unwrap_or_default()
}

/// Blocks of the transformer.
pub(super) fn blocks(tensors: &Tensors<'_>) -> usize {
    tensors.count("joint_blocks.")
}

/// What diffusers' `transformer/config.json` would say.
pub(super) fn config(tensors: &Tensors<'_>, sample_size: usize) -> Result<Value> {
    let blocks = blocks(tensors);
    let width = tensors.dim("x_embedder.proj.weight", 0)?;
    let patch = tensors.dim("x_embedder.proj.weight", 2)?;
    let normalises = tensors.has("joint_blocks.0.x_block.attn.ln_q.weight");
    let head =
        if normalises { tensors.dim("joint_blocks.0.x_block.attn.ln_q.weight", 0)? } else { HEAD_WIDTH.min(width) };
    let dual = |block: &usize| tensors.has(&format!("joint_blocks.{block}.x_block.attn2.qkv.weight"));
    Ok(json!({
        "_class_name": "SD3Transformer2DModel",
        "sample_size": sample_size,
        "patch_size": patch,
        "in_channels": tensors.dim("x_embedder.proj.weight", 1)?,
        "out_channels": tensors.dim("final_layer.linear.weight", 0)? / (patch * patch).max(1),
        "num_layers": blocks,
        "attention_head_dim": head,
        "num_attention_heads": width / head.max(1),
        "joint_attention_dim": tensors.dim("context_embedder.weight", 1)?,
        "caption_projection_dim": tensors.dim("context_embedder.weight", 0)?,
        "pooled_projection_dim": tensors.dim("y_embedder.mlp.0.weight", 1)?,
        "pos_embed_max_size": tensors.dim("pos_embed", 1)?.isqrt(),
        "dual_attention_layers": (0..blocks).filter(dual).collect::<Vec<_>>(),
        "qk_norm": normalises.then_some("rms_norm"),
    }))
}
