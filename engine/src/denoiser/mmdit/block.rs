//! A joint block: the picture's tokens and the prompt's attend to all of both, and are otherwise worked on apart.
//!
//! Reference: <https://github.com/huggingface/diffusers/blob/v0.36.0/src/diffusers/models/attention.py>
//! (`JointTransformerBlock`), `attention_processor.py` (`JointAttnProcessor2_0`) and `normalization.py` (`AdaLayerNormZero`,
//! `SD35AdaLayerNormZeroX`, `AdaLayerNormContinuous`).

use super::config::MmditConfig;
use crate::Result;
use crate::ops::{self, Activation, LayerNorm, Linear, Mask, RmsNorm, Tensor};
use crate::weights::Scope;

/// Of all norms here.
pub(super) const EPSILON: f64 = 1e-6;

/// How much wider a token is between the two layers that work on it alone.
const INNER: usize = 4;

/// One of the transformer's layers.
pub(super) struct JointBlock {
    norm: LayerNorm,
    norm1: Linear,
    norm1_context: Linear,
    attn: Attention,
    /// The picture's attention to itself alone, in the layers that have it.
    attn2: Option<Attention>,
    ff: FeedForward,
    /// The last layer has none: what becomes of the prompt there, nobody sees.
    context: Option<ContextEnd>,
    heads: usize,
}

/// What a layer does with the prompt after attention.
struct ContextEnd {
    to_add_out: Linear,
    ff_context: FeedForward,
}

impl JointBlock {
    pub fn load(scope: &Scope<'_>, config: &MmditConfig, index: usize) -> Result<Self> {
        let (width, last) = (config.width(), index + 1 == config.layers);
        let attn = scope.at("attn");
        let dual = config.dual_attention[index];
        let context = if last {
            None
        } else {
            let to_add_out = attn.at("to_add_out").linear(width, width)?;
            Some(ContextEnd { to_add_out, ff_context: FeedForward::load(&scope.at("ff_context"), width)? })
        };
        Ok(Self {
            norm: LayerNorm::plain(width, EPSILON),
            norm1: scope.at("norm1.linear").linear(width, if dual { 9 } else { 6 } * width)?,
            norm1_context: scope.at("norm1_context.linear").linear(width, if last { 2 } else { 6 } * width)?,
            attn: Attention::load(&attn, config, true)?,
            attn2: if dual { Some(Attention::load(&scope.at("attn2"), config, false)?) } else { None },
            ff: FeedForward::load(&scope.at("ff"), width)?,
            context,
            heads: config.heads,
        })
    }

    /// The picture's tokens `x` and the prompt's `context` after the layer; `vector` (rows, width) is what all
    /// layers are told of the timestep and the prompt.
    pub fn forward(&self, x: &Tensor, context: &Tensor, vector: &Tensor) -> Result<(Tensor, Option<Tensor>)> {
        let told = Modulations::of(&self.norm1, vector)?;
        let told_context = Modulations::of(&self.norm1_context, vector)?;
        let normal = self.norm.forward_modulated(x, told.at(1), told.at(0))?;
        let normal_context = match self.context {
            Some(_) => self.norm.forward_modulated(context, told_context.at(1), told_context.at(0))?,
            // Without gates the scale comes first.
            None => self.norm.forward_modulated(context, told_context.at(0), told_context.at(1))?,
        };
        let attended = self.attn.forward(&normal, Some(&normal_context), self.heads)?;
        let (of_picture, of_context) = ops::split_tokens(&attended, x.dims()[1])?;
        let mut picture = self.attn.to_out.forward_gated(&of_picture, told.at(2), x)?;
        if let Some(attn2) = &self.attn2 {
            let normal = self.norm.forward_modulated(x, told.at(7), told.at(6))?;
            let attended = attn2.forward(&normal, None, self.heads)?;
            picture = attn2.to_out.forward_gated(&attended, told.at(8), &picture)?;
        }
        let picture = self.ff.forward(&picture, &self.norm, &told)?;
        let Some(end) = &self.context else { return Ok((picture, None)) };
        let context = end.to_add_out.forward_gated(&of_context, told_context.at(2), context)?;
        Ok((picture, Some(end.ff_context.forward(&context, &self.norm, &told_context)?)))
    }
}

