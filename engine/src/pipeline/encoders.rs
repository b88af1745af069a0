//! When text encoders lie in memory: always, only while prompts are encoded, or as memory allows. What they make of a
//! prompt is the same in any case.

use std::collections::HashSet;
use std::fmt;
use std::str::FromStr;
use std::time::{Duration, Instant};

use super::family::Family;
use crate::ops;
use crate::text::{EmbeddingCache, Key, TextEncoder};
use crate::{Device, Error, Result, RowRequest};

/// However quickly an encoder was read, prompts of rows that wait are encoded for about so long.
const LEAST_PATIENCE: Duration = Duration::from_secs(1);

/// What becomes of text encoders while no prompt needs them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum TextEncoders {
    /// They stay in memory.
    #[default]
    Keep,
    /// They are let go once rows are denoised, and read again when a prompt comes that the cache does not have.
    Drop,
    /// Each stays if its device has room for it and for pictures of the checkpoint's native size; largest go first.
    Auto,
}

impl TextEncoders {
    /// The word used in flags and configuration.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Keep => "keep",
            Self::Drop => "drop",
            Self::Auto => "auto",
        }
    }

    /// Whether an encoder of so many `bytes` stays, where so many are `free` and activations take `reserve`.
    fn keeps(self, bytes: usize, free: impl FnOnce() -> Option<usize>, reserve: usize) -> bool {
        match self {
            Self::Keep => true,
            Self::Drop => false,
            // A device that does not tell is taken for one with room.
            Self::Auto => free().is_none_or(|free| free >= bytes.saturating_add(reserve)),
        }
    }

    /// Reads those encoders that stay, small ones first.
    pub(super) fn settle(self, family: &dyn Family, device: &Device, reserve: usize) -> Result<()> {
        let mut encoders = family.encoders();
        encoders.sort_by_key(|encoder| encoder.weights().weight_bytes());
        for weights in encoders.into_iter().map(TextEncoder::weights) {
            let bytes = weights.weight_bytes();
            if self.keeps(bytes, || device.free_bytes(), reserve) {
                match weights.keep() {
                    // There was less room than it seemed.
                    Err(Error::OutOfMemory(_)) if self == Self::Auto => {}
                    kept => kept?,
                }
            }
            if self == Self::Auto && !weights.are_held() {
                let free = device.free_bytes();
                tracing::info!(bytes, free, reserve, "a text encoder is read only when a new prompt comes");
            }
        }
        Ok(())
    }
}

impl fmt::Display for TextEncoders {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for TextEncoders {
    type Err = Error;

    fn from_str(word: &str) -> Result<Self> {
        let all = [Self::Keep, Self::Drop, Self::Auto];
        let found = all.into_iter().find(|policy| policy.as_str() == word);
        found.ok_or_else(|| Error::request("text_encoders", "`keep`, `drop` or `auto`", format!("`{word}`")))
    }
}

/// What a checkpoint's text encoders take and did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EncoderCounts {
    /// About how many bytes their weights take all together.
    pub bytes: usize,
    /// Of those, the ones that are in memory now.
    pub held_bytes: usize,
    /// How often weights were read; each encoder that stays is read once.
    pub reads: u64,
}

pub(super) fn counts(family: &dyn Family) -> EncoderCounts {
    let encoders = family.encoders();
    let weights = || encoders.iter().map(|encoder| encoder.weights());
    EncoderCounts {
        bytes: weights().map(|weights| weights.weight_bytes()).sum(),
        held_bytes: weights().map(|weights| weights.held_bytes()).sum(),
        reads: weights().map(|weights| weights.reads()).sum(),
    }
}

/// Lets those encoders go that do not stay.
pub(super) fn let_go(family: &dyn Family) {
    let gone = family.encoders().into_iter().filter(|encoder| encoder.weights().let_go()).count();
    if gone > 0 {
        // Their memory would else be kept for whatever is as large, which nothing is.
        ops::release_memory();
    }
}

