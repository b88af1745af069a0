//! Embeddings that were computed before, by encoder and prompt.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, PoisonError};

use super::Embedding;
use crate::Result;

/// Uses of other embeddings that one of an empty prompt outlasts beyond its turn: most rows listen to it as their
/// negative prompt, and a flood of new prompts must not wash it out.
const HEAD_START: u64 = 1000;

/// What an embedding is remembered by.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Key {
    /// The folder of the encoder that makes it.
    pub encoder: &'static str,
    /// Tokens that the prompt becomes.
    pub tokens: usize,
    pub prompt: Arc<str>,
}

/// A bounded map from an encoder's name and a prompt to the embedding; the one that was not asked for
/// the longest goes first. Shared by all encoders of a checkpoint.
pub(crate) struct EmbeddingCache {
    entries: Mutex<Entries>,
    most_bytes: usize,
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
    by_key: HashMap<Key, Entry>,
    /// Those that go first in front.
    by_use: BTreeSet<(u64, Key)>,
    counts: CacheCounts,
    clock: u64,
}

struct Entry {
    embedding: Embedding,
    bytes: usize,
    used: u64,
    /// Computed before a row asked for it: the first one that does has been counted.
    ahead: bool,
}

impl EmbeddingCache {
    /// An empty cache that holds at most `most_bytes` of embeddings and prompts.
    pub fn new(most_bytes: usize) -> Self {
        Self { entries: Mutex::default(), most_bytes }
    }

    /// Bytes that it holds at most.
    pub fn most_bytes(&self) -> usize {
        self.most_bytes
    }

    /// The embedding of `key`: remembered, or computed by `embed` and kept.
    pub fn get_or(&self, key: Key, embed: impl FnOnce(&Key) -> Result<Embedding>) -> Result<Embedding> {
        if let Some(embedding) = self.lock().get(&key) {
            return Ok(embedding);
        }
        let embedding = embed(&key)?;
        self.lock().insert(key, &embedding, false, self.most_bytes);
        Ok(embedding)
    }

    /// Whether `key` is there; if so, it counts as used, but not as a hit.
    pub fn touch(&self, key: &Key) -> bool {
        self.lock().use_now(key).is_some()
    }

