//! T5's unigram tokenizer, as transformers' `T5Tokenizer` builds it from a folder: whatever file the vocabulary
//! comes from, the text is cut by T5's own rules.
//!
//! Reference: <https://github.com/huggingface/transformers/blob/v5.0.0/src/transformers/models/t5/tokenization_t5.py>

use std::path::Path;

use serde_json::Value;
use tokenizers::models::unigram::Unigram;
use tokenizers::normalizers::Precompiled;
use tokenizers::pre_tokenizers::metaspace::{Metaspace, PrependScheme};
use tokenizers::pre_tokenizers::sequence::Sequence as PreTokenizers;
use tokenizers::pre_tokenizers::whitespace::WhitespaceSplit;
use tokenizers::{AddedToken, Tokenizer};

use super::clip_tokenizer::added_token;
use super::sentencepiece;
use crate::config::ConfigFile;
use crate::{Error, Result};

/// What stands for text that no piece covers; the same place in every T5 vocabulary.
const UNKNOWN: usize = 2;

/// The roles of special tokens, and their names where the folder gives no others.
const ROLES: [(&str, &str); 3] = [("eos_token", "</s>"), ("unk_token", "<unk>"), ("pad_token", "<pad>")];

/// Turns prompts into a fixed number of token ids.
pub(crate) struct T5Tokenizer {
    inner: Tokenizer,
    end: u32,
    pad: u32,
}

/// What a folder's files say of the vocabulary.
pub(super) struct Vocabulary {
    /// By id, with the logarithms of their probabilities.
    pub pieces: Vec<(String, f64)>,
    /// How characters are normalised.
    pub normalizer: Option<Precompiled>,
    /// Tokens that are not cut.
    pub added: Vec<AddedToken>,
}

impl T5Tokenizer {
    /// Reads `tokenizer.json`, or `spiece.model`, and the special tokens of `tokenizer_config.json`.
    /// `vocabulary` is the encoder's.
    pub fn load(folder: &Path, vocabulary: usize) -> Result<Self> {
        let refuse = |problem: String| Error::checkpoint(folder, problem);
        let text = |error: tokenizers::Error| refuse(error.to_string());
        let config = ConfigFile::read_if_present(&folder.join("tokenizer_config.json"))?;
        let Vocabulary { pieces, normalizer, added } = read_vocabulary(folder)?;
        let largest = pieces.len().saturating_sub(1);
        if largest >= vocabulary {
            return Err(refuse(format!(
                "the tokenizer has token id {largest}, the text encoder only {vocabulary} embeddings"
            )));
        }
        let known = |name: &str| pieces.iter().position(|(piece, _)| piece == name);
        let mut roles = Vec::new();
        for (role, default) in ROLES {
            let named = config.as_ref().and_then(|config| config.get(role));
            let token = match named {
                None => AddedToken::from(default, true),
                Some(value) => {
                    added_token(value).ok_or_else(|| refuse(format!("`{role}` must be a token, but is {value}")))?
                }
            };
            let id = known(&token.content).and_then(|id| u32::try_from(id).ok());
            let id = id.ok_or_else(|| {
                refuse(format!("`{role}` is `{}`, which the tokenizer's vocabulary lacks", token.content))
            })?;
            roles.push((token, id));
        }

        let unigram = Unigram::from(pieces, Some(UNKNOWN), false).map_err(text)?;
        let mut inner = Tokenizer::new(unigram);
        inner.with_normalizer(normalizer).map_err(text)?;
        let words = Metaspace::new('▁', PrependScheme::Always, true);
        inner.with_pre_tokenizer(Some(PreTokenizers::new(vec![WhitespaceSplit.into(), words.into()])));
        let (end, pad) = (roles[0].1, roles[2].1);
        let listed = listed_tokens(folder, config.as_ref())?.unwrap_or(added);
        let missing: Vec<AddedToken> = (roles.into_iter().map(|(token, _)| token))
            .filter(|token| !listed.iter().any(|listed| listed.content == token.content))
            .collect();
        inner.add_tokens(missing.into_iter().chain(listed)).map_err(text)?;
        let largest = inner.get_vocab(true).into_values().max().unwrap_or(0) as usize;
        if largest >= vocabulary {
            return Err(refuse(format!(
                "the tokenizer has token id {largest}, the text encoder only {vocabulary} embeddings"
            )));
        }
        Ok(Self { inner, end, pad })
    }

    /// `length` ids of `text`: its pieces, the end, then padding; a long text loses its last pieces and
    /// keeps the end.
    pub fn ids(&self, text: &str, length: usize) -> Result<Vec<u32>> {
        let encoding = self
            .inner
            .encode_fast(text, false)
            .map_err(|error| Error::request("prompt", "text that can be tokenized", error))?;
        let mut ids: Vec<u32> = encoding.get_ids().iter().copied().take(length.saturating_sub(1)).collect();
        ids.push(self.end);
        ids.resize(length, self.pad);
        Ok(ids)
    }
}

fn read_vocabulary(folder: &Path) -> Result<Vocabulary> {
    let path = folder.join("tokenizer.json");
    if let Some(json) = ConfigFile::read_if_present(&path)? {
        return from_json(&json);
    }
    let path = folder.join("spiece.model");
    if path.exists() {
        return sentencepiece::read(&path);
    }
    Err(Error::checkpoint(folder, "has neither `tokenizer.json` nor `spiece.model`"))
}

