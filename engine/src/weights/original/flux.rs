//! FLUX.1's original names: blocks of two streams, then blocks of one, whose first layer holds queries,
//! keys, values and the inner layer in one tensor; the last modulation gives shift before scale.
//!
//! Reference: <https://github.com/black-forest-labs/flux/blob/main/src/flux/model.py>

use serde_json::{Value, json};

use super::names::{Ours, Share, begins, number, stacked, whole};
use super::tensors::Tensors;
use crate::Result;

/// Our names for an original tensor.
pub(super) fn ours(name: &str) -> Ours {
    const ENDS: [(&str, &str); 9] = [
        ("time_in.in_layer.", "time_text_embed.timestep_embedder.linear_1."),
        ("time_in.out_layer.", "time_text_embed.timestep_embedder.linear_2."),
        ("vector_in.in_layer.", "time_text_embed.text_embedder.linear_1."),
        ("vector_in.out_layer.", "time_text_embed.text_embedder.linear_2."),
        ("guidance_in.in_layer.", "time_text_embed.guidance_embedder.linear_1."),
        ("guidance_in.out_layer.", "time_text_embed.guidance_embedder.linear_2."),
        ("txt_in.", "context_embedder."),
        ("img_in.", "x_embedder."),
        ("final_layer.linear.", "proj_out."),
    ];
    if let Some(of) = name.strip_prefix("final_layer.adaLN_modulation.1.") {
        return vec![(format!("norm_out.linear.{of}"), Share::HalvesSwapped)];
    }
    if let Some(ours) = begins(name, &ENDS) {
        return whole(ours);
    }
    if let Some((block, rest)) = name.strip_prefix("double_blocks.").and_then(number) {
        return double(&format!("transformer_blocks.{block}"), rest);
    }
    let single = name.strip_prefix("single_blocks.").and_then(number);
    single.map(|(block, rest)| self::single(&format!("single_transformer_blocks.{block}"), rest)).unwrap_or_default()
}

fn double(at: &str, name: &str) -> Ours {
    if let Some(of) = name.strip_prefix("img_attn.qkv.") {
        return stacked(["to_q", "to_k", "to_v"].map(|ours| format!("{at}.attn.{ours}.{of}")));
    }
    if let Some(of) = name.strip_prefix("txt_attn.qkv.") {
        return stacked(["add_q_proj", "add_k_proj", "add_v_proj"].map(|ours| format!("{at}.attn.{ours}.{of}")));
    }
    const RENAMES: [(&str, &str); 12] = [
        ("img_mod.lin.", "norm1.linear."),
        ("txt_mod.lin.", "norm1_context.linear."),
        ("img_attn.norm.query_norm.scale", "attn.norm_q.weight"),
        ("img_attn.norm.key_norm.scale", "attn.norm_k.weight"),
        ("txt_attn.norm.query_norm.scale", "attn.norm_added_q.weight"),
        ("txt_attn.norm.key_norm.scale", "attn.norm_added_k.weight"),
        ("img_attn.proj.", "attn.to_out.0."),
        ("txt_attn.proj.", "attn.to_add_out."),
        ("img_mlp.0.", "ff.net.0.proj."),
        ("img_mlp.2.", "ff.net.2."),
        ("txt_mlp.0.", "ff_context.net.0.proj."),
        ("txt_mlp.2.", "ff_context.net.2."),
    ];
    begins(name, &RENAMES).map(|ours| whole(format!("{at}.{ours}"))).unwrap_or_default()
}

fn single(at: &str, name: &str) -> Ours {
    if let Some(of) = name.strip_prefix("linear1.") {
        // The inner layer is four times as wide as the others.
        let rows = |ours: &str, from, to| (format!("{at}.{ours}.{of}"), Share::Rows { from, to, of: 7 });
        return vec![rows("attn.to_q", 0, 1), rows("attn.to_k", 1, 2), rows("attn.to_v", 2, 3), rows("proj_mlp", 3, 7)];
    }
    const RENAMES: [(&str, &str); 4] = [
        ("modulation.lin.", "norm.linear."),
        ("norm.query_norm.scale", "attn.norm_q.weight"),
        ("norm.key_norm.scale", "attn.norm_k.weight"),
        ("linear2.", "proj_out."),
    ];
    begins(name, &RENAMES).map(|ours| whole(format!("{at}.{ours}"))).unwrap_or_default()
}

/// What diffusers' `transformer/config.json` would say.
pub(super) fn config(tensors: &Tensors<'_>) -> Result<Value> {
    let width = tensors.dim("img_in.weight", 0)?;
    let head = tensors.dim("double_blocks.0.img_attn.norm.query_norm.scale", 0)?;
    // An eighth of a head turns with the index, the rest with height and width: 16, 56 and 56 of 128.
    let (index, side) = (head / 8, head * 7 / 16);
    Ok(json!({
        "_class_name": "FluxTransformer2DModel",
        "patch_size": 1,
        "in_channels": tensors.dim("img_in.weight", 1)?,
        "num_layers": tensors.count("double_blocks."),
        "num_single_layers": tensors.count("single_blocks."),
        "attention_head_dim": head,
        "num_attention_heads": width / head.max(1),
        "joint_attention_dim": tensors.dim("txt_in.weight", 1)?,
        "pooled_projection_dim": tensors.dim("vector_in.in_layer.weight", 1)?,
        "guidance_embeds": tensors.has("guidance_in.in_layer.weight"),
        "axes_dims_rope": [index, side, side],
    }))
}
