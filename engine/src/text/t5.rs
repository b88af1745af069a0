//! T5's encoder.
//!
//! Reference: Raffel et al. 2020, <https://arxiv.org/abs/1910.10683>;
//! <https://github.com/huggingface/transformers/blob/v5.0.0/src/transformers/models/t5/modeling_t5.py>

use std::sync::Arc;

use serde_json::json;

use crate::config::ConfigFile;
use crate::ops::{self, Activation, Linear, Place, RmsNorm, Tensor};
use crate::weights::{Part, Scope};
use crate::{Error, Result};

/// The sizes that a T5 encoder's `config.json` gives.
pub(crate) struct T5Config {
    pub vocabulary: usize,
    pub width: usize,
    inner: usize,
    layers: usize,
    heads: usize,
    head_width: usize,
    buckets: usize,
    farthest: usize,
    epsilon: f64,
    activation: Activation,
    gated: bool,
}

impl T5Config {
    pub fn read(config: &ConfigFile) -> Result<Self> {
        config.only("model_type", &[json!("t5")])?;
        let (activation, gated) = match config.word("feed_forward_proj")? {
            None | Some("relu") => (Activation::Relu, false),
            Some("gelu") => (Activation::Gelu, false),
            Some("gated-relu") => (Activation::Relu, true),
            // The name means GELU's approximation by tanh, here alone.
            Some("gated-gelu" | "gated-gelu_new") => (Activation::GeluTanh, true),
            Some(_) => {
                return Err(config.refuse("feed_forward_proj", "`gated-gelu`, `gated-relu`, `relu` or `gelu`"));
            }
        };
        let buckets = config.count("relative_attention_num_buckets", Some(32))?;
        if buckets < 4 || buckets % 4 != 0 {
            return Err(config.refuse("relative_attention_num_buckets", "a multiple of 4"));
        }
        let farthest = config.count("relative_attention_max_distance", Some(128))?;
        if farthest <= buckets / 4 {
            let limit = format!("above a quarter of `relative_attention_num_buckets` ({})", buckets / 4);
            return Err(config.refuse("relative_attention_max_distance", limit));
        }
        Ok(Self {
            vocabulary: config.count("vocab_size", Some(32_128))?,
            width: config.count("d_model", Some(512))?,
            inner: config.count("d_ff", Some(2048))?,
            layers: config.count("num_layers", Some(6))?,
            heads: config.count("num_heads", Some(8))?,
            head_width: config.count("d_kv", Some(64))?,
            buckets,
            farthest,
            epsilon: config.positive("layer_norm_epsilon", 1e-6)?,
            activation,
            gated,
        })
    }

    /// The bucket of a key `distance` tokens behind its query: near ones have their own, far ones share, ever
    /// more of them. Computed in f32, as the reference does.
    fn bucket(&self, distance: isize) -> usize {
        let half = self.buckets / 2;
        let (far, near) = (distance.unsigned_abs(), half / 2);
        let start = if distance > 0 { half } else { 0 };
        if far < near {
            return start + far;
        }
        let span = (self.farthest as f64 / near as f64).ln() as f32;
        let steps = (far as f32 / near as f32).ln() / span * (half - near) as f32;
        start + (near + steps as usize).min(half - 1)
    }
}

/// Token ids in, one vector per token out.
pub(crate) struct T5Encoder {
    pub config: Arc<T5Config>,
    place: Place,
    /// (vocabulary, width)
    tokens: Tensor,
    /// (buckets, heads): what is added to a score for the distance of its key.
    relative_attention_bias: Vec<f32>,
    blocks: Vec<Block>,
    final_layer_norm: RmsNorm,
}

impl T5Encoder {
    /// Loads an encoder.
    #[cfg(test)]
    pub fn load(part: impl Into<Part>, place: &Place) -> Result<Self> {
        let part = part.into();
        let config = T5Config::read(&part.config()?)?;
        Self::of(&part, &Arc::new(config), place)
    }

    /// Reads the weights of an encoder of these sizes. States grow beyond what `f16` holds: where that is asked for on a device, they are `bf16` up to
    /// the final norm.
    pub fn of(part: &Part, config: &Arc<T5Config>, place: &Place) -> Result<Self> {
        let weights = part.weights("model", &place.with_wide_range())?;
        let (root, encoder) = (weights.root(), weights.root().at("encoder"));
        let shared = "shared.weight";
        let embedding = if weights.contains(shared) { root.at("shared") } else { encoder.at("embed_tokens") };
        let tokens = embedding.tensor("weight", &[config.vocabulary, config.width])?;
        let bias = encoder.at("block.0.layer.0.SelfAttention.relative_attention_bias");
        let relative_attention_bias = bias.values("weight", &[config.buckets, config.heads])?;
        let block = |index: usize| Block::load(&encoder.at("block").at(index), config);
        let blocks = (0..config.layers).map(block).collect::<Result<_>>()?;
        let final_layer_norm = encoder.at("final_layer_norm").rms_norm(config.width, config.epsilon)?;
        weights.finish(|name| {
            // A second copy of the embedding, and the parts of a whole T5 that no prompt goes through.
            name == "encoder.embed_tokens.weight" || name.starts_with("decoder.") || name == "lm_head.weight"
        })?;
        let (config, place) = (Arc::clone(config), place.clone());
        Ok(Self { config, place, tokens, relative_attention_bias, blocks, final_layer_norm })
    }