/// Fills the cache with what `joining` rows listen to, one encoder after the other, so that two never share the
/// memory; does nothing for encoders that are in memory or that have nothing new to encode. What `waiting` rows will
/// listen to is encoded along with it, as far as the cache holds all of it and for as long as the reading itself took:
/// one reading for many rows, and rows that run stand still for little longer than they have to. What goes wrong will
/// show again when the row joins that it concerns.
pub(super) fn prepare(
    family: &dyn Family,
    cache: &EmbeddingCache,
    device: &Device,
    [joining, waiting]: [&[RowRequest]; 2],
) {
    let encoders = family.encoders();
    if encoders.iter().all(|encoder| encoder.weights().are_held()) {
        return;
    }
    let wanted = wanted(family, &encoders, cache.most_bytes(), [joining, waiting]);
    for (place, encoder) in encoders.iter().enumerate() {
        let mine = wanted.iter().filter(|wanted| wanted.encoder == place);
        // All that is wanted is used now, so that none of it makes way for the rest.
        let missing: Vec<&Wanted> = mine.filter(|wanted| !cache.touch(&wanted.key)).collect();
        let (weights, begun) = (encoder.weights(), Instant::now());
        if weights.are_held() || !missing.iter().any(|wanted| wanted.now) || weights.read().is_err() {
            continue;
        }
        let patience = begun.elapsed().max(LEAST_PATIENCE);
        let mut ahead = None;
        for Wanted { key, now, .. } in missing {
            // Those that are needed now come first.
            if !now && ahead.get_or_insert_with(Instant::now).elapsed() > patience {
                break;
            }
            if let Ok(embedding) = device.run(|| encoder.forward(key)) {
                cache.put_ahead(key.clone(), &embedding);
            }
        }
        if weights.let_go() {
            ops::release_memory();
        }
    }
}

/// An embedding that a row will ask for.
struct Wanted {
    /// Its encoder's number.
    encoder: usize,
    key: Key,
    /// Whether the row is about to join.
    now: bool,
}

/// What the rows ask for, row by row, as long as it fits into a cache of `most_bytes` together.
fn wanted(
    family: &dyn Family,
    encoders: &[&dyn TextEncoder],
    most_bytes: usize,
    [joining, waiting]: [&[RowRequest]; 2],
) -> Vec<Wanted> {
    let (mut all, mut seen, mut bytes) = (Vec::new(), HashSet::new(), 0);
    let requests = joining.iter().map(|request| (request, true)).chain(waiting.iter().map(|request| (request, false)));
    for (request, now) in requests {
        let Ok(tokens) = family.tokens(request) else { continue };
        let of_row = family.prompts(request).into_iter().flat_map(|prompt| {
            encoders.iter().enumerate().map(move |(place, encoder)| (place, encoder.key(prompt, tokens)))
        });
        let of_row: Vec<(usize, Key)> = of_row.filter(|(_, key)| seen.insert(key.clone())).collect();
        bytes +=
            of_row.iter().map(|(place, key)| encoders[*place].embedding_bytes(key) + key.prompt.len()).sum::<usize>();
        if bytes > most_bytes {
            break;
        }
        all.extend(of_row.into_iter().map(|(encoder, key)| Wanted { encoder, key, now }));
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn encoders_stay_if_there_is_room_for_them_and_a_picture() {
        let free = |bytes| move || Some(bytes);
        assert!(TextEncoders::Auto.keeps(10, free(15), 5) && !TextEncoders::Auto.keeps(10, free(14), 5));
        assert!(TextEncoders::Auto.keeps(usize::MAX, || None, 5), "a device that does not say");
        assert!(!TextEncoders::Auto.keeps(usize::MAX, free(usize::MAX - 1), 5));
        assert!(TextEncoders::Keep.keeps(10, free(0), 5) && !TextEncoders::Drop.keeps(10, free(100), 5));
    }

    #[test]
    fn words_are_read_and_others_refused() {
        for policy in [TextEncoders::Keep, TextEncoders::Drop, TextEncoders::Auto] {
            assert_eq!(policy.to_string().parse::<TextEncoders>().unwrap(), policy);
        }
        let error = "never".parse::<TextEncoders>().unwrap_err().to_string();
        assert_eq!(error, "`text_encoders` must be `keep`, `drop` or `auto`, but is `never`");
    }
}
