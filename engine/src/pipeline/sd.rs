//! Stable Diffusion 1.x and 2.x: a U-Net that listens to the last states of one CLIP encoder.
//!
//! Reference: Rombach et al. 2022, <https://arxiv.org/abs/2112.10752>;
//! <https://github.com/huggingface/diffusers/blob/v0.36.0/src/diffusers/pipelines/stable_diffusion/pipeline_stable_diffusion.py>

use super::family::{Conditioning, Conditions, Family, ModelRow, Parts, prompts_of, samples, timesteps, tokens};
use crate::denoiser::UNet;
use crate::guidance::is_guided;
use crate::text::{ClipOutput, ClipText, EmbeddingCache, Pooled, States, TextEncoder};
use crate::{Result, RowRequest};

struct StableDiffusion {
    text: ClipText,
    unet: UNet,
}

/// Loads `text_encoder`, `tokenizer` and `unet`.
pub(super) fn load(parts: &Parts<'_>) -> Result<Box<dyn Family>> {
    let output = ClipOutput { states: States::Last, pooled: Pooled::No };
    let text = ClipText::load(parts.source, "text_encoder", "tokenizer", output, parts.place)?;
    let unet = UNet::load(parts.source.part("unet"), parts.place)?;
    check_channels(parts, &unet)?;
    unet.config.refuse_added(&parts.source.path("unet"))?;
    check_context(parts, &unet, text.width(), "the text encoder's `hidden_size`")?;
    Ok(Box::new(StableDiffusion { text, unet }))
}

/// A U-Net's latents must be the VAE's.
pub(super) fn check_channels(parts: &Parts<'_>, unet: &UNet) -> Result<()> {
    let what = "the VAE's `latent_channels`";
    if !inpaints(parts.vae.latent_channels, unet) {
        parts.fit("unet", "in_channels", unet.config.in_channels, parts.vae.latent_channels, what)?;
    }
    parts.fit("unet", "out_channels", unet.config.out_channels, parts.vae.latent_channels, what)
}

/// Whether a U-Net sees a mask and another latent beside its own.
pub(super) fn inpaints(latent_channels: usize, unet: &UNet) -> bool {
    unet.config.in_channels == 2 * latent_channels + 1
}

/// A U-Net's prompts must be as wide as the encoders make them.
pub(super) fn check_context(parts: &Parts<'_>, unet: &UNet, width: usize, what: &str) -> Result<()> {
    unet.config.context_widths().try_for_each(|context| parts.fit("unet", "cross_attention_dim", context, width, what))
}

impl StableDiffusion {
    fn embed(&self, prompt: &str, cache: &EmbeddingCache) -> Result<Conditioning> {
        let tokens = self.text.embed(prompt, cache)?.states;
        Ok(Conditioning { tokens, pooled: None, numbers: [].into() })
    }
}

impl Family for StableDiffusion {
    fn condition(&self, request: &RowRequest, cache: &EmbeddingCache) -> Result<Conditions> {
        let guided = is_guided(request.guidance_scale);
        Ok(Conditions {
            positive: self.embed(&request.prompt, cache)?,
            negative: guided.then(|| self.embed(&request.negative_prompt, cache)).transpose()?,
            guidance_scale: request.guidance_scale,
            skipping: None,
        })
    }

    fn encoders(&self) -> Vec<&dyn TextEncoder> {
        vec![&self.text]
    }

    fn prompts<'a>(&self, request: &'a RowRequest) -> Vec<&'a str> {
        prompts_of(request, is_guided(request.guidance_scale))
    }

    fn denoise(&self, rows: &[ModelRow], [_, height, width]: [usize; 3]) -> Result<Vec<f32>> {
        let dims = [rows.len(), self.unet.config.in_channels, height, width];
        self.unet.forward(&samples(rows), dims, &timesteps(rows), &tokens(rows)?, None)
    }

    fn inpaints(&self) -> bool {
        inpaints(self.unet.config.out_channels, &self.unet)
    }

    fn sample_size(&self) -> (usize, usize) {
        self.unet.config.sample_size
    }

    fn weight_bytes(&self) -> usize {
        self.unet.weight_bytes
    }

    fn overrules_sampler(&self) -> bool {
        true
    }
}
