//! From a prompt to what the denoiser listens to: token ids, then CLIP's last hidden states.

mod cache;
mod encoder;
mod tokenizer;

pub(crate) use cache::EmbeddingCache;
pub(crate) use encoder::TextEncoder;
pub(crate) use tokenizer::Tokenizer;
