//! FLUX.1: a transformer that listens to T5's states and CLIP's pooled one; `dev` has learnt what pictures of a
//! guidance look like and is told which one is wanted, `schnell` needs few steps and none.
//!
//! Reference: <https://github.com/black-forest-labs/flux>;
//! <https://github.com/huggingface/diffusers/blob/v0.36.0/src/diffusers/pipelines/flux/pipeline_flux.py>

use super::family::{Conditioning, Conditions, Family, ModelRow, Parts};
use super::family::{call_alike, numbers, pooled, prompts_of, samples, t5_tokens, timesteps, tokens};
use crate::denoiser::{FLUX_PATCH, FluxInputs, FluxTransformer};
use crate::guidance::is_guided;
use crate::sampler::Flow;
use crate::text::{ClipOutput, ClipText, EmbeddingCache, Pooled, States, T5Text, TextEncoder};
use crate::{Result, RowRequest};

/// Tokens that T5 makes of a prompt: those that `dev` and `schnell` were trained with.
const DEV_TOKENS: usize = 512;
const SCHNELL_TOKENS: usize = 256;

/// Latent values along a side of what the checkpoints were trained on.
const SAMPLE_SIZE: usize = 128;

struct Flux {
    text: ClipText,
    text_2: T5Text,
    /// Tokens that T5 makes of a prompt unless a request says otherwise.
    words: usize,
    transformer: FluxTransformer,
}

/// Loads `text_encoder` (CLIP) with `tokenizer`, `text_encoder_2` (T5) with `tokenizer_2`, and `transformer`.
pub(super) fn load(parts: &Parts<'_>) -> Result<Box<dyn Family>> {
    let Parts { source, place, .. } = *parts;
    let output = ClipOutput { states: States::Last, pooled: Pooled::Plain };
    let text = ClipText::load(source, "text_encoder", "tokenizer", output, place)?;
    let transformer = FluxTransformer::load(source.part("transformer"), place)?;
    let config = &transformer.config;
    let words = if config.guidance_embeds { DEV_TOKENS } else { SCHNELL_TOKENS };
    let text_2 = T5Text::load(source, "text_encoder_2", "tokenizer_2", place)?;

    let fit =
        |field: &str, value: usize, expected: usize, what: &str| parts.fit("transformer", field, value, expected, what);
    let patch = FLUX_PATCH * FLUX_PATCH * parts.vae.latent_channels;
    fit("in_channels", config.in_channels, patch, "the VAE's `latent_channels` times 4")?;
    fit("joint_attention_dim", config.joint_width, text_2.width(), "the `d_model` of `text_encoder_2`")?;
    fit("pooled_projection_dim", config.pooled_width, text.width(), "the `hidden_size` of `text_encoder`")?;
    Ok(Box::new(Flux { text, text_2, words, transformer }))
}

impl Flux {
    fn embed(&self, prompt: &str, request: &RowRequest, cache: &EmbeddingCache) -> Result<Conditioning> {
        let pooled = self.text.embed(prompt, cache)?.pooled;
        let tokens = self.text_2.embed(prompt, self.tokens(request)?, cache)?.states;
        Ok(Conditioning { tokens, pooled, numbers: [request.guidance_scale as f32].into() })
    }

    /// One transformer call for rows whose prompts have equally many tokens.
    fn call(&self, rows: &[ModelRow], [channels, height, width]: [usize; 3]) -> Result<Vec<f32>> {
        let inputs = FluxInputs {
            timesteps: &timesteps(rows),
            guidance: &numbers(rows),
            prompts: &tokens(rows)?,
            pooled: &pooled(rows)?,
        };
        self.transformer.forward(&samples(rows), [rows.len(), channels, height, width], &inputs)
    }
}

fn true_cfg_scale(request: &RowRequest) -> f64 {
    request.true_cfg_scale.unwrap_or(1.0)
}

impl Family for Flux {
    fn condition(&self, request: &RowRequest, cache: &EmbeddingCache) -> Result<Conditions> {
        let embed = |prompt: &str| self.embed(prompt, request, cache);
        let scale = true_cfg_scale(request);
        Ok(Conditions {
            positive: embed(&request.prompt)?,
            negative: is_guided(scale).then(|| embed(&request.negative_prompt)).transpose()?,
            guidance_scale: scale,
            skipping: None,
        })
    }

    fn encoders(&self) -> Vec<&dyn TextEncoder> {
        vec![&self.text, &self.text_2]
    }

    fn prompts<'a>(&self, request: &'a RowRequest) -> Vec<&'a str> {
        prompts_of(request, is_guided(true_cfg_scale(request)))
    }

    fn tokens(&self, request: &RowRequest) -> Result<usize> {
        t5_tokens(request, self.words)
    }

    fn denoise(&self, rows: &[ModelRow], shape: [usize; 3]) -> Result<Vec<f32>> {
        let alike = |a: &ModelRow, b: &ModelRow| a.conditioning.tokens.dims() == b.conditioning.tokens.dims();
        call_alike(rows, shape.iter().product(), alike, |rows| self.call(rows, shape))
    }

    fn sample_size(&self) -> (usize, usize) {
        (SAMPLE_SIZE, SAMPLE_SIZE)
    }

    fn weight_bytes(&self) -> usize {
        self.transformer.weight_bytes
    }

    fn patch(&self) -> usize {
        FLUX_PATCH
    }

    /// Levels from 1 to 1/steps, shifted by the picture's size where the checkpoint says so.
    fn flow(&self, [_, height, width]: [usize; 3]) -> Flow {
        Flow { image_tokens: (height / FLUX_PATCH) * (width / FLUX_PATCH), unit_levels: true }
    }
}
