//! The transformer's blocks: first picture and prompt each with weights of their own that only meet in the
//! attention, then both as one.

use super::config::FluxConfig;
use crate::Result;
use crate::ops::{self, Activation, LayerNorm, Linear, Mask, RmsNorm, Rotation, Tensor};
use crate::weights::Scope;

const EPSILON: f64 = 1e-6;

/// What all blocks listen to.
#[derive(Clone, Copy)]
pub(super) struct Conditions<'a> {
    /// (rows, width): time, guidance and pooled prompt after their SiLU.
    pub time: &'a Tensor,
    /// Of the prompt's tokens, then the picture's.
    pub rotation: &'a Rotation,
}

/// Queries, keys and values, the first two normalised head by head.
struct Projections {
    to_q: Linear,
    to_k: Linear,
    to_v: Linear,
    norm_q: RmsNorm,
    norm_k: RmsNorm,
}

impl Projections {
    fn load(scope: &Scope<'_>, names: [&str; 5], config: &FluxConfig) -> Result<Self> {
        let linear = |name: &str| scope.at(name).linear(config.width(), config.width());
        let norm = |name: &str| scope.at(name).rms_norm(config.head_width, EPSILON);
        let [q, k, v, norm_q, norm_k] = names;
        Ok(Self { to_q: linear(q)?, to_k: linear(k)?, to_v: linear(v)?, norm_q: norm(norm_q)?, norm_k: norm(norm_k)? })
    }

    fn forward(&self, x: &Tensor) -> Result<[Tensor; 3]> {
        let (q, k) = (self.norm_q.forward(&self.to_q.forward(x)?)?, self.norm_k.forward(&self.to_k.forward(x)?)?);
        Ok([q, k, self.to_v.forward(x)?])
    }
}

fn attend([q, k, v]: [&Tensor; 3], rotation: &Rotation, heads: usize) -> Result<Tensor> {
    ops::attention(&rotation.forward(q)?, &rotation.forward(k)?, v, heads, Mask::None)
}

/// A block of two streams.
pub(super) struct DoubleBlock {
    picture: Stream,
    prompt: Stream,
    heads: usize,
}

impl DoubleBlock {
    pub fn load(scope: &Scope<'_>, config: &FluxConfig) -> Result<Self> {
        let picture = Names {
            norm: "norm1",
            projections: ["to_q", "to_k", "to_v", "norm_q", "norm_k"],
            out: "to_out.0",
            feed_forward: "ff",
        };
        let prompt = Names {
            norm: "norm1_context",
            projections: ["add_q_proj", "add_k_proj", "add_v_proj", "norm_added_q", "norm_added_k"],
            out: "to_add_out",
            feed_forward: "ff_context",
        };
        Ok(Self {
            picture: Stream::load(scope, picture, config)?,
            prompt: Stream::load(scope, prompt, config)?,
            heads: config.heads,
        })
    }

    /// Picture and prompt, each (rows, tokens, width).
    pub fn forward(&self, picture: &Tensor, prompt: &Tensor, conditions: Conditions<'_>) -> Result<(Tensor, Tensor)> {
        let (of_picture, of_prompt) =
            (self.picture.modulation(conditions.time)?, self.prompt.modulation(conditions.time)?);
        let seen = self.picture.project(picture, &of_picture)?;
        let read = self.prompt.project(prompt, &of_prompt)?;
        let joined = [0, 1, 2].map(|part| ops::cat_tokens(&[&read[part], &seen[part]]));
        let [q, k, v] = joined;
        let attended = attend([&q?, &k?, &v?], conditions.rotation, self.heads)?;
        let (read, seen) = ops::split_tokens(&attended, prompt.dims()[1])?;
        Ok((self.picture.finish(picture, &seen, &of_picture)?, self.prompt.finish(prompt, &read, &of_prompt)?))
    }
}

