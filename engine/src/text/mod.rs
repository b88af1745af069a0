//! From a prompt to what the denoiser listens to: token ids, then an encoder's states.

mod cache;
mod clip;
mod clip_tokenizer;
mod sentencepiece;
mod t5;
mod t5_tokenizer;

use crate::Result;
use crate::ops::{Place, Tensor};
use crate::source::{Source, TokenizerFiles};

pub use cache::CacheCounts;
pub(crate) use cache::EmbeddingCache;
pub(crate) use clip::{ClipEncoder, ClipOutput, Pooled, States};
pub(crate) use clip_tokenizer::ClipTokenizer;
pub(crate) use t5::T5Encoder;
pub(crate) use t5_tokenizer::T5Tokenizer;

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
    /// Loads the parts `name` and `tokenizer` of a checkpoint.
    pub fn load(
        source: &Source,
        name: &'static str,
        tokenizer: &str,
        output: ClipOutput,
        place: &Place,
    ) -> Result<Self> {
        let encoder = ClipEncoder::load(source.part(name), output, place)?;
        let (positions, vocabulary) = (encoder.config.positions, encoder.config.vocabulary);
        let tokenizer = match source.tokenizer(tokenizer) {
            TokenizerFiles::Folder(folder) => ClipTokenizer::load(&folder, positions, vocabulary)?,
            TokenizerFiles::Clip { pad } => ClipTokenizer::known(pad, positions, vocabulary)?,
        };
        Ok(Self { name, tokenizer, encoder })
    }

    /// Width of its states.
    pub fn width(&self) -> usize {
        self.encoder.config.width
    }

    /// Tokens that every prompt becomes.
    pub fn tokens(&self) -> usize {
        self.tokenizer.tokens()
    }

    /// What it makes of a prompt, computed or remembered.
    pub fn embed(&self, prompt: &str, cache: &EmbeddingCache) -> Result<Embedding> {
        cache.get_or(self.name, prompt, || self.encoder.forward(&self.tokenizer.ids(prompt)?))
    }
}

/// A checkpoint's T5 encoder with its tokenizer.
pub(crate) struct T5Text {
    /// Its folder, and its name in the cache.
    name: &'static str,
    tokenizer: T5Tokenizer,
    pub encoder: T5Encoder,
}

impl T5Text {
    /// Loads the parts `name` and `tokenizer` of a checkpoint.
    pub fn load(source: &Source, name: &'static str, tokenizer: &str, place: &Place) -> Result<Self> {
        let encoder = T5Encoder::load(source.part(name), place)?;
        let tokenizer = T5Tokenizer::load(&source.path(tokenizer), encoder.config.vocabulary)?;
        Ok(Self { name, tokenizer, encoder })
    }

    /// Width of its states.
    pub fn width(&self) -> usize {
        self.encoder.config.width
    }

    /// What it makes of a prompt as so many `tokens`, computed or remembered.
    pub fn embed(&self, prompt: &str, tokens: usize, cache: &EmbeddingCache) -> Result<Embedding> {
        cache.get_or(self.name, &format!("{tokens} {prompt}"), || {
            let states = self.encoder.forward(&self.tokenizer.ids(prompt, tokens)?)?;
            Ok(Embedding { states, pooled: None })
        })
    }
}
