//! CLIP's text encoder.
//!
//! Reference: <https://github.com/huggingface/transformers/blob/v5.0.0/src/transformers/models/clip/modeling_clip.py>

use std::sync::Arc;

use serde_json::json;

use crate::config::ConfigFile;
use crate::ops::{self, Activation, LayerNorm, Linear, Mask, Place, Tensor};
use crate::text::Embedding;
use crate::weights::{Part, Scope};
use crate::{Error, Result};

/// Which states of an encoder a family listens to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum States {
    /// The last layer's, after the final norm.
    Last,
    /// Those before the last layer, as they are.
    Penultimate,
}

/// Whether a family listens to the end token's last state too, which stands for the whole prompt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pooled {
    No,
    /// As it is (`CLIPTextModel`).
    Plain,
    /// After a linear layer (`CLIPTextModelWithProjection`).
    Projected,
}

/// What a family wants of an encoder.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ClipOutput {
    pub states: States,
    pub pooled: Pooled,
}

/// The sizes that a `text_encoder/config.json` gives.
pub(crate) struct ClipConfig {
    pub vocabulary: usize,
    pub positions: usize,
    pub width: usize,
    inner: usize,
    layers: usize,
    heads: usize,
    epsilon: f64,
    activation: Activation,
    /// Marks the token whose state stands for the whole prompt.
    end: u32,
    /// Outputs of that state's projection.
    projection: usize,
}

impl ClipConfig {
    pub fn read(config: &ConfigFile) -> Result<Self> {
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
        let end = config.count("eos_token_id", Some(49_407))?;
        Ok(Self {
            vocabulary: config.count("vocab_size", Some(49_408))?,
            positions: config.count("max_position_embeddings", Some(77))?,
            width,
            inner: config.count("intermediate_size", Some(2048))?,
            layers: config.count("num_hidden_layers", Some(12))?,
            heads,
            epsilon: config.positive("layer_norm_eps", 1e-5)?,
            activation,
            end: u32::try_from(end).map_err(|_| config.refuse("eos_token_id", "a token id"))?,
            projection: config.count("projection_dim", Some(512))?,
        })
    }

    /// Width of the pooled state.
    pub fn pooled_width(&self, pooled: Pooled) -> usize {
        if pooled == Pooled::Projected { self.projection } else { self.width }
    }

    /// Where the token lies whose state stands for the prompt. Old checkpoints write 2 for the end token
    /// and mean the largest id.
    fn end_of(&self, ids: &[u32]) -> usize {
        let end = if self.end == 2 { ids.iter().copied().max().unwrap_or_default() } else { self.end };
        ids.iter().position(|id| *id == end).unwrap_or(0)
    }
}

/// Token ids in, one vector per token out.
pub(crate) struct ClipEncoder {
    pub config: Arc<ClipConfig>,
    output: ClipOutput,
    place: Place,
    /// (vocabulary, width)
    tokens: Tensor,
    /// (positions, width)
    positions: Tensor,
    /// All layers but the last.
    before: Vec<Layer>,
    last: Layer,
    final_layer_norm: LayerNorm,
    text_projection: Option<Linear>,
}

impl ClipEncoder {
    /// Loads a `text_encoder`.
    #[cfg(test)]
    pub fn load(part: impl Into<Part>, output: ClipOutput, place: &Place) -> Result<Self> {
        let part = part.into();
        let config = ClipConfig::read(&part.config()?)?;
        Self::of(&part, &Arc::new(config), output, place)
    }

    /// Reads the weights of a `text_encoder` of these sizes.
    pub fn of(part: &Part, config: &Arc<ClipConfig>, output: ClipOutput, place: &Place) -> Result<Self> {
        let weights = part.weights("model", place)?;
        // transformers 5 writes the encoder's tensors without the prefix that its predecessors had.
        let prefixed = weights.contains("text_model.embeddings.token_embedding.weight");
        let scope = if prefixed { weights.root().at("text_model") } else { weights.root() };
        let embeddings = scope.at("embeddings");
        let tokens = embeddings.at("token_embedding").tensor("weight", &[config.vocabulary, config.width])?;
        let positions = embeddings.at("position_embedding").tensor("weight", &[config.positions, config.width])?;
        let layer = |index: usize| Layer::load(&scope.at("encoder.layers").at(index), config);
        let before = (0..config.layers - 1).map(layer).collect::<Result<_>>()?;
        let last = layer(config.layers - 1)?;
        let final_layer_norm = scope.at("final_layer_norm").layer_norm(config.width, config.epsilon)?;
        let text_projection = if output.pooled == Pooled::Projected {
            Some(weights.root().at("text_projection").linear_without_bias(config.width, config.projection)?)
        } else {
            None
        };
        weights.finish(|name| {
            // A buffer that older files carry, and what only a model that scores pictures uses.
            name.ends_with("embeddings.position_ids") || name == "text_projection.weight" || name == "logit_scale"
        })?;
        let (config, place) = (Arc::clone(config), place.clone());
        Ok(Self { config, output, place, tokens, positions, before, last, final_layer_norm, text_projection })
    }

    /// What the family wants of a prompt's `ids`.
    pub fn forward(&self, ids: &[u32]) -> Result<Embedding> {
        if ids.len() > self.config.positions {
            let (limit, value) = (format!("at most {} tokens", self.config.positions), ids.len());
            return Err(Error::request("prompt", limit, value));
        }
        let mut x = ops::embed(ids, &self.tokens, &self.positions)?;
        let ClipOutput { states, pooled } = self.output;
        for layer in &self.before {
            x = layer.forward(&x)?;
        }
        let last = &self.last;
        match (states, pooled) {
            (States::Penultimate, Pooled::No) => Ok(Embedding { states: x, pooled: None }),
            (States::Penultimate, _) => {
                let last = last.forward(&x)?;
                self.embedding(ids, x, &self.final_layer_norm.forward(&last)?)
            }
            (States::Last, _) => {
                let last = self.final_layer_norm.forward(&last.forward(&x)?)?;
                self.embedding(ids, last.clone(), &last)
            }
        }
    }

    /// `states` with what is pooled of the `last` ones, if the family wants that.
    fn embedding(&self, ids: &[u32], states: Tensor, last: &Tensor) -> Result<Embedding> {
        if self.output.pooled == Pooled::No {
            return Ok(Embedding { states, pooled: None });
        }
        let (start, width) = (self.config.end_of(ids) * self.config.width, self.config.width);
        let pooled = Tensor::new(&last.to_values()?[start..start + width], &[1, width], &self.place)?;
        let pooled = match &self.text_projection {
            Some(project) => project.forward(&pooled)?,
            None => pooled,
        };
        Ok(Embedding { states, pooled: Some(pooled) })
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
    fn load(scope: &Scope<'_>, config: &ClipConfig) -> Result<Self> {
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
