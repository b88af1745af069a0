//! From a prompt to what the denoiser listens to: token ids, then an encoder's states.

mod cache;
mod clip;
mod clip_tokenizer;

use std::path::Path;

use crate::Result;
use crate::ops::{Place, Tensor};

pub use cache::CacheCounts;
pub(crate) use cache::EmbeddingCache;
pub(crate) use clip::{ClipEncoder, ClipOutput, Pooled, States};
pub(crate) use clip_tokenizer::ClipTokenizer;

/// What one encoder makes of one prompt.
#[derive(Clone)]
pub(crate) struct Embedding {
    /// (1, tokens, width)
    pub states: Tensor,
    /// (1, pooled width), where the family wants it.
    pub pooled: Option<Tensor>,
}

impl Embedding {
    /// Bytes of its values.
    pub fn bytes(&self) -> usize {
        self.states.bytes() + self.pooled.as_ref().map_or(0, Tensor::bytes)
    }
}

/// One of a checkpoint's CLIP encoders with its tokenizer.
pub(crate) struct ClipText {
    /// Its folder, and its name in the cache.
    name: &'static str,
    tokenizer: ClipTokenizer,
    pub encoder: ClipEncoder,
}

impl ClipText {
    /// Loads the folders `name` and `tokenizer` of a checkpoint's `folder`.
    pub fn load(folder: &Path, name: &'static str, tokenizer: &str, output: ClipOutput, place: &Place) -> Result<Self> {
        let encoder = ClipEncoder::load(&folder.join(name), output, place)?;
        let (positions, vocabulary) = (encoder.config.positions, encoder.config.vocabulary);
        let tokenizer = ClipTokenizer::load(&folder.join(tokenizer), positions, vocabulary)?;
        Ok(Self { name, tokenizer, encoder })
    }

    /// Width of its states.
    pub fn width(&self) -> usize {
        self.encoder.config.width
    }

    /// What it makes of a prompt, computed or remembered.
    pub fn embed(&self, prompt: &str, cache: &EmbeddingCache) -> Result<Embedding> {
        cache.get_or(self.name, prompt, || self.encoder.forward(&self.tokenizer.ids(prompt)?))
    }
}
