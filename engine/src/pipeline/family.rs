//! What families of checkpoints do each in its own way: load their networks, make conditioning of
//! prompts, and call the denoiser. Everything else is the same for all of them.

use std::sync::Arc;

use crate::config::ConfigFile;
use crate::guidance::{guide, is_guided, push};
use crate::ops::{Place, Tensor};
use crate::sampler::Flow;
use crate::source::Source;
use crate::text::{EmbeddingCache, TextEncoder};
use crate::vae::VaeConfig;
use crate::{Error, Result, RowRequest};

/// What one denoiser pass of a row listens to.
#[derive(Clone)]
pub(super) struct Conditioning {
    /// (1, tokens, width): the prompt.
    pub tokens: Tensor,
    /// (1, width): the prompt in one vector, where the family has such.
    pub pooled: Option<Tensor>,
    /// Numbers that the row's denoiser is told beside the timestep; equally many in all rows of a family.
    pub numbers: Arc<[f32]>,
}

/// What a row's passes of one step listen to, and how one output is made of theirs.
pub(super) struct Conditions {
    pub positive: Conditioning,
    /// Present with guidance.
    pub negative: Option<Conditioning>,
    pub guidance_scale: f64,
    /// Guidance away from what the denoiser predicts without some of its layers.
    pub skipping: Option<Skipping>,
}

/// What skip-layer guidance does with a row; only with guidance by a negative prompt.
pub(super) struct Skipping {
    layers: Arc<[usize]>,
    scale: f64,
    /// The calls between these two, both excluded, have it.
    between: (f64, f64),
}

impl Skipping {
    /// What the request asks for.
    pub fn of(request: &RowRequest) -> Option<Self> {
        let asked = request.skip_layer_guidance.as_ref().filter(|_| is_guided(request.guidance_scale))?;
        let steps = request.steps as f64;
        let (layers, between) = (asked.layers.as_slice().into(), (steps * asked.start, steps * asked.stop));
        Some(Self { layers, scale: asked.scale, between })
    }

    fn has(&self, call: usize) -> bool {
        (call as f64) > self.between.0 && (call as f64) < self.between.1
    }
}

/// One pass of a row.
pub(super) struct Pass<'a> {
    pub conditioning: &'a Conditioning,
    /// Layers that it leaves out.
    pub skipped: Arc<[usize]>,
}

impl Conditions {
    /// The row's passes of its denoiser call `call`.
    pub fn passes(&self, call: usize) -> impl Iterator<Item = Pass<'_>> {
        let whole = self.negative.iter().chain([&self.positive]);
        let whole = whole.map(|conditioning| Pass { conditioning, skipped: [].into() });
        let skipping = self.skipping.as_ref().filter(|skipping| skipping.has(call));
        whole.chain(
            skipping.map(|skipping| Pass { conditioning: &self.positive, skipped: Arc::clone(&skipping.layers) }),
        )
    }

    /// One output of those passes', which come in their order.
    pub fn combine(&self, call: usize, mut outputs: impl Iterator<Item = Vec<f32>>) -> Vec<f32> {
        let mut next = || outputs.next().unwrap_or_default();
        if self.negative.is_none() {
            return next();
        }
        let (negative, positive) = (next(), next());
        let guided = guide(&negative, &positive, self.guidance_scale);
        match self.skipping.as_ref().filter(|skipping| skipping.has(call)) {
            None => guided,
            Some(skipping) => push(&guided, &positive, &next(), skipping.scale),
        }
    }
}

/// One line of a denoiser pass: a row with guidance makes two.
#[derive(Clone)]
pub(super) struct ModelRow {
    /// What the sampler shows the denoiser: a latent on the host.
    pub sample: Arc<[f32]>,
    pub timestep: f32,
    pub conditioning: Conditioning,
    /// Layers that the denoiser leaves out for it.
    pub skipped: Arc<[usize]>,
}

/// A family's networks, but for the VAE, which all have in common.
pub(super) trait Family: Send + Sync {
    /// What the row listens to.
    fn condition(&self, request: &RowRequest, cache: &EmbeddingCache) -> Result<Conditions>;

    /// Its text encoders.
    fn encoders(&self) -> Vec<&dyn TextEncoder>;