/// What a stream's tensors are called.
struct Names<'a> {
    norm: &'a str,
    projections: [&'a str; 5],
    out: &'a str,
    feed_forward: &'a str,
}

/// One of a block's streams.
struct Stream {
    /// To six vectors per row: shift, scale and gate of the attention and of the layers after it.
    modulation: Linear,
    norm: LayerNorm,
    projections: Projections,
    out: Linear,
    ff_in: Linear,
    ff_out: Linear,
}

impl Stream {
    fn load(scope: &Scope<'_>, names: Names<'_>, config: &FluxConfig) -> Result<Self> {
        let (width, attention) = (config.width(), scope.at("attn"));
        let feed_forward = scope.at(names.feed_forward).at("net");
        Ok(Self {
            modulation: scope.at(names.norm).at("linear").linear(width, 6 * width)?,
            norm: LayerNorm::plain(width, EPSILON),
            projections: Projections::load(&attention, names.projections, config)?,
            out: attention.at(names.out).linear(width, width)?,
            ff_in: feed_forward.at("0.proj").linear_then(width, 4 * width, Activation::GeluTanh)?,
            ff_out: feed_forward.at(2).linear(4 * width, width)?,
        })
    }

    fn modulation(&self, time: &Tensor) -> Result<Vec<Tensor>> {
        ops::split_channels(&self.modulation.forward(time)?, 6)
    }

    fn project(&self, x: &Tensor, modulation: &[Tensor]) -> Result<[Tensor; 3]> {
        let (shift, scale) = (&modulation[0], &modulation[1]);
        self.projections.forward(&self.norm.forward_modulated(x, scale, shift)?)
    }

    fn finish(&self, x: &Tensor, attended: &Tensor, modulation: &[Tensor]) -> Result<Tensor> {
        let (gate, shift, scale, ff_gate) = (&modulation[2], &modulation[3], &modulation[4], &modulation[5]);
        let x = self.out.forward_gated(attended, gate, x)?;
        let normal = self.norm.forward_modulated(&x, scale, shift)?;
        self.ff_out.forward_gated(&self.ff_in.forward(&normal)?, ff_gate, &x)
    }
}

/// A block of one stream, whose attention and other layers work side by side.
pub(super) struct SingleBlock {
    /// To three vectors per row: shift, scale and gate.
    modulation: Linear,
    norm: LayerNorm,
    projections: Projections,
    proj_mlp: Linear,
    proj_out: Linear,
    heads: usize,
}

impl SingleBlock {
    pub fn load(scope: &Scope<'_>, config: &FluxConfig) -> Result<Self> {
        let (width, names) = (config.width(), ["to_q", "to_k", "to_v", "norm_q", "norm_k"]);
        Ok(Self {
            modulation: scope.at("norm.linear").linear(width, 3 * width)?,
            norm: LayerNorm::plain(width, EPSILON),
            projections: Projections::load(&scope.at("attn"), names, config)?,
            proj_mlp: scope.at("proj_mlp").linear_then(width, 4 * width, Activation::GeluTanh)?,
            proj_out: scope.at("proj_out").linear(5 * width, width)?,
            heads: config.heads,
        })
    }

    /// Prompt and picture, (rows, tokens, width).
    pub fn forward(&self, x: &Tensor, conditions: Conditions<'_>) -> Result<Tensor> {
        let modulation = ops::split_channels(&self.modulation.forward(conditions.time)?, 3)?;
        let (shift, scale, gate) = (&modulation[0], &modulation[1], &modulation[2]);
        let normal = self.norm.forward_modulated(x, scale, shift)?;
        let [q, k, v] = self.projections.forward(&normal)?;
        let attended = attend([&q, &k, &v], conditions.rotation, self.heads)?;
        let inner = self.proj_mlp.forward(&normal)?;
        self.proj_out.forward_gated(&ops::concat_channels(&attended, &inner)?, gate, x)
    }
}
