//! CLIP's byte-pair tokenizer, as transformers' `CLIPTokenizer` builds it from a folder: whatever file
//! the vocabulary comes from, the text is normalised and cut by CLIP's own rules.
//!
//! Reference: <https://github.com/huggingface/transformers/blob/v5.0.0/src/transformers/models/clip/tokenization_clip.py>

use std::collections::BTreeMap;
use std::io::Read;
use std::path::Path;

use flate2::read::GzDecoder;
use serde_json::Value;
use tokenizers::models::bpe::{BPE, Merges, Vocab};
use tokenizers::normalizers::replace::ReplacePattern;
use tokenizers::normalizers::{Lowercase, NFC, Replace, Sequence as Normalizers};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence as PreTokenizers;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{AddedToken, SplitDelimiterBehavior};

use crate::config::ConfigFile;
use crate::{Error, Result};

const START: &str = "<|startoftext|>";
const END: &str = "<|endoftext|>";

/// What one word or number or run of signs is, before byte pairs are merged.
const WORDS: &str = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+";

/// The byte pairs of OpenAI's CLIP, most frequent first; see the README beside them.
const VOCABULARY: &str = "bpe_simple_vocab_16e6.txt.gz";
const CLIP_PAIRS: &[u8] = include_bytes!("../../assets/clip/bpe_simple_vocab_16e6.txt.gz");
/// As many of them as CLIP uses: its vocabulary without the bytes and the two special tokens.
const CLIP_MERGES: usize = 49_152 - 256 - 2;

/// Turns prompts into a fixed number of token ids.
pub(crate) struct ClipTokenizer {
    inner: tokenizers::Tokenizer,
    start: u32,
    end: u32,
    pad: u32,
    length: usize,
}

/// The special tokens by their role, as the folder's files name them.
struct Special {
    /// In transformers' order: `bos_token`, `eos_token`, `unk_token`, `pad_token`.
    roles: BTreeMap<usize, AddedToken>,
    /// Further tokens with their properties, by id.
    added: BTreeMap<u64, AddedToken>,
    model_max_length: Option<u64>,
}

const ROLES: [(&str, &str); 4] = [("bos_token", START), ("eos_token", END), ("unk_token", END), ("pad_token", END)];

impl ClipTokenizer {
    /// Reads `tokenizer.json`, or `vocab.json` with `merges.txt`, and the special tokens of
    /// `tokenizer_config.json` and `special_tokens_map.json`. Prompts become `most` ids at most.
    pub fn load(folder: &Path, most: usize, vocabulary: usize) -> Result<Self> {
        let (vocab, merges, listed) = read_vocabulary(folder)?;
        Self::build(folder, (vocab, merges), &Special::read(folder, listed)?, most, vocabulary)
    }

    /// CLIP's own, for files that leave it out. Prompts are padded with `pad`.
    pub fn known(pad: &str, most: usize, vocabulary: usize) -> Result<Self> {
        Self::build(Path::new(VOCABULARY), clip_vocabulary()?, &Special::known(pad), most, vocabulary)
    }

    fn build(
        origin: &Path,
        (vocab, merges): (Vocab, Merges),
        special: &Special,
        most: usize,
        vocabulary: usize,
    ) -> Result<Self> {
        let refuse = |problem: String| Error::checkpoint(origin, problem);
        let role = |index: usize| special.roles[&index].content.clone();
        let text = |error: tokenizers::Error| refuse(error.to_string());

        let bpe = BPE::builder()
            .vocab_and_merges(vocab, merges)
            .continuing_subword_prefix(String::new())
            .end_of_word_suffix("</w>".to_owned())
            .fuse_unk(false)
            .unk_token(role(2))
            .build()
            .map_err(|error| refuse(format!("the tokenizer's merges do not fit its vocabulary: {error}")))?;
        let mut inner = tokenizers::Tokenizer::new(bpe);
        let spaces = Replace::new(ReplacePattern::Regex(r"\s+".to_owned()), " ").map_err(text)?;
        let normalizers = Normalizers::new(vec![NFC.into(), spaces.into(), Lowercase.into()]);
        inner.with_normalizer(Some(normalizers)).map_err(text)?;
        let words = Split::new(SplitPattern::Regex(WORDS.to_owned()), SplitDelimiterBehavior::Removed, true);
        let bytes = ByteLevel::new(false, true, true);
        inner.with_pre_tokenizer(Some(PreTokenizers::new(vec![words.map_err(text)?.into(), bytes.into()])));
        inner.add_tokens(special.in_order()).map_err(text)?;

        let id = |index: usize| {
            let token = role(index);
            let id = inner.token_to_id(&token).filter(|id| (*id as usize) < vocabulary);
            id.ok_or_else(|| {
                refuse(format!(
                    "`{}` is `{token}`, which the text encoder's vocabulary of {vocabulary} lacks",
                    ROLES[index].0
                ))
            })
        };
        let (start, end, pad) = (id(0)?, id(1)?, id(3)?);
        let largest = inner.get_vocab(true).into_values().max().unwrap_or(0) as usize;
        if largest >= vocabulary {
            return Err(refuse(format!(
                "the tokenizer has token id {largest}, the text encoder only {vocabulary} embeddings"
            )));
        }
        let length = special.model_max_length.map_or(most, |length| most.min(usize::try_from(length).unwrap_or(most)));
        if length < 2 {
            return Err(refuse(format!("`model_max_length` must be at least 2, but is {length}")));
        }
        Ok(Self { inner, start, end, pad, length })
    }