/// What a layer makes of the vector that all are told: shift, scale and gate of attention and of what follows it,
/// and of the second attention.
struct Modulations(Vec<Tensor>);

impl Modulations {
    fn of(layer: &Linear, vector: &Tensor) -> Result<Self> {
        let all = layer.forward(vector)?;
        Ok(Self(ops::split_channels(&all, all.dims()[1] / vector.dims()[1])?))
    }

    fn at(&self, index: usize) -> &Tensor {
        &self.0[index]
    }
}

/// Attention with the projections before it and, of the picture's tokens, after it.
struct Attention {
    of_picture: Projections,
    of_context: Option<Projections>,
    to_out: Linear,
}

impl Attention {
    fn load(scope: &Scope<'_>, config: &MmditConfig, joint: bool) -> Result<Self> {
        let width = config.width();
        let names = ["add_q_proj", "add_k_proj", "add_v_proj", "norm_added_q", "norm_added_k"];
        Ok(Self {
            of_picture: Projections::load(scope, config, ["to_q", "to_k", "to_v", "norm_q", "norm_k"])?,
            of_context: if joint { Some(Projections::load(scope, config, names)?) } else { None },
            to_out: scope.at("to_out.0").linear(width, width)?,
        })
    }

    /// What the picture's tokens see, then what the prompt's do.
    fn forward(&self, x: &Tensor, context: Option<&Tensor>, heads: usize) -> Result<Tensor> {
        let [q, k, v] = self.of_picture.forward(x)?;
        let (Some(projections), Some(context)) = (&self.of_context, context) else {
            return ops::attention(&q, &k, &v, heads, Mask::None);
        };
        let of_context = projections.forward(context)?;
        let [q, k, v] = [(&q, &of_context[0]), (&k, &of_context[1]), (&v, &of_context[2])]
            .map(|(picture, context)| ops::cat_tokens(&[picture, context]));
        ops::attention(&q?, &k?, &v?, heads, Mask::None)
    }
}

/// Tokens as queries, keys and values.
struct Projections {
    q: Linear,
    k: Linear,
    v: Linear,
    /// Of queries and of keys, head by head.
    norms: Option<(RmsNorm, RmsNorm)>,
}

impl Projections {
    fn load(scope: &Scope<'_>, config: &MmditConfig, [q, k, v, norm_q, norm_k]: [&str; 5]) -> Result<Self> {
        let width = config.width();
        let norm = |name: &str| scope.at(name).rms_norm(config.head_width, EPSILON);
        Ok(Self {
            q: scope.at(q).linear(width, width)?,
            k: scope.at(k).linear(width, width)?,
            v: scope.at(v).linear(width, width)?,
            norms: if config.qk_norm { Some((norm(norm_q)?, norm(norm_k)?)) } else { None },
        })
    }

    fn forward(&self, x: &Tensor) -> Result<[Tensor; 3]> {
        let (q, k, v) = (self.q.forward(x)?, self.k.forward(x)?, self.v.forward(x)?);
        match &self.norms {
            Some((norm_q, norm_k)) => Ok([norm_q.forward(&q)?, norm_k.forward(&k)?, v]),
            None => Ok([q, k, v]),
        }
    }
}

/// Two layers that work on each token alone.
struct FeedForward {
    proj: Linear,
    out: Linear,
}

impl FeedForward {
    fn load(scope: &Scope<'_>, width: usize) -> Result<Self> {
        Ok(Self {
            proj: scope.at("net.0.proj").linear_then(width, INNER * width, Activation::GeluTanh)?,
            out: scope.at("net.2").linear(INNER * width, width)?,
        })
    }

    fn forward(&self, x: &Tensor, norm: &LayerNorm, told: &Modulations) -> Result<Tensor> {
        let normal = norm.forward_modulated(x, told.at(4), told.at(3))?;
        self.out.forward_gated(&self.proj.forward(&normal)?, told.at(5), x)
    }
}
