//! The text encoders: CLIP and T5 as transformers names them, T5 as llama.cpp does, and OpenCLIP's own names,
//! with queries, keys and values in one tensor and a projection that is multiplied from the other side.
//!
//! Reference: <https://github.com/mlfoundations/open_clip/blob/main/src/open_clip/transformer.py>;
//! <https://github.com/ggml-org/llama.cpp/blob/master/gguf-py/gguf/tensor_mapping.py>

use serde_json::{Value, json};

use super::names::{Ours, Share, begins, number, stacked, whole};
use super::tensors::Tensors;
use crate::Result;

/// As all of these encoders have it.
const HEAD_WIDTH: usize = 64;
/// The last of CLIP's 49408 tokens, which ends a prompt.
const END_TOKEN: usize = 49_407;
const T5_DISTANCE: usize = 128;

/// Our names for a tensor of OpenCLIP's text tower, of which `layers` are used.
pub(super) fn ours_of_open_clip(name: &str, layers: usize) -> Ours {
    match name {
        "positional_embedding" => return whole("text_model.embeddings.position_embedding.weight"),
        "text_projection" => return vec![("text_projection.weight".to_owned(), Share::Transposed)],
        _ => {}
    }
    const ENDS: [(&str, &str); 2] =
        [("token_embedding.", "text_model.embeddings.token_embedding."), ("ln_final.", "text_model.final_layer_norm.")];
    if let Some(ours) = begins(name, &ENDS) {
        return whole(ours);
    }
    let Some((layer, rest)) = name.strip_prefix("transformer.resblocks.").and_then(number) else { return Vec::new() };
    if layer >= layers {
        return Vec::new();
    }
    let at = format!("text_model.encoder.layers.{layer}");
    if let Some(of) = rest.strip_prefix("attn.in_proj_") {
        return stacked(["q_proj", "k_proj", "v_proj"].map(|ours| format!("{at}.self_attn.{ours}.{of}")));
    }
    const RENAMES: [(&str, &str); 5] = [
        ("ln_1.", "layer_norm1."),
        ("ln_2.", "layer_norm2."),
        ("attn.out_proj.", "self_attn.out_proj."),
        ("mlp.c_fc.", "mlp.fc1."),
        ("mlp.c_proj.", "mlp.fc2."),
    ];
    begins(rest, &RENAMES).map(|ours| whole(format!("{at}.{ours}"))).unwrap_or_default()
}

/// What transformers' `config.json` would say of OpenCLIP's text tower.
pub(super) fn config_of_open_clip(tensors: &Tensors<'_>, layers: usize) -> Result<Value> {
    let width = tensors.dim("ln_final.weight", 0)?;
    let projected = tensors.dim("text_projection", 1).unwrap_or(width);
    Ok(clip(ClipSizes {
        vocabulary: tensors.dim("token_embedding.weight", 0)?,
        positions: tensors.dim("positional_embedding", 0)?,
        inner: tensors.dim("transformer.resblocks.0.mlp.c_fc.weight", 0)?,
        activation: "gelu",
        width,
        layers,
        projected,
    }))
}

/// What transformers' `config.json` would say of a CLIP text encoder in its own names.
pub(super) fn config_of_clip(tensors: &Tensors<'_>, activation: &'static str) -> Result<Value> {
    let model = if tensors.has("text_model.final_layer_norm.weight") { "text_model." } else { "" };
    let embeddings = format!("{model}embeddings");
    let width = tensors.dim(&format!("{model}final_layer_norm.weight"), 0)?;
    Ok(clip(ClipSizes {
        vocabulary: tensors.dim(&format!("{embeddings}.token_embedding.weight"), 0)?,
        positions: tensors.dim(&format!("{embeddings}.position_embedding.weight"), 0)?,
        inner: tensors.dim(&format!("{model}encoder.layers.0.mlp.fc1.weight"), 0)?,
        layers: tensors.count(&format!("{model}encoder.layers.")),
        projected: tensors.dim("text_projection.weight", 0).unwrap_or(width),
        width,
        activation,
    }))
}

struct ClipSizes {
    vocabulary: usize,
    positions: usize,
    width: usize,
    inner: usize,
    layers: usize,
    projected: usize,
    activation: &'static str,
}