    /// Keeps an embedding that a row is about to ask for: a miss, whose hit does not count.
    pub fn put_ahead(&self, key: Key, embedding: &Embedding) {
        let mut entries = self.lock();
        entries.counts.misses += 1;
        entries.insert(key, embedding, true, self.most_bytes);
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
    /// When an entry counts as used if that is now.
    fn now(&mut self, key: &Key) -> u64 {
        self.clock += 1;
        self.clock + if key.prompt.is_empty() { HEAD_START } else { 0 }
    }

    fn use_now(&mut self, key: &Key) -> Option<&mut Entry> {
        let before = self.by_key.get(key)?.used;
        let now = self.now(key);
        self.by_use.remove(&(before, key.clone()));
        self.by_use.insert((now, key.clone()));
        let entry = self.by_key.get_mut(key)?;
        entry.used = now;
        Some(entry)
    }

    fn get(&mut self, key: &Key) -> Option<Embedding> {
        let found = self.use_now(key).map(|entry| (entry.embedding.clone(), std::mem::take(&mut entry.ahead)));
        match &found {
            None => self.counts.misses += 1,
            Some((_, true)) => {}
            Some((_, false)) => self.counts.hits += 1,
        }
        found.map(|(embedding, _)| embedding)
    }

    /// Keeps an embedding, and drops others until all fit.
    fn insert(&mut self, key: Key, embedding: &Embedding, ahead: bool, most_bytes: usize) {
        let bytes = embedding.bytes() + key.prompt.len();
        if bytes > most_bytes {
            return;
        }
        let used = self.now(&key);
        let entry = Entry { embedding: embedding.clone(), bytes, used, ahead };
        self.counts.bytes += bytes;
        if let Some(replaced) = self.by_key.insert(key.clone(), entry) {
            self.counts.bytes -= replaced.bytes;
            self.by_use.remove(&(replaced.used, key.clone()));
        }
        self.by_use.insert((used, key));
        while self.counts.bytes > most_bytes {
            let Some((_, oldest)) = self.by_use.pop_first() else { return };
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

    fn key(encoder: &'static str, prompt: &str) -> Key {
        Key { encoder, tokens: 77, prompt: prompt.into() }
    }

    /// Asks for `prompt`; whether it had to be computed.
    fn ask(cache: &EmbeddingCache, encoder: &'static str, prompt: &str) -> bool {
        let mut computed = false;
        let got = cache.get_or(key(encoder, prompt), |_| {
            computed = true;
            Ok(embedding(prompt.len() as f32))
        });
        assert_eq!(got.unwrap().states.to_values().unwrap()[0], prompt.len() as f32);
        computed
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
    fn an_empty_prompt_outlasts_a_flood_of_others_and_goes_at_last() {
        let cache = EmbeddingCache::new(3 * 101);
        assert!(ask(&cache, "text_encoder", ""));
        for flood in 0..900 {
            ask(&cache, "text_encoder", ["a", "b", "c", "d"][flood % 4]);
        }
        assert!(!ask(&cache, "text_encoder", ""), "it is most rows' negative prompt");
        for flood in 0..2100 {
            ask(&cache, "text_encoder", ["a", "b", "c", "d"][flood % 4]);
        }
        assert!(ask(&cache, "text_encoder", ""), "nobody asked for it any more");
        assert!(cache.counts().bytes <= 3 * 101);
    }

    #[test]
    fn an_entry_larger_than_the_cache_is_not_kept() {
        let cache = EmbeddingCache::new(50);
        assert!(ask(&cache, "text_encoder", "a") && ask(&cache, "text_encoder", "a"));
        assert_eq!(cache.counts().bytes, 0);
    }

    #[test]
    fn each_encoder_and_each_length_has_entries_of_its_own() {
        let cache = EmbeddingCache::new(1000);
        assert!(ask(&cache, "text_encoder", "a") && ask(&cache, "text_encoder_2", "a"));
        assert!(!ask(&cache, "text_encoder", "a") && !ask(&cache, "text_encoder_2", "a"));
        assert!(!cache.touch(&Key { tokens: 256, ..key("text_encoder", "a") }));
    }

    #[test]
    fn what_cannot_be_computed_is_not_kept() {
        let cache = EmbeddingCache::new(1000);
        let refused = |_: &Key| Err(crate::Error::request("prompt", "shorter", "long"));
        assert!(cache.get_or(key("text_encoder", "a"), refused).is_err());
        assert!(ask(&cache, "text_encoder", "a"));
    }

    #[test]
    fn what_was_computed_ahead_is_one_miss_and_then_hits() {
        let cache = EmbeddingCache::new(1000);
        assert!(!cache.touch(&key("text_encoder", "a")));
        cache.put_ahead(key("text_encoder", "a"), &embedding(1.0));
        assert!(cache.touch(&key("text_encoder", "a")));
        for _ in 0..3 {
            assert!(!ask(&cache, "text_encoder", "a"));
        }
        let CacheCounts { hits, misses, .. } = cache.counts();
        assert_eq!((hits, misses), (2, 1), "as if the first of three rows had computed it");
    }

    #[test]
    fn an_entry_that_is_made_room_for_or_replaced_leaves_no_trace() {
        let cache = EmbeddingCache::new(2 * 101);
        for _ in 0..3 {
            cache.put_ahead(key("text_encoder", "a"), &embedding(1.0));
        }
        for prompt in ["b", "c", "d"] {
            cache.put_ahead(key("text_encoder", prompt), &embedding(1.0));
        }
        let entries = cache.lock();
        assert_eq!((entries.by_key.len(), entries.by_use.len(), entries.counts.bytes), (2, 2, 202));
    }
}
