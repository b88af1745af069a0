//! Stable Diffusion XL and its refiner: a U-Net that listens to the penultimate states of two CLIP
//! encoders (the refiner: of the second), to the second one's pooled state, and to sizes.
//!
//! Reference: Podell et al. 2023, <https://arxiv.org/abs/2307.01952>;
//! <https://github.com/huggingface/diffusers/blob/v0.36.0/src/diffusers/pipelines/stable_diffusion_xl/pipeline_stable_diffusion_xl.py>

use super::family::{Conditioning, Conditions, Family, ModelRow, Parts};
use super::family::{numbers, pooled, prompts_of, samples, timesteps, tokens};
use super::sd::{check_channels, check_context, inpaints};
use crate::denoiser::{Added, UNet};
use crate::guidance::is_guided;
use crate::ops::{self, Place, Tensor};
use crate::text::{ClipOutput, ClipText, EmbeddingCache, Pooled, States, TextEncoder};
use crate::{Error, Result, RowRequest};

/// What the refiner is told of how pleasing the picture is and the negative one is not: diffusers' defaults.
const AESTHETIC_SCORES: (f32, f32) = (6.0, 2.5);

struct StableDiffusionXl {
    place: Place,
    /// The refiner has none.
    text: Option<ClipText>,
    text_2: ClipText,
    unet: UNet,
    /// An empty negative prompt becomes zeros instead of the embedding of nothing.
    zero_empty_negative: bool,
    /// The refiner is told a score in place of the target size.
    scored: bool,
}

/// Loads `text_encoder` with `tokenizer` where there are such, `text_encoder_2` with `tokenizer_2`, and `unet`.
pub(super) fn load(parts: &Parts<'_>) -> Result<Box<dyn Family>> {
    let Parts { source, index, place, .. } = *parts;
    let output = ClipOutput { states: States::Penultimate, pooled: Pooled::No };
    let text = if parts.has("text_encoder") {
        Some(ClipText::load(source, "text_encoder", "tokenizer", output, place)?)
    } else {
        None
    };
    let output = ClipOutput { pooled: Pooled::Projected, ..output };
    let text_2 = ClipText::load(source, "text_encoder_2", "tokenizer_2", output, place)?;
    let unet = UNet::load(source.part("unet"), place)?;

    check_channels(parts, &unet)?;
    let width = text.as_ref().map_or(0, ClipText::width) + text_2.width();
    check_context(parts, &unet, width, "the `hidden_size` of its text encoders together")?;
    let scored = index.flag("requires_aesthetics_score", false)?;
    let Some(added) = unet.config.added else {
        let problem = "`addition_embed_type` must be `text_time` for Stable Diffusion XL";
        return Err(Error::checkpoint(source.path("unet").join("config.json"), problem));
    };
    let told = text_2.pooled_width() + added.waves * if scored { 5 } else { 6 };
    let what = "the pooled width of `text_encoder_2` and the waves of the sizes together";
    parts.fit("unet", "projection_class_embeddings_input_dim", added.inputs, told, what)?;
    let zero_empty_negative = index.flag("force_zeros_for_empty_prompt", !scored)?;
    Ok(Box::new(StableDiffusionXl { place: place.clone(), text, text_2, unet, zero_empty_negative, scored }))
}

impl StableDiffusionXl {
    fn embed(&self, prompt: &str, numbers: &[f32], cache: &EmbeddingCache) -> Result<Conditioning> {
        let second = self.text_2.embed(prompt, cache)?;
        let tokens = match &self.text {
            None => second.states,
            Some(first) => ops::concat_channels(&first.embed(prompt, cache)?.states, &second.states)?,
        };
        Ok(Conditioning { tokens, pooled: second.pooled, numbers: numbers.into() })
    }

    /// Whether the row's negative prompt is none at all.
    fn has_no_negative(&self, request: &RowRequest) -> bool {
        self.zero_empty_negative && request.negative_prompt.is_empty()
    }

    /// What `other` would be if its prompt were nothing at all.
    fn zeros(&self, other: &Conditioning, numbers: &[f32]) -> Result<Conditioning> {
        let zeros = |x: &Tensor| Tensor::zeros(x.dims(), &self.place);
        let pooled = other.pooled.as_ref().map(zeros).transpose()?;
        Ok(Conditioning { tokens: zeros(&other.tokens)?, pooled, numbers: numbers.into() })
    }

    /// Original size, crop, and target size or `score`, each height before width.
    fn sizes(&self, request: &RowRequest, score: f32) -> Vec<f32> {
        let asked = &request.micro_conditioning;
        let picture = (request.width, request.height);
        let ((width, height), (left, top)) = (asked.original_size.unwrap_or(picture), asked.crop);
        let mut sizes = vec![height as f32, width as f32, top as f32, left as f32];
        if self.scored {
            sizes.push(score);
        } else {
            let (width, height) = asked.target_size.unwrap_or(picture);
            sizes.extend([height as f32, width as f32]);
        }
        sizes
    }
}

impl Family for StableDiffusionXl {
    fn condition(&self, request: &RowRequest, cache: &EmbeddingCache) -> Result<Conditions> {
        let positive = self.embed(&request.prompt, &self.sizes(request, AESTHETIC_SCORES.0), cache)?;
        let sizes = self.sizes(request, AESTHETIC_SCORES.1);
        let negative = match is_guided(request.guidance_scale) {
            false => None,
            true if self.has_no_negative(request) => Some(self.zeros(&positive, &sizes)?),
            true => Some(self.embed(&request.negative_prompt, &sizes, cache)?),
        };
        Ok(Conditions { positive, negative, guidance_scale: request.guidance_scale, skipping: None })
    }

    fn encoders(&self) -> Vec<&dyn TextEncoder> {
        self.text.iter().chain([&self.text_2]).map(|text| text as &dyn TextEncoder).collect()
    }

    fn prompts<'a>(&self, request: &'a RowRequest) -> Vec<&'a str> {
        prompts_of(request, is_guided(request.guidance_scale) && !self.has_no_negative(request))
    }

    fn denoise(&self, rows: &[ModelRow], [_, height, width]: [usize; 3]) -> Result<Vec<f32>> {
        let dims = [rows.len(), self.unet.config.in_channels, height, width];
        let added = Added { pooled: &pooled(rows)?, numbers: &numbers(rows) };
        self.unet.forward(&samples(rows), dims, &timesteps(rows), &tokens(rows)?, Some(added))
    }

    fn inpaints(&self) -> bool {
        inpaints(self.unet.config.out_channels, &self.unet)
    }

    fn hands_over(&self) -> bool {
        true
    }

    fn sample_size(&self) -> (usize, usize) {
        self.unet.config.sample_size
    }

    fn weight_bytes(&self) -> usize {
        self.unet.weight_bytes
    }
}