    /// The prompts that the row listens to, each through all encoders.
    fn prompts<'a>(&self, request: &'a RowRequest) -> Vec<&'a str>;

    /// Tokens that T5 makes of them, in families with T5.
    fn tokens(&self, _request: &RowRequest) -> Result<usize> {
        Ok(0)
    }

    /// One denoiser call: an output for each row, row after row, of latents with `shape`'s channels, height
    /// and width.
    fn denoise(&self, rows: &[ModelRow], shape: [usize; 3]) -> Result<Vec<f32>>;

    /// Height and width of the latents that the checkpoint was trained on.
    fn sample_size(&self) -> (usize, usize);

    /// Bytes of the denoiser's weights.
    fn weight_bytes(&self) -> usize;

    /// Whether the family's pipeline overrules values of `scheduler_config.json`.
    fn overrules_sampler(&self) -> bool {
        false
    }

    /// What the noise levels of a checkpoint trained by flow matching depend on, for latents of `shape`'s channels,
    /// height and width.
    fn flow(&self, _shape: [usize; 3]) -> Flow {
        Flow::default()
    }

    /// Layers of the denoiser that a pass may leave out.
    fn layers(&self) -> usize {
        0
    }

    /// Whether the denoiser sees a mask and the latent of what it leaves after the latent's own channels.
    fn inpaints(&self) -> bool {
        false
    }

    /// Whether rows may end and begin in the middle of the way from noise, and start from latents.
    fn hands_over(&self) -> bool {
        false
    }

    /// Latent values along a side that the denoiser takes as one.
    fn patch(&self) -> usize {
        1
    }
}

/// What a family is loaded from.
pub(super) struct Parts<'a> {
    /// Where its parts lie.
    pub source: &'a Source,
    /// Its `model_index.json`.
    pub index: &'a ConfigFile,
    pub vae: &'a VaeConfig,
    pub place: &'a Place,
}

impl Parts<'_> {
    /// Whether `model_index.json` lists the part with a class, and not as left out.
    pub fn has(&self, part: &str) -> bool {
        self.index.get(part).is_some_and(|listed| listed.get(1).is_some_and(|class| class.is_string()))
    }

    /// An error unless `value`, which the part's configuration has in `field`, is `expected`.
    pub fn fit(&self, part: &str, field: &str, value: usize, expected: usize, what: &str) -> Result<()> {
        if value == expected {
            return Ok(());
        }
        let problem = format!("`{field}` must be {what} ({expected}), but is {value}");
        Err(Error::checkpoint(self.source.path(part).join("config.json"), problem))
    }
}

/// The request's prompt, and the negative one if the row is guided away from that.
pub(super) fn prompts_of(request: &RowRequest, guided: bool) -> Vec<&str> {
    let negative = guided.then_some(request.negative_prompt.as_str());
    std::iter::once(request.prompt.as_str()).chain(negative).collect()
}

/// Tokens that a request's prompts become for T5; `usual` where it does not say.
pub(super) fn t5_tokens(request: &RowRequest, usual: usize) -> Result<usize> {
    /// More were never trained on.
    const MOST: usize = 512;
    match request.max_sequence_length.unwrap_or(usual) {
        tokens if (1..=MOST).contains(&tokens) => Ok(tokens),
        tokens => Err(Error::request("max_sequence_length", format!("1 to {MOST}"), tokens)),
    }
}

/// The outputs of all rows, each of `len` values, where only rows that are `alike` can share a denoiser call.
/// Whom a row shares it with never shows.
pub(super) fn call_alike(
    rows: &[ModelRow],
    len: usize,
    alike: impl Fn(&ModelRow, &ModelRow) -> bool,
    call: impl Fn(&[ModelRow]) -> Result<Vec<f32>>,
) -> Result<Vec<f32>> {
    let mut outputs = vec![0.0; rows.len() * len];
    let mut left: Vec<usize> = (0..rows.len()).collect();
    while let Some(first) = left.first() {
        let first = &rows[*first];
        let (group, others): (Vec<usize>, Vec<usize>) = left.iter().partition(|place| alike(first, &rows[**place]));
        let members: Vec<ModelRow> = group.iter().map(|place| rows[*place].clone()).collect();
        for (place, output) in group.iter().zip(call(&members)?.chunks_exact(len.max(1))) {
            outputs[place * len..(place + 1) * len].copy_from_slice(output);
        }
        left = others;
    }
    Ok(outputs)
}

/// All rows' samples, row after row.
pub(super) fn samples(rows: &[ModelRow]) -> Vec<f32> {
    rows.iter().flat_map(|row| row.sample.iter().copied()).collect()
}

/// One timestep per row.
pub(super) fn timesteps(rows: &[ModelRow]) -> Vec<f32> {
    rows.iter().map(|row| row.timestep).collect()
}

/// All rows' prompts, (rows, tokens, width).
pub(super) fn tokens(rows: &[ModelRow]) -> Result<Tensor> {
    Tensor::cat_rows(&rows.iter().map(|row| &row.conditioning.tokens).collect::<Vec<_>>())
}

/// All rows' prompts as vectors, (rows, width).
pub(super) fn pooled(rows: &[ModelRow]) -> Result<Tensor> {
    Tensor::cat_rows(&rows.iter().filter_map(|row| row.conditioning.pooled.as_ref()).collect::<Vec<_>>())
}

/// All rows' numbers, row after row.
pub(super) fn numbers(rows: &[ModelRow]) -> Vec<f32> {
    rows.iter().flat_map(|row| row.conditioning.numbers.iter().copied()).collect()
}
