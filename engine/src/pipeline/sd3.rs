//! Stable Diffusion 3 and 3.5: a transformer that listens to the penultimate states of two CLIP encoders side by
//! side, then to T5's, and to both CLIPs' pooled states.
//!
//! Reference: Esser et al. 2024, <https://arxiv.org/abs/2403.03206>;
//! <https://github.com/huggingface/diffusers/blob/v0.36.0/src/diffusers/pipelines/stable_diffusion_3/pipeline_stable_diffusion_3.py>

use super::family::{Conditioning, Conditions, Family, ModelRow, Parts, Skipping};
use super::family::{call_alike, pooled, prompts_of, samples, t5_tokens, timesteps, tokens};
use crate::denoiser::{Mmdit, Prompts};
use crate::guidance::is_guided;
use crate::ops::{self, Place, Tensor};
use crate::sampler::Flow;
use crate::text::{ClipOutput, ClipText, EmbeddingCache, Pooled, States, T5Text, TextEncoder};
use crate::{Error, Result, RowRequest};

/// Tokens that T5 makes of a prompt unless a request says otherwise.
const T5_TOKENS: usize = 256;

struct StableDiffusion3 {
    text: ClipText,
    text_2: ClipText,
    text_3: LongText,
    transformer: Mmdit,
    place: Place,
    /// (1, CLIP's tokens, what CLIP's states lack of T5's width), where they lack any
    padding: Option<Tensor>,
    /// Pixels along a side of the largest picture.
    most_pixels: usize,
}

/// The encoder that can be done without.
enum LongText {
    T5(Box<T5Text>),
    /// Zeros in place of its states, of this width.
    Absent(usize),
}

/// Loads `text_encoder` with `tokenizer`, their second and, where there is such, third siblings, and `transformer`.
pub(super) fn load(parts: &Parts<'_>) -> Result<Box<dyn Family>> {
    let Parts { source, vae, place, .. } = *parts;
    let output = ClipOutput { states: States::Penultimate, pooled: Pooled::Projected };
    let text = ClipText::load(source, "text_encoder", "tokenizer", output, place)?;
    let text_2 = ClipText::load(source, "text_encoder_2", "tokenizer_2", output, place)?;
    let transformer = Mmdit::load(source.part("transformer"), place)?;
    let config = &transformer.config;
    let text_3 = if parts.has("text_encoder_3") {
        LongText::T5(Box::new(T5Text::load(source, "text_encoder_3", "tokenizer_3", place)?))
    } else {
        LongText::Absent(config.context)
    };

    let fit =
        |field: &str, value: usize, expected: usize, what: &str| parts.fit("transformer", field, value, expected, what);
    fit("in_channels", config.in_channels, vae.latent_channels, "the VAE's `latent_channels`")?;
    fit("out_channels", config.out_channels, vae.latent_channels, "the VAE's `latent_channels`")?;
    if let LongText::T5(t5) = &text_3 {
        fit("joint_attention_dim", config.context, t5.width(), "the `d_model` of `text_encoder_3`")?;
    }
    let both = text.pooled_width() + text_2.pooled_width();
    fit("pooled_projection_dim", config.pooled, both, "the `projection_dim` of both CLIP encoders together")?;
    let (width, positions) = (text.width() + text_2.width(), text.tokens());
    if width > config.context {
        let problem = format!(
            "`joint_attention_dim` must be at least the `hidden_size` of both CLIP encoders together ({width}), but is {}",
            config.context
        );
        return Err(Error::checkpoint(source.path("transformer").join("config.json"), problem));
    }
    let padding = if width < config.context {
        Some(Tensor::zeros(&[1, positions, config.context - width], place)?)
    } else {
        None
    };
    let most_pixels = config.most_tokens * config.patch * vae.factor();
    let place = place.clone();
    Ok(Box::new(StableDiffusion3 { text, text_2, text_3, transformer, place, padding, most_pixels }))
}

