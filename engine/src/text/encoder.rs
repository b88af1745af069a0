//! CLIP's text encoder.
//!
//! Reference: <https://github.com/huggingface/transformers/blob/v5.0.0/src/transformers/models/clip/modeling_clip.py>

use std::path::Path;

use serde_json::json;

use crate::config::ConfigFile;
use crate::ops::{self, Activation, LayerNorm, Linear, Mask, Place, Tensor};
use crate::weights::{Scope, Weights};
use crate::{Error, Result};

/// The sizes that a `text_encoder/config.json` gives.
pub(crate) struct TextConfig {
    pub vocabulary: usize,
    pub positions: usize,
    pub width: usize,
    inner: usize,
    layers: usize,
    heads: usize,
    epsilon: f64,
    activation: Activation,
}

impl TextConfig {
    fn read(config: &ConfigFile) -> Result<Self> {
        config.only("use_attention_mask", &[json!(false)])?;
        config.only("model_type", &[json!("clip_text_model"), json!("clip")])?;
        let activation = match config.word("hidden_act")? {
            None | Some("quick_gelu") => Activation::QuickGelu,
            Some("gelu") => Activation::Gelu,
            Some(_) => return Err(config.refuse("hidden_act", "`quick_gelu` or `gelu`")),
        };
        let (width, heads) = (config.count("hidden_size", Some(512))?, config.count("num_attention_heads", Some(8))?);
        if width % heads != 0 {
            return Err(config.refuse("num_attention_heads", format!("a divisor of `hidden_size` ({width})")));
        }
        Ok(Self {
            vocabulary: config.count("vocab_size", Some(49_408))?,
            positions: config.count("max_position_embeddings", Some(77))?,
            width,
            inner: config.count("intermediate_size", Some(2048))?,
            layers: config.count("num_hidden_layers", Some(12))?,
            heads,
            epsilon: config.positive("layer_norm_eps", 1e-5)?,
            activation,
        })
    }
}

/// Token ids in, one vector per token out.
pub(crate) struct TextEncoder {
    pub config: TextConfig,
    /// (vocabulary, width)
    tokens: Tensor,
    /// (positions, width)
    positions: Tensor,
    layers: Vec<Layer>,
    final_layer_norm: LayerNorm,
}

impl TextEncoder {
    /// Loads a `text_encoder` folder.
    pub fn load(folder: &Path, place: &Place) -> Result<Self> {
        let config = TextConfig::read(&ConfigFile::read(&folder.join("config.json"))?)?;
        let weights = Weights::open(folder, "model", place)?;
        // transformers 5 writes the encoder's tensors without the prefix that its predecessors had.
        let prefixed = weights.contains("text_model.embeddings.token_embedding.weight");
        let scope = if prefixed { weights.root().at("text_model") } else { weights.root() };
        let embeddings = scope.at("embeddings");
        let tokens = embeddings.at("token_embedding").tensor("weight", &[config.vocabulary, config.width])?;
        let positions = embeddings.at("position_embedding").tensor("weight", &[config.positions, config.width])?;
        let layers = (0..config.layers).map(|index| Layer::load(&scope.at("encoder.layers").at(index), &config));
        let layers = layers.collect::<Result<_>>()?;
        let final_layer_norm = scope.at("final_layer_norm").layer_norm(config.width, config.epsilon)?;
        weights.finish(|name| {
            // A buffer that older files carry, and what only a model that scores pictures uses.
            name.ends_with("embeddings.position_ids") || name == "text_projection.weight" || name == "logit_scale"
        })?;
        Ok(Self { config, tokens, positions, layers, final_layer_norm })
    }

    /// (1, ids, width): the last layer's states, after the final norm.
    pub fn forward(&self, ids: &[u32]) -> Result<Tensor> {
        if ids.len() > self.config.positions {
            let (limit, value) = (format!("at most {} tokens", self.config.positions), ids.len());
            return Err(Error::request("prompt", limit, value));
        }
        let mut x = ops::embed(ids, &self.tokens, &self.positions)?;
        for layer in &self.layers {
            x = layer.forward(&x)?;
        }
        self.final_layer_norm.forward(&x)
    }
}

struct Layer {
    layer_norm1: LayerNorm,
    q_proj: Linear,
    k_proj: Linear,
    v_proj: Linear,
    out_proj: Linear,
    layer_norm2: LayerNorm,
    fc1: Linear,
    fc2: Linear,
    heads: usize,
}

impl Layer {
    fn load(scope: &Scope<'_>, config: &TextConfig) -> Result<Self> {
        let (width, inner) = (config.width, config.inner);
        let (attention, mlp) = (scope.at("self_attn"), scope.at("mlp"));
        Ok(Self {
            layer_norm1: scope.at("layer_norm1").layer_norm(width, config.epsilon)?,
            q_proj: attention.at("q_proj").linear(width, width)?,
            k_proj: attention.at("k_proj").linear(width, width)?,
            v_proj: attention.at("v_proj").linear(width, width)?,
            out_proj: attention.at("out_proj").linear(width, width)?,
            layer_norm2: scope.at("layer_norm2").layer_norm(width, config.epsilon)?,
            fc1: mlp.at("fc1").linear_then(width, inner, config.activation)?,
            fc2: mlp.at("fc2").linear(inner, width)?,
            heads: config.heads,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let normal = self.layer_norm1.forward(x)?;
        let (q, k, v) = (self.q_proj.forward(&normal)?, self.k_proj.forward(&normal)?, self.v_proj.forward(&normal)?);
        let x = self.out_proj.forward_add(&ops::attention(&q, &k, &v, self.heads, Mask::Causal)?, x)?;
        let inner = self.fc1.forward(&self.layer_norm2.forward(&x)?)?;
        self.fc2.forward_add(&inner, &x)
    }
}