    /// How many ids every text becomes.
    pub fn tokens(&self) -> usize {
        self.length
    }

    /// The ids of `text`: start, words, end, then padding; a long text loses its last words and keeps
    /// the end.
    pub fn ids(&self, text: &str) -> Result<Vec<u32>> {
        let encoding = self
            .inner
            .encode_fast(text, false)
            .map_err(|error| Error::request("prompt", "text that can be tokenized", error))?;
        let words = encoding.get_ids();
        let mut ids = Vec::with_capacity(self.length);
        ids.push(self.start);
        ids.extend(words.iter().take(self.length - 2));
        ids.push(self.end);
        ids.resize(self.length, self.pad);
        Ok(ids)
    }
}

/// CLIP's vocabulary: all bytes, all bytes that end a word, the merges in their order, start and end.
fn clip_vocabulary() -> Result<(Vocab, Merges)> {
    let refuse = |problem: String| Error::checkpoint(VOCABULARY, problem);
    let mut text = String::new();
    GzDecoder::new(CLIP_PAIRS).read_to_string(&mut text).map_err(|error| refuse(error.to_string()))?;
    let lines = text.lines().skip(1).take(CLIP_MERGES);
    let merges: Option<Merges> =
        lines.map(|line| line.split_once(' ').map(|(left, right)| (left.to_owned(), right.to_owned()))).collect();
    let merges = merges.filter(|merges| merges.len() == CLIP_MERGES);
    let merges = merges.ok_or_else(|| refuse(format!("must hold {CLIP_MERGES} pairs")))?;
    let bytes = byte_signs();
    let ends = bytes.iter().map(|sign| format!("{sign}</w>"));
    let merged = merges.iter().map(|(left, right)| format!("{left}{right}"));
    let tokens = bytes.iter().map(char::to_string).chain(ends).chain(merged).chain([START, END].map(str::to_owned));
    let vocab = tokens.zip(0..).collect();
    Ok((vocab, merges))
}

/// The sign that stands for each byte, in the order of their ids: bytes that can be printed stand for
/// themselves and come first.
fn byte_signs() -> Vec<char> {
    let printed = |byte: &u8| matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    let others = (0..=u8::MAX).filter(|byte| !printed(byte)).zip(256u32..);
    let others = others.filter_map(|(_, sign)| char::from_u32(sign));
    (0..=u8::MAX).filter(printed).map(char::from).chain(others).collect()
}

