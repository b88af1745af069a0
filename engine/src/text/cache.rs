//! Embeddings that were computed before, by prompt.

use std::collections::HashMap;

use crate::ops::Tensor;

/// A bounded map from a prompt to its embedding; the one that was not asked for the longest goes first.
pub(crate) struct EmbeddingCache {
    entries: HashMap<String, Entry>,
    bytes: usize,
    most_bytes: usize,
    clock: u64,
}

struct Entry {
    embedding: Tensor,
    bytes: usize,
    used: u64,
}

impl EmbeddingCache {
    /// An empty cache that holds at most `most_bytes` of embeddings and prompts.
    pub fn new(most_bytes: usize) -> Self {
        Self { entries: HashMap::new(), bytes: 0, most_bytes, clock: 0 }
    }

    /// The embedding of `prompt`, if it is still here.
    pub fn get(&mut self, prompt: &str) -> Option<Tensor> {
        self.clock += 1;
        let entry = self.entries.get_mut(prompt)?;
        entry.used = self.clock;
        Some(entry.embedding.clone())
    }

    /// Keeps an embedding, and drops others until all fit.
    pub fn insert(&mut self, prompt: &str, embedding: &Tensor) {
        let bytes = embedding.bytes() + prompt.len();
        if bytes > self.most_bytes {
            return;
        }
        self.clock += 1;
        let entry = Entry { embedding: embedding.clone(), bytes, used: self.clock };
        self.bytes += bytes;
        if let Some(replaced) = self.entries.insert(prompt.to_owned(), entry) {
            self.bytes -= replaced.bytes;
        }
        while self.bytes > self.most_bytes {
            // A few hundred entries: a scan costs less than one encoder layer.
            let Some(oldest) =
                self.entries.iter().min_by_key(|(_, entry)| entry.used).map(|(prompt, _)| prompt.clone())
            else {
                return;
            };
            if let Some(removed) = self.entries.remove(&oldest) {
                self.bytes -= removed.bytes;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::Place;

    fn embedding(value: f32) -> Tensor {
        Tensor::new(&[value; 25], &[25], &Place::host()).unwrap()
    }

    #[test]
    fn the_longest_unused_entry_goes_first() {
        let mut cache = EmbeddingCache::new(2 * 101);
        cache.insert("a", &embedding(1.0));
        cache.insert("b", &embedding(2.0));
        assert!(cache.get("a").is_some());
        cache.insert("c", &embedding(3.0));
        assert!(cache.get("b").is_none());
        assert!(cache.get("a").is_some() && cache.get("c").is_some());
    }

    #[test]
    fn an_entry_larger_than_the_cache_is_not_kept() {
        let mut cache = EmbeddingCache::new(50);
        cache.insert("a", &embedding(1.0));
        assert!(cache.get("a").is_none());
    }

    #[test]
    fn the_same_prompt_twice_is_counted_once() {
        let mut cache = EmbeddingCache::new(2 * 101);
        for _ in 0..5 {
            cache.insert("a", &embedding(1.0));
        }
        cache.insert("b", &embedding(2.0));
        assert!(cache.get("a").is_some() && cache.get("b").is_some());
    }
}