fn clip(sizes: ClipSizes) -> Value {
    json!({
        "model_type": "clip_text_model",
        "vocab_size": sizes.vocabulary,
        "max_position_embeddings": sizes.positions,
        "hidden_size": sizes.width,
        "intermediate_size": sizes.inner,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": (sizes.width / HEAD_WIDTH).max(1),
        "hidden_act": sizes.activation,
        "projection_dim": sizes.projected,
        "layer_norm_eps": 1e-5,
        "eos_token_id": END_TOKEN,
    })
}

/// What transformers' `config.json` would say of a T5 encoder in its own names.
pub(super) fn config_of_t5(tensors: &Tensors<'_>) -> Result<Value> {
    let bias = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight";
    let heads = tensors.dim(bias, 1)?;
    let inner = tensors.dim("encoder.block.0.layer.0.SelfAttention.q.weight", 0)?;
    Ok(json!({
        "model_type": "t5",
        "vocab_size": tensors.dim("shared.weight", 0)?,
        "d_model": tensors.dim("shared.weight", 1)?,
        "d_kv": inner / heads.max(1),
        "d_ff": tensors.dim("encoder.block.0.layer.1.DenseReluDense.wi_0.weight", 0)?,
        "num_layers": tensors.count("encoder.block."),
        "num_heads": heads,
        "relative_attention_num_buckets": tensors.dim(bias, 0)?,
        "relative_attention_max_distance": T5_DISTANCE,
        "feed_forward_proj": "gated-gelu",
        "layer_norm_epsilon": 1e-6,
    }))
}

/// Whether a T5 encoder in llama.cpp's names has two inner layers that are multiplied.
pub(super) fn is_gated(tensors: &Tensors<'_>) -> bool {
    tensors.has("enc.blk.0.ffn_gate.weight")
}

/// Our names for a tensor of a T5 encoder in llama.cpp's names.
pub(super) fn ours_of_llama_t5(name: &str, gated: bool) -> Ours {
    match name {
        "token_embd.weight" => return whole("shared.weight"),
        "enc.output_norm.weight" => return whole("encoder.final_layer_norm.weight"),
        _ => {}
    }
    let Some((block, rest)) = name.strip_prefix("enc.blk.").and_then(number) else { return Vec::new() };
    const RENAMES: [(&str, &str); 9] = [
        ("attn_norm.", "0.layer_norm."),
        ("attn_q.", "0.SelfAttention.q."),
        ("attn_k.", "0.SelfAttention.k."),
        ("attn_v.", "0.SelfAttention.v."),
        ("attn_o.", "0.SelfAttention.o."),
        ("attn_rel_b.", "0.SelfAttention.relative_attention_bias."),
        ("ffn_norm.", "1.layer_norm."),
        ("ffn_gate.", "1.DenseReluDense.wi_0."),
        ("ffn_down.", "1.DenseReluDense.wo."),
    ];
    let up = if gated { "1.DenseReluDense.wi_1." } else { "1.DenseReluDense.wi." };
    let ours = begins(rest, &RENAMES).or_else(|| begins(rest, &[("ffn_up.", up)]));
    ours.map(|ours| whole(format!("encoder.block.{block}.layer.{ours}"))).unwrap_or_default()
}

/// What transformers' `config.json` would say of a T5 encoder in llama.cpp's names.
pub(super) fn config_of_llama_t5(tensors: &Tensors<'_>) -> Result<Value> {
    let bias = "enc.blk.0.attn_rel_b.weight";
    let heads = tensors.dim(bias, 1)?;
    Ok(json!({
        "model_type": "t5",
        "vocab_size": tensors.dim("token_embd.weight", 0)?,
        "d_model": tensors.dim("token_embd.weight", 1)?,
        "d_kv": tensors.dim("enc.blk.0.attn_q.weight", 0)? / heads.max(1),
        "d_ff": tensors.dim("enc.blk.0.ffn_up.weight", 0)?,
        "num_layers": tensors.count("enc.blk."),
        "num_heads": heads,
        "relative_attention_num_buckets": tensors.dim(bias, 0)?,
        "relative_attention_max_distance": T5_DISTANCE,
        "feed_forward_proj": if is_gated(tensors) { "gated-gelu" } else { "relu" },
        "layer_norm_epsilon": 1e-6,
    }))
}
