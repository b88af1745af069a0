//! From a prompt to what the denoiser listens to: token ids, then an encoder's states.

mod cache;
mod clip;
mod clip_tokenizer;
mod held;
mod sentencepiece;
mod t5;
mod t5_tokenizer;

use std::sync::Arc;

use crate::Result;
use crate::ops::{Place, Tensor};
use crate::source::{Source, TokenizerFiles};

pub use cache::CacheCounts;
pub(crate) use cache::{EmbeddingCache, Key};
use clip::ClipConfig;
pub(crate) use clip::{ClipEncoder, ClipOutput, Pooled, States};
pub(crate) use clip_tokenizer::ClipTokenizer;
use held::{Held, HeldWeights};
use t5::T5Config;
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

/// A text encoder with its tokenizer, whichever kind it is.
pub(crate) trait TextEncoder: Send + Sync {
    /// What the embedding of `prompt` is remembered by, where T5 makes so many `tokens` of it.
    fn key(&self, prompt: &str, tokens: usize) -> Key;

    /// What it makes of a prompt; its weights are read if they are not at hand.
    fn forward(&self, key: &Key) -> Result<Embedding>;

    /// Bytes of what it makes of a prompt.
    fn embedding_bytes(&self, key: &Key) -> usize;

    fn weights(&self) -> &dyn HeldWeights;
}

/// One of a checkpoint's CLIP encoders with its tokenizer.
pub(crate) struct ClipText {
    /// Its folder, and its name in the cache.
    name: &'static str,
    tokenizer: ClipTokenizer,
    config: Arc<ClipConfig>,
    output: ClipOutput,
    value_bytes: usize,
    encoder: Held<ClipEncoder>,
}

impl ClipText {
    /// Loads the parts `name` and `tokenizer` of a checkpoint, but for the weights.
    pub fn load(
        source: &Source,
        name: &'static str,
        tokenizer: &str,
        output: ClipOutput,
        place: &Place,
    ) -> Result<Self> {
        let part = source.part(name);
        let config = Arc::new(ClipConfig::read(&part.config()?)?);
        let (positions, vocabulary) = (config.positions, config.vocabulary);
        let tokenizer = match source.tokenizer(tokenizer) {
            TokenizerFiles::Folder(folder) => ClipTokenizer::load(&folder, positions, vocabulary)?,
            TokenizerFiles::Clip { pad } => ClipTokenizer::known(pad, positions, vocabulary)?,
        };
        let (of_encoder, at) = (Arc::clone(&config), place.clone());
        let encoder = Held::new(&part, "model", place, move |part| ClipEncoder::of(part, &of_encoder, output, &at))?;
        Ok(Self { name, tokenizer, config, output, value_bytes: place.value_bytes(), encoder })
    }

    /// Width of its states.
    pub fn width(&self) -> usize {
        self.config.width
    }

    /// Width of the pooled state.
    pub fn pooled_width(&self) -> usize {
        self.config.pooled_width(self.output.pooled)
    }

    /// Tokens that every prompt becomes.
    pub fn tokens(&self) -> usize {
        self.tokenizer.tokens()
    }

    /// What it makes of a prompt, computed or remembered.
    pub fn embed(&self, prompt: &str, cache: &EmbeddingCache) -> Result<Embedding> {
        cache.get_or(self.key(prompt, self.tokens()), |key| self.forward(key))
    }
}

impl TextEncoder for ClipText {
    fn key(&self, prompt: &str, _tokens: usize) -> Key {
        Key { encoder: self.name, tokens: self.tokens(), prompt: prompt.into() }
    }

    fn forward(&self, key: &Key) -> Result<Embedding> {
        let ids = self.tokenizer.ids(&key.prompt)?;
        self.encoder.get()?.forward(&ids)
    }

    fn embedding_bytes(&self, key: &Key) -> usize {
        let pooled = if self.output.pooled == Pooled::No { 0 } else { self.pooled_width() };
        (key.tokens * self.width() + pooled) * self.value_bytes
    }

    fn weights(&self) -> &dyn HeldWeights {
        &self.encoder
    }
}

/// A checkpoint's T5 encoder with its tokenizer.
pub(crate) struct T5Text {
    /// Its folder, and its name in the cache.
    name: &'static str,
    tokenizer: T5Tokenizer,
    config: Arc<T5Config>,
    value_bytes: usize,
    encoder: Held<T5Encoder>,
}

impl T5Text {
    /// Loads the parts `name` and `tokenizer` of a checkpoint, but for the weights.
    pub fn load(source: &Source, name: &'static str, tokenizer: &str, place: &Place) -> Result<Self> {
        let part = source.part(name);
        let config = Arc::new(T5Config::read(&part.config()?)?);
        let tokenizer = T5Tokenizer::load(&source.path(tokenizer), config.vocabulary)?;
        let (of_encoder, at) = (Arc::clone(&config), place.clone());
        let encoder = Held::new(&part, "model", place, move |part| T5Encoder::of(part, &of_encoder, &at))?;
        Ok(Self { name, tokenizer, config, value_bytes: place.value_bytes(), encoder })
    }

    /// Width of its states.
    pub fn width(&self) -> usize {
        self.config.width
    }

    /// What it makes of a prompt as so many `tokens`, computed or remembered.
    pub fn embed(&self, prompt: &str, tokens: usize, cache: &EmbeddingCache) -> Result<Embedding> {
        cache.get_or(self.key(prompt, tokens), |key| self.forward(key))
    }
}

impl TextEncoder for T5Text {
    fn key(&self, prompt: &str, tokens: usize) -> Key {
        Key { encoder: self.name, tokens, prompt: prompt.into() }
    }

    fn forward(&self, key: &Key) -> Result<Embedding> {
        let ids = self.tokenizer.ids(&key.prompt, key.tokens)?;
        Ok(Embedding { states: self.encoder.get()?.forward(&ids)?, pooled: None })
    }

    fn embedding_bytes(&self, key: &Key) -> usize {
        key.tokens * self.width() * self.value_bytes
    }

    fn weights(&self) -> &dyn HeldWeights {
        &self.encoder
    }
}