/// Pieces, character map and added tokens of a `tokenizer.json`.
fn from_json(json: &ConfigFile) -> Result<Vocabulary> {
    let refuse = |problem: &str| Error::checkpoint(json.path(), problem);
    let model = json.get("model").and_then(Value::as_object);
    let pieces = model.and_then(|model| model.get("vocab")).and_then(Value::as_array);
    let piece = |value: &Value| Some((value.get(0)?.as_str()?.to_owned(), value.get(1)?.as_f64()?));
    let pieces: Option<Vec<(String, f64)>> = pieces.and_then(|pieces| pieces.iter().map(piece).collect());
    let pieces = pieces.ok_or_else(|| refuse("`model.vocab` must be a list of pieces with their scores"))?;
    if pieces.len() <= UNKNOWN {
        return Err(refuse("`model.vocab` must have a piece for what is unknown, its third"));
    }
    let normalizer = json.get("normalizer");
    let steps = normalizer.and_then(|normalizer| normalizer.get("normalizers")).and_then(Value::as_array);
    let mut steps = steps.map_or_else(|| normalizer.into_iter().collect(), |steps| steps.iter().collect::<Vec<_>>());
    steps.retain(|step| step.get("type").and_then(Value::as_str) == Some("Precompiled"));
    // From text: the map reads only borrowed strings.
    let normalizer = match steps.first().map(|step| serde_json::from_str::<Precompiled>(&step.to_string())) {
        None => None,
        Some(Ok(precompiled)) => Some(precompiled),
        Some(Err(_)) => return Err(refuse("`normalizer` holds a `precompiled_charsmap` that cannot be read")),
    };
    let added = json.get("added_tokens").and_then(Value::as_array);
    let added = added.map(|tokens| tokens.iter().filter_map(added_token).collect()).unwrap_or_default();
    Ok(Vocabulary { pieces, normalizer, added })
}

/// The tokens that `tokenizer_config.json` lists with their properties, by id.
fn listed_tokens(folder: &Path, config: Option<&ConfigFile>) -> Result<Option<Vec<AddedToken>>> {
    let decoder = config.and_then(|config| config.get("added_tokens_decoder")).and_then(Value::as_object);
    let Some(decoder) = decoder else { return Ok(None) };
    let mut tokens = Vec::with_capacity(decoder.len());
    for (id, token) in decoder {
        let entry = id.parse::<u32>().ok().zip(added_token(token));
        tokens.push(entry.ok_or_else(|| {
            Error::checkpoint(folder, format!("`added_tokens_decoder` holds `{id}`: {token}, which is no token"))
        })?);
    }
    tokens.sort_by_key(|(id, _)| *id);
    Ok(Some(tokens.into_iter().map(|(_, token)| token).collect()))
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use serde_json::json;

    use super::*;

    fn folder(name: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/checkpoints/t5").join(name)
    }

    fn refusal(folder: &Path, vocabulary: usize) -> String {
        T5Tokenizer::load(folder, vocabulary).err().expect("not a tokenizer").to_string()
    }

    #[test]
    fn an_empty_prompt_is_the_end_and_padding() {
        let tokenizer = T5Tokenizer::load(&folder("tokenizer"), 512).unwrap();
        assert_eq!(tokenizer.ids("", 5).unwrap(), [1, 0, 0, 0, 0]);
    }

    #[test]
    fn a_long_prompt_keeps_its_beginning_and_the_end() {
        let tokenizer = T5Tokenizer::load(&folder("tokenizer"), 512).unwrap();
        let long = tokenizer.ids(&"a red star ".repeat(2000), 64).unwrap();
        assert_eq!((long.len(), long[63]), (64, 1));
        assert!(long[..63].iter().all(|id| *id > 1));
        assert_eq!(long[..20], tokenizer.ids(&"a red star ".repeat(2000), 256).unwrap()[..20]);
    }

    #[test]
    fn a_piece_model_gives_the_ids_of_the_json_file() {
        let (json, pieces) =
            (T5Tokenizer::load(&folder("tokenizer"), 512).unwrap(), T5Tokenizer::load(&folder("pieces"), 512).unwrap());
        for text in ["", "a small red star", "ＡＢ Straße №5 …", "</s> <extra_id_3>x", "🐟 \t\n 123"] {
            assert_eq!(json.ids(text, 40).unwrap(), pieces.ids(text, 40).unwrap(), "{text:?}");
        }
    }

    #[test]
    fn a_vocabulary_larger_than_the_encoder_is_refused() {
        for name in ["tokenizer", "pieces"] {
            let text = refusal(&folder(name), 100);
            assert!(text.contains("the text encoder only 100 embeddings"), "{text}");
        }
    }

    #[test]
    fn a_folder_whose_files_are_no_tokenizer_is_refused() {
        let broken = tempfile::tempdir().unwrap();
        let text = refusal(broken.path(), 512);
        assert!(text.contains("neither `tokenizer.json` nor `spiece.model`"), "{text}");
        std::fs::write(broken.path().join("spiece.model"), [0x0a, 0x7f, 1]).unwrap();
        let text = refusal(broken.path(), 512);
        assert!(text.contains("spiece.model"), "{text}");
        let write = |json: Value| std::fs::write(broken.path().join("tokenizer.json"), json.to_string()).unwrap();
        for (json, named) in [
            (json!({"model": {"vocab": {"a": 1}}}), "`model.vocab` must be a list"),
            (json!({"model": {"vocab": [["a", 0.0]]}}), "its third"),
            (json!({"model": {"vocab": [["a", 0.0], ["b", 0.0], ["c", 0.0]]}}), "`eos_token` is `</s>`"),
            (
                json!({
                    "model": {"vocab": [["<pad>", 0.0], ["</s>", 0.0], ["<unk>", 0.0]]},
                    "normalizer": {"type": "Precompiled", "precompiled_charsmap": "?"},
                }),
                "`precompiled_charsmap` that cannot be read",
            ),
        ] {
            write(json);
            let text = refusal(broken.path(), 512);
            assert!(text.contains(named), "{text}");
        }
    }
}