impl StableDiffusion3 {
    fn embed(&self, prompt: &str, t5_tokens: usize, cache: &EmbeddingCache) -> Result<Conditioning> {
        let (first, second) = (self.text.embed(prompt, cache)?, self.text_2.embed(prompt, cache)?);
        let mut clip = ops::concat_channels(&first.states, &second.states)?;
        if let Some(padding) = &self.padding {
            clip = ops::concat_channels(&clip, padding)?;
        }
        let long = match &self.text_3 {
            LongText::T5(t5) => t5.embed(prompt, t5_tokens, cache)?.states,
            LongText::Absent(width) => Tensor::zeros(&[1, t5_tokens, *width], &self.place)?,
        };
        let pooled = match (&first.pooled, &second.pooled) {
            (Some(first), Some(second)) => Some(ops::concat_channels(first, second)?),
            _ => None,
        };
        Ok(Conditioning { tokens: ops::cat_tokens(&[&clip, &long])?, pooled, numbers: [].into() })
    }

    /// One transformer call for rows with as many tokens that leave out the same layers.
    fn call(&self, rows: &[ModelRow], [channels, height, width]: [usize; 3]) -> Result<Vec<f32>> {
        let dims = [rows.len(), channels, height, width];
        let prompts = Prompts { tokens: &tokens(rows)?, pooled: &pooled(rows)? };
        self.transformer.forward(&samples(rows), dims, &timesteps(rows), prompts, &rows[0].skipped)
    }
}

impl Family for StableDiffusion3 {
    fn condition(&self, request: &RowRequest, cache: &EmbeddingCache) -> Result<Conditions> {
        for (field, asked) in [("width", request.width), ("height", request.height)] {
            if asked > self.most_pixels {
                return Err(Error::request(field, format!("at most {} for this checkpoint", self.most_pixels), asked));
            }
        }
        let (guided, t5_tokens) = (is_guided(request.guidance_scale), self.tokens(request)?);
        Ok(Conditions {
            positive: self.embed(&request.prompt, t5_tokens, cache)?,
            negative: guided.then(|| self.embed(&request.negative_prompt, t5_tokens, cache)).transpose()?,
            guidance_scale: request.guidance_scale,
            skipping: Skipping::of(request),
        })
    }

    fn encoders(&self) -> Vec<&dyn TextEncoder> {
        let clips: [&dyn TextEncoder; 2] = [&self.text, &self.text_2];
        let t5 = match &self.text_3 {
            LongText::T5(t5) => Some(t5.as_ref() as &dyn TextEncoder),
            LongText::Absent(_) => None,
        };
        clips.into_iter().chain(t5).collect()
    }

    fn prompts<'a>(&self, request: &'a RowRequest) -> Vec<&'a str> {
        prompts_of(request, is_guided(request.guidance_scale))
    }

    fn tokens(&self, request: &RowRequest) -> Result<usize> {
        t5_tokens(request, T5_TOKENS)
    }

    fn denoise(&self, rows: &[ModelRow], shape: [usize; 3]) -> Result<Vec<f32>> {
        let alike = |a: &ModelRow, b: &ModelRow| {
            a.skipped == b.skipped && a.conditioning.tokens.dims() == b.conditioning.tokens.dims()
        };
        call_alike(rows, shape.iter().product(), alike, |rows| self.call(rows, shape))
    }

    fn sample_size(&self) -> (usize, usize) {
        (self.transformer.config.sample_size, self.transformer.config.sample_size)
    }

    fn weight_bytes(&self) -> usize {
        self.transformer.weight_bytes
    }

    fn patch(&self) -> usize {
        self.transformer.config.patch
    }

    fn layers(&self) -> usize {
        self.transformer.config.layers
    }

    fn flow(&self, [_, height, width]: [usize; 3]) -> Flow {
        let patch = self.transformer.config.patch;
        Flow { image_tokens: (height / patch) * (width / patch), unit_levels: false }
    }
}
