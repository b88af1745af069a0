//! Embeddings that were computed before, by encoder and prompt.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use super::Embedding;
use crate::Result;

/// A bounded map from an encoder's name and a prompt to the embedding; the one that was not asked for
/// the longest goes first. Shared by all encoders of a checkpoint.
pub(crate) struct EmbeddingCache {
    entries: Mutex<Entries>,
}

/// How often the cache served.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CacheCounts {
    /// Embeddings that were there.
    pub hits: u64,
    /// Embeddings that had to be computed.
    pub misses: u64,
    /// Bytes of embeddings and prompts that it holds.
    pub bytes: usize,
}

#[derive(Default)]
struct Entries {
    by_key: HashMap<(&'static str, String), Entry>,
    counts: CacheCounts,
    most_bytes: usize,
    clock: u64,
}

struct Entry {
    embedding: Embedding,
    bytes: usize,
    used: u64,
}

impl EmbeddingCache {
    /// An empty cache that holds at most `most_bytes` of embeddings and prompts.
    pub fn new(most_bytes: usize) -> Self {
        Self { entries: Mutex::new(Entries { most_bytes, ..Entries::default() }) }
    }

    /// What `encoder` makes of `prompt`: remembered, or computed by `embed` and kept.
    pub fn get_or(
        &self,
        encoder: &'static str,
        prompt: &str,
        embed: impl FnOnce() -> Result<Embedding>,
    ) -> Result<Embedding> {
        let key = (encoder, prompt.to_owned());
        if let Some(embedding) = self.lock().get(&key) {
            return Ok(embedding);
        }
        let embedding = embed()?;
        self.lock().insert(key, &embedding);
        Ok(embedding)
    }

    /// How often it served so far.
    pub fn counts(&self) -> CacheCounts {
        self.lock().counts
    }

    /// A panic elsewhere cannot leave the entries half changed in a way that matters: at worst one is lost.
    fn lock(&self) -> std::sync::MutexGuard<'_, Entries> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Entries {
    fn get(&mut self, key: &(&'static str, String)) -> Option<Embedding> {
        self.clock += 1;
        let Some(entry) = self.by_key.get_mut(key) else {
            self.counts.misses += 1;
            return None;
        };
        self.counts.hits += 1;
        entry.used = self.clock;
        Some(entry.embedding.clone())
    }

    /// Keeps an embedding, and drops others until all fit.
    fn insert(&mut self, key: (&'static str, String), embedding: &Embedding) {
        let bytes = embedding.bytes() + key.1.len();
        if bytes > self.most_bytes {
            return;
        }
        self.clock += 1;
        let entry = Entry { embedding: embedding.clone(), bytes, used: self.clock };
        self.counts.bytes += bytes;
        if let Some(replaced) = self.by_key.insert(key, entry) {
            self.counts.bytes -= replaced.bytes;
        }
        while self.counts.bytes > self.most_bytes {
            // A few hundred entries: a scan costs less than one encoder layer.
            let Some(oldest) = self.by_key.iter().min_by_key(|(_, entry)| entry.used).map(|(key, _)| key.clone())
            else {
                return;
            };
            if let Some(removed) = self.by_key.remove(&oldest) {
                self.counts.bytes -= removed.bytes;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::{Place, Tensor};

    /// 100 bytes.
    fn embedding(value: f32) -> Embedding {
        Embedding { states: Tensor::new(&[value; 25], &[25], &Place::host()).unwrap(), pooled: None }
    }

    /// Asks for `prompt`; whether it had to be computed.
    fn ask(cache: &EmbeddingCache, encoder: &'static str, prompt: &str) -> bool {
        let before = cache.counts().misses;
        let got = cache.get_or(encoder, prompt, || Ok(embedding(prompt.len() as f32))).unwrap();
        assert_eq!(got.states.to_values().unwrap()[0], prompt.len() as f32);
        cache.counts().misses > before
    }

    #[test]
    fn the_longest_unused_entry_goes_first() {
        let cache = EmbeddingCache::new(2 * 101);
        assert!(ask(&cache, "text_encoder", "a") && ask(&cache, "text_encoder", "b"));
        assert!(!ask(&cache, "text_encoder", "a"));
        assert!(ask(&cache, "text_encoder", "c"));
        assert!(!ask(&cache, "text_encoder", "a") && !ask(&cache, "text_encoder", "c"));
        assert!(ask(&cache, "text_encoder", "b"), "it had to go");
        assert_eq!(cache.counts(), CacheCounts { hits: 3, misses: 4, bytes: 202 });
    }

    #[test]
    fn an_entry_larger_than_the_cache_is_not_kept() {
        let cache = EmbeddingCache::new(50);
        assert!(ask(&cache, "text_encoder", "a") && ask(&cache, "text_encoder", "a"));
        assert_eq!(cache.counts().bytes, 0);
    }

    #[test]
    fn each_encoder_has_entries_of_its_own() {
        let cache = EmbeddingCache::new(1000);
        assert!(ask(&cache, "text_encoder", "a") && ask(&cache, "text_encoder_2", "a"));
        assert!(!ask(&cache, "text_encoder", "a") && !ask(&cache, "text_encoder_2", "a"));
    }

    #[test]
    fn what_cannot_be_computed_is_not_kept() {
        let cache = EmbeddingCache::new(1000);
        let refused = || Err(crate::Error::request("prompt", "shorter", "long"));
        assert!(cache.get_or("text_encoder", "a", refused).is_err());
        assert!(ask(&cache, "text_encoder", "a"));
    }
}
