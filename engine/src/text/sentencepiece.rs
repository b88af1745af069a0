//! A `spiece.model` file: the little of SentencePiece's protocol buffer that a T5 tokenizer is made of.
//!
//! Reference: <https://github.com/google/sentencepiece/blob/v0.2.0/src/sentencepiece_model.proto>

use std::path::Path;

use tokenizers::AddedToken;
use tokenizers::normalizers::Precompiled;

use super::t5_tokenizer::Vocabulary;
use crate::{Error, Result};

/// Tokens that T5's vocabulary has beyond those of the file.
const EXTRA_IDS: usize = 100;

/// What a piece is: control tokens, and those that the trainer was given, are not cut.
const CONTROL: u64 = 3;
const USER_DEFINED: u64 = 4;

/// The only way of cutting that T5 knows.
const UNIGRAM: u64 = 1;

/// Reads the file, and appends T5's extra tokens.
pub(super) fn read(path: &Path) -> Result<Vocabulary> {
    let bytes = std::fs::read(path).map_err(|error| Error::checkpoint(path, error))?;
    let refuse = |problem: &str| Error::checkpoint(path, problem);
    let (mut vocabulary, kind) = parse(&bytes).ok_or_else(|| refuse("is not a SentencePiece model"))?;
    if kind != UNIGRAM {
        return Err(refuse(&format!("`model_type` must be {UNIGRAM} (unigram), but is {kind}")));
    }
    if vocabulary.pieces.len() < 3 {
        return Err(refuse("is not a SentencePiece model: it has no pieces"));
    }
    for id in (0..EXTRA_IDS).rev() {
        let name = format!("<extra_id_{id}>");
        vocabulary.added.push(AddedToken::from(name.clone(), true));
        vocabulary.pieces.push((name, 0.0));
    }
    Ok(vocabulary)
}

/// The vocabulary, and what kind of model it is for; `None` where the bytes are no such message.
fn parse(bytes: &[u8]) -> Option<(Vocabulary, u64)> {
    let mut model = UNIGRAM;
    let mut vocabulary = Vocabulary { pieces: Vec::new(), normalizer: None, added: Vec::new() };
    let mut fields = Fields { rest: bytes };
    while let Some(field) = fields.next()? {
        match field {
            (1, Content::Bytes(piece)) => {
                let (piece, score, kind) = parse_piece(piece)?;
                if [CONTROL, USER_DEFINED].contains(&kind) {
                    vocabulary.added.push(AddedToken::from(piece.clone(), kind == CONTROL).normalized(false));
                }
                vocabulary.pieces.push((piece, score));
            }
            (2, Content::Bytes(trainer)) => model = number(trainer, 3)?.unwrap_or(UNIGRAM),
            (3, Content::Bytes(normalizer)) => {
                let mut fields = Fields { rest: normalizer };
                while let Some(field) = fields.next()? {
                    if let (2, Content::Bytes(map)) = field
                        && !map.is_empty()
                    {
                        vocabulary.normalizer = Some(Precompiled::from(map).ok()?);
                    }
                }
            }
            _ => {}
        }
    }
    Some((vocabulary, model))
}

/// A piece's text, score and kind.
fn parse_piece(bytes: &[u8]) -> Option<(String, f64, u64)> {
    let (mut text, mut score, mut kind) = (None, 0.0, 1);
    let mut fields = Fields { rest: bytes };
    while let Some(field) = fields.next()? {
        match field {
            (1, Content::Bytes(bytes)) => text = Some(std::str::from_utf8(bytes).ok()?.to_owned()),
            (2, Content::Four(bytes)) => score = f64::from(f32::from_le_bytes(bytes)),
            (3, Content::Number(number)) => kind = number,
            _ => {}
        }
    }
    Some((text?, score, kind))
}

/// The last number of this field; `None` where the bytes are no message.
fn number(bytes: &[u8], wanted: u64) -> Option<Option<u64>> {
    let (mut fields, mut found) = (Fields { rest: bytes }, None);
    while let Some(field) = fields.next()? {
        match field {
            (id, Content::Number(number)) if id == wanted => found = Some(number),
            _ => {}
        }
    }
    Some(found)
}