/// The vocabulary and merges, and the added tokens that `tokenizer.json` lists.
fn read_vocabulary(folder: &Path) -> Result<(Vocab, Merges, Vec<Value>)> {
    let path = folder.join("tokenizer.json");
    if let Some(json) = ConfigFile::read_if_present(&path)? {
        let model = json.get("model").and_then(Value::as_object);
        let vocab = model.and_then(|model| model.get("vocab")).and_then(Value::as_object);
        let vocab = vocab.and_then(|vocab| {
            vocab.iter().map(|(token, id)| Some((token.clone(), u32::try_from(id.as_u64()?).ok()?))).collect()
        });
        let vocab: Vocab = vocab.ok_or_else(|| Error::checkpoint(&path, "`model.vocab` must be an object of ids"))?;
        let merges = model.and_then(|model| model.get("merges")).and_then(Value::as_array);
        let merges: Option<Merges> = merges.and_then(|merges| merges.iter().map(merge).collect());
        let merges = merges.ok_or_else(|| Error::checkpoint(&path, "`model.merges` must be a list of pairs"))?;
        let added = json.get("added_tokens").and_then(Value::as_array).cloned().unwrap_or_default();
        return Ok((vocab, merges, added));
    }
    let (vocab, merges) = (folder.join("vocab.json"), folder.join("merges.txt"));
    if !vocab.exists() || !merges.exists() {
        return Err(Error::checkpoint(folder, "has neither `tokenizer.json` nor `vocab.json` with `merges.txt`"));
    }
    let read = BPE::read_file(&vocab.to_string_lossy(), &merges.to_string_lossy());
    let (vocab, merges) =
        read.map_err(|error| Error::checkpoint(folder, format!("vocab.json and merges.txt: {error}")))?;
    Ok((vocab, merges, Vec::new()))
}

/// A merge is a pair, or both joined by a space.
fn merge(value: &Value) -> Option<(String, String)> {
    match value {
        Value::String(text) => text.split_once(' ').map(|(left, right)| (left.to_owned(), right.to_owned())),
        Value::Array(pair) => match pair.as_slice() {
            [Value::String(left), Value::String(right)] => Some((left.clone(), right.clone())),
            _ => None,
        },
        _ => None,
    }
}

impl Special {
    /// Later files win: the configuration, then (unless that lists its added tokens itself) the map
    /// of special tokens and the tokens listed in `tokenizer.json`.
    fn read(folder: &Path, listed: Vec<Value>) -> Result<Self> {
        let config = ConfigFile::read_if_present(&folder.join("tokenizer_config.json"))?;
        let map = ConfigFile::read_if_present(&folder.join("special_tokens_map.json"))?;
        let decoder = config.as_ref().and_then(|config| config.get("added_tokens_decoder")).and_then(Value::as_object);
        let mut added = BTreeMap::new();
        match decoder {
            Some(decoder) => {
                for (id, token) in decoder {
                    let entry = id.parse().ok().zip(added_token(token));
                    let (id, token) = entry.ok_or_else(|| {
                        Error::checkpoint(
                            folder,
                            format!("`added_tokens_decoder` holds `{id}`: {token}, which is no token"),
                        )
                    })?;
                    added.insert(id, token);
                }
            }
            None => {
                for token in &listed {
                    if let Some((id, token)) = token.get("id").and_then(Value::as_u64).zip(added_token(token)) {
                        added.insert(id, token);
                    }
                }
            }
        }
        let sources = if decoder.is_some() { [None, config.as_ref()] } else { [map.as_ref(), config.as_ref()] };
        let mut roles = BTreeMap::new();
        for (index, (role, default)) in ROLES.iter().enumerate() {
            let named = sources.into_iter().flatten().find_map(|file| file.get(role).map(|value| (file, value)));
            let token = match named {
                None => AddedToken::from(*default, true),
                Some((file, value)) => added_token(value).ok_or_else(|| file.refuse(role, "a token"))?,
            };
            let known = added.values().find(|known| known.content == token.content);
            roles.insert(index, known.cloned().unwrap_or(token));
        }
        let model_max_length = config.as_ref().and_then(|config| config.get("model_max_length"));
        Ok(Self { roles, added, model_max_length: model_max_length.and_then(Value::as_u64) })
    }

    /// CLIP's own, with another token to pad with.
    fn known(pad: &str) -> Self {
        let tokens = [START, END, END, pad].map(|content| AddedToken::from(content, true));
        Self { roles: tokens.into_iter().enumerate().collect(), added: BTreeMap::new(), model_max_length: None }
    }

    /// Those with ids in their order, then the roles that these lack. Two roles may name one text with
    /// different properties; the later one's hold, as in transformers.
    fn in_order(&self) -> Vec<AddedToken> {
        let listed = |token: &AddedToken| self.added.values().any(|known| known.content == token.content);
        let roles = self.roles.values().filter(|token| !listed(token));
        self.added.values().chain(roles).cloned().collect()
    }
}