    /// (1, ids, width): the last states, after the final norm. Padding is seen like any other token.
    pub fn forward(&self, ids: &[u32]) -> Result<Tensor> {
        if ids.is_empty() {
            return Err(Error::request("prompt", "at least one token", 0));
        }
        let mut x = ops::select(ids, &self.tokens)?;
        let distances = self.distances(ids.len());
        for block in &self.blocks {
            x = block.forward(&x, &distances)?;
        }
        self.final_layer_norm.forward(&x)?.in_format_of(&self.place)
    }

    /// (heads, 2 · tokens - 1): what is added to scores, from the first query and the last key to the last query and
    /// the first key.
    fn distances(&self, tokens: usize) -> Vec<f32> {
        let of_places: Vec<usize> =
            (1..2 * tokens).map(|place| self.config.bucket(tokens as isize - place as isize)).collect();
        let of_head = |head: usize| {
            of_places.iter().map(move |bucket| self.relative_attention_bias[bucket * self.config.heads + head])
        };
        (0..self.config.heads).flat_map(of_head).collect()
    }
}

struct Block {
    attention_norm: RmsNorm,
    q: Linear,
    k: Linear,
    v: Linear,
    o: Linear,
    dense_norm: RmsNorm,
    /// `wi_0` where there is a gate.
    wi: Linear,
    /// Multiplied with what the other one yields.
    wi_1: Option<Linear>,
    wo: Linear,
    heads: usize,
}

impl Block {
    fn load(scope: &Scope<'_>, config: &T5Config) -> Result<Self> {
        let (width, inner, attended) = (config.width, config.inner, config.heads * config.head_width);
        let (attention, dense) = (scope.at("layer.0.SelfAttention"), scope.at("layer.1.DenseReluDense"));
        let wi = dense.at(if config.gated { "wi_0" } else { "wi" });
        let wi_1 = if config.gated { Some(dense.at("wi_1").linear_without_bias(width, inner)?) } else { None };
        Ok(Self {
            attention_norm: scope.at("layer.0.layer_norm").rms_norm(width, config.epsilon)?,
            q: attention.at("q").linear_without_bias(width, attended)?,
            k: attention.at("k").linear_without_bias(width, attended)?,
            v: attention.at("v").linear_without_bias(width, attended)?,
            o: attention.at("o").linear_without_bias(attended, width)?,
            dense_norm: scope.at("layer.1.layer_norm").rms_norm(width, config.epsilon)?,
            wi: wi.linear_without_bias_then(width, inner, config.activation)?,
            wi_1,
            wo: dense.at("wo").linear_without_bias(inner, width)?,
            heads: config.heads,
        })
    }

    fn forward(&self, x: &Tensor, distances: &[f32]) -> Result<Tensor> {
        let normal = self.attention_norm.forward(x)?;
        let (q, k, v) = (self.q.forward(&normal)?, self.k.forward(&normal)?, self.v.forward(&normal)?);
        let x = self.o.forward_add(&ops::relative_attention(&q, &k, &v, self.heads, distances)?, x)?;
        let normal = self.dense_norm.forward(&x)?;
        let mut inner = self.wi.forward(&normal)?;
        if let Some(wi_1) = &self.wi_1 {
            inner = ops::multiply(&inner, &wi_1.forward(&normal)?)?;
        }
        self.wo.forward_add(&inner, &x)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(buckets: usize, farthest: usize) -> T5Config {
        T5Config {
            vocabulary: 8,
            width: 4,
            inner: 8,
            layers: 1,
            heads: 2,
            head_width: 2,
            buckets,
            farthest,
            epsilon: 1e-6,
            activation: Activation::Relu,
            gated: false,
        }
    }

    #[test]
    fn near_keys_have_buckets_of_their_own_and_far_ones_share() {
        let config = config(32, 128);
        for distance in 0..8 {
            assert_eq!(config.bucket(-distance), usize::try_from(distance).unwrap());
            assert_eq!(config.bucket(distance) % 16, usize::try_from(distance).unwrap());
        }
        assert_eq!(
            [8, 11, 12, 15, 16, 22, 23, 32, 64, 90, 91, 128, 511].map(|far| config.bucket(-far)),
            [8, 8, 9, 9, 10, 10, 11, 12, 14, 14, 15, 15, 15]
        );
        assert_eq!((config.bucket(1), config.bucket(500)), (17, 31));
    }

    #[test]
    fn configurations_that_are_no_t5_encoder_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        for (json, named) in [
            (json!({"model_type": "umt5"}), "`model_type` must be \"t5\""),
            (json!({"feed_forward_proj": "gated-silu"}), "`feed_forward_proj` must be `gated-gelu`"),
            (json!({"relative_attention_num_buckets": 30}), "`relative_attention_num_buckets` must be a multiple of 4"),
            (
                json!({"relative_attention_max_distance": 8}),
                "`relative_attention_max_distance` must be above a quarter",
            ),
            (json!({"d_model": 0}), "`d_model`"),
        ] {
            std::fs::write(folder.path().join("config.json"), json.to_string()).unwrap();
            let error = T5Encoder::load(folder.path(), &Place::host()).err().unwrap().to_string();
            assert!(error.contains(named), "{error}");
        }
    }
}