/// A message's fields, one after the other.
struct Fields<'a> {
    rest: &'a [u8],
}

enum Content<'a> {
    Number(u64),
    Four([u8; 4]),
    Eight,
    Bytes(&'a [u8]),
}

impl<'a> Fields<'a> {
    /// The next field's number and content; `Some(None)` at the end, `None` where the bytes are no message.
    fn next(&mut self) -> Option<Option<(u64, Content<'a>)>> {
        if self.rest.is_empty() {
            return Some(None);
        }
        let key = self.varint()?;
        let content = match key & 7 {
            0 => Content::Number(self.varint()?),
            1 => {
                self.take(8)?;
                Content::Eight
            }
            2 => {
                let len = usize::try_from(self.varint()?).ok()?;
                Content::Bytes(self.take(len)?)
            }
            5 => Content::Four(self.take(4)?.try_into().ok()?),
            _ => return None,
        };
        Some(Some((key >> 3, content)))
    }

    fn take(&mut self, len: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.rest.split_at_checked(len)?;
        self.rest = rest;
        Some(taken)
    }

    /// Seven bits in each byte, the lowest first.
    fn varint(&mut self) -> Option<u64> {
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let byte = self.take(1)?[0];
            value |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Some(value);
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A field that holds bytes.
    fn field(id: u8, content: &[u8]) -> Vec<u8> {
        [&[id << 3 | 2, u8::try_from(content.len()).unwrap()], content].concat()
    }

    fn piece(text: &str, score: f32, kind: u8) -> Vec<u8> {
        field(1, &[field(1, text.as_bytes()), [&[0x15], &score.to_le_bytes()[..]].concat(), vec![0x18, kind]].concat())
    }

    fn file(messages: &[Vec<u8>]) -> (tempfile::TempDir, std::path::PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("spiece.model");
        std::fs::write(&path, messages.concat()).unwrap();
        (folder, path)
    }

    fn pieces() -> Vec<u8> {
        [piece("<pad>", 0.0, 3), piece("</s>", 0.0, 3), piece("<unk>", 0.0, 2), piece("▁a", -1.5, 1)].concat()
    }

    #[test]
    fn pieces_come_in_order_with_their_scores_and_the_extra_tokens_behind_them() {
        // Fields that are of no interest are passed over.
        let trainer = field(2, &[0x18, 1, 0x51, 0, 0, 0, 0, 0, 0, 0, 0, 0x85, 1, 1, 2, 3, 4]);
        let (_folder, path) = file(&[pieces(), trainer]);
        let vocabulary = read(&path).unwrap();
        assert_eq!(vocabulary.pieces.len(), 4 + EXTRA_IDS);
        assert_eq!(vocabulary.pieces[3], ("▁a".to_owned(), -1.5));
        assert_eq!(vocabulary.pieces[4].0, "<extra_id_99>");
        let added: Vec<&str> = vocabulary.added.iter().map(|token| token.content.as_str()).collect();
        assert_eq!(added[..3], ["<pad>", "</s>", "<extra_id_99>"]);
    }

    #[test]
    fn a_model_that_is_no_unigram_is_refused() {
        let (_folder, path) = file(&[pieces(), field(2, &[0x18, 2])]);
        let error = read(&path).err().unwrap().to_string();
        assert!(error.contains("`model_type` must be 1 (unigram), but is 2"), "{error}");
    }

    #[test]
    fn broken_bytes_are_refused_and_do_not_panic() {
        let whole = [pieces(), field(3, &field(2, &[1, 2, 3, 4]))].concat();
        for len in 0..whole.len() {
            let (_folder, path) = file(&[whole[..len].to_vec()]);
            if let Err(error) = read(&path) {
                assert!(error.to_string().contains("SentencePiece"), "{len}: {error}");
            }
        }
        for bytes in
            [vec![], vec![0xff; 30], vec![0x0a, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1], whole]
        {
            let (_folder, path) = file(&[bytes]);
            assert!(read(&path).err().unwrap().to_string().contains("is not a SentencePiece model"));
        }
    }
}