/// A token given as a string, or as an object with its properties.
pub(super) fn added_token(value: &Value) -> Option<AddedToken> {
    match value {
        Value::String(content) => Some(AddedToken::from(content.clone(), true)),
        Value::Object(fields) => {
            let flag = |name: &str, default: bool| fields.get(name).and_then(Value::as_bool).unwrap_or(default);
            let content = fields.get("content")?.as_str()?;
            let token = AddedToken::from(content, true)
                .single_word(flag("single_word", false))
                .lstrip(flag("lstrip", false))
                .rstrip(flag("rstrip", false))
                .normalized(flag("normalized", !flag("special", true)));
            Some(token)
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn demo() -> ClipTokenizer {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../demo/model/tokenizer");
        ClipTokenizer::load(&folder, 77, 632).unwrap()
    }

    #[test]
    fn an_empty_prompt_is_start_end_and_padding() {
        let ids = demo().ids("").unwrap();
        assert_eq!(ids.len(), 77);
        assert_eq!(ids[..2], [630, 631]);
        assert!(ids[2..].iter().all(|id| *id == 631));
    }

    #[test]
    fn a_long_prompt_keeps_its_beginning_and_the_end_token() {
        let tokenizer = demo();
        let long = tokenizer.ids(&"a red star ".repeat(2000)).unwrap();
        assert_eq!(long.len(), 77);
        assert_eq!((long[0], long[76]), (630, 631));
        let short = tokenizer.ids("a red star a red star").unwrap();
        assert_eq!(long[..7], short[..7]);
        assert!(long[1..76].iter().all(|id| *id < 630));
    }

    #[test]
    fn case_and_white_space_do_not_matter() {
        let tokenizer = demo();
        assert_eq!(tokenizer.ids("  A RED\n\tStar ").unwrap(), tokenizer.ids("a red star").unwrap());
    }

    #[test]
    fn the_last_role_decides_whether_an_end_token_in_capitals_is_one() {
        let folder = tempfile::tempdir().unwrap();
        let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("../demo/model/tokenizer");
        for name in ["vocab.json", "merges.txt"] {
            std::fs::copy(demo.join(name), folder.path().join(name)).unwrap();
        }
        let end = serde_json::json!({"content": END, "normalized": true, "lstrip": false, "rstrip": false, "single_word": false});
        for (pad, is_end) in [(serde_json::json!("!"), true), (serde_json::json!(END), false), (end.clone(), true)] {
            let map = serde_json::json!({"eos_token": end, "unk_token": end, "pad_token": pad});
            std::fs::write(folder.path().join("special_tokens_map.json"), map.to_string()).unwrap();
            let ids = ClipTokenizer::load(folder.path(), 77, 632).unwrap().ids("<|ENDOFTEXT|> star").unwrap();
            assert_eq!(ids[1] == 631, is_end, "{pad}");
        }
    }

    #[test]
    fn clips_own_vocabulary_gives_the_token_ids_of_transformers() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/original/tokens.json");
        let golden: Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
        for pad in ["!", END] {
            let tokenizer = ClipTokenizer::known(pad, 77, 49_408).unwrap();
            let prompts = golden["prompts"].as_array().unwrap().iter().map(|prompt| prompt.as_str().unwrap());
            let expected = golden["ids"][pad].as_array().unwrap();
            assert!(expected.len() >= 6);
            for (prompt, expected) in prompts.zip(expected) {
                assert_eq!(serde_json::json!(tokenizer.ids(prompt).unwrap()), *expected, "{pad}: {prompt}");
            }
        }
    }

    #[test]
    fn a_vocabulary_larger_than_the_encoder_is_refused() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../demo/model/tokenizer");
        let error = ClipTokenizer::load(&folder, 77, 500).err().unwrap().to_string();
        assert!(error.contains("vocabulary of 500 lacks"), "{error}");
    }

    #[test]
    fn a_folder_without_a_vocabulary_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let error = ClipTokenizer::load(folder.path(), 77, 500).err().unwrap().to_string();
        assert!(error.contains("neither `tokenizer.json` nor `vocab.json`"), "{error}");
        std::fs::write(folder.path().join("vocab.json"), "{\"a\": 0").unwrap();
        std::fs::write(folder.path().join("merges.txt"), "a b\n").unwrap();
        let error = ClipTokenizer::load(folder.path(), 77, 500).err().unwrap().to_string();
        assert!(error.contains("vocab.json and merges.txt"), "{error}");
    }
}
