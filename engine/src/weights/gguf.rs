//! GGUF, the container that quantised weights come in: metadata, then names, formats and places of the
//! tensors, then their bytes. Everything a file claims is held against its length before it is believed.
//!
//! Reference: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>

use std::io::{BufReader, Read, Seek};
use std::ops::Range;

use crate::ops::{Quantisation, Stored as Format};

pub(super) const MAGIC: &[u8] = b"GGUF";

/// Versions that are alike in all that is read here; the first one had shorter counts.
const VERSIONS: [u32; 2] = [2, 3];

/// Where tensors start, unless the file says otherwise.
const ALIGNMENT: usize = 32;

/// No tensor has more.
const MOST_DIMENSIONS: u32 = 8;

/// The format's own limit for keys; names of tensors are shorter.
const LONGEST_NAME: u64 = 65_535;

/// Arrays of arrays of arrays: a file that goes deeper means harm.
const DEEPEST: usize = 4;

/// A tensor of the file.
pub(crate) struct Entry {
    pub name: String,
    /// Its format, or the word for one that cannot be read.
    pub format: Result<Format, String>,
    /// Outermost first; the file has it the other way round.
    pub shape: Vec<usize>,
    /// Where its bytes lie in the file.
    pub bytes: Range<usize>,
}

/// The tensors of a file of `len` bytes, or what is wrong with it.
pub(super) fn read(file: impl Read + Seek, len: usize) -> Result<Vec<Entry>, String> {
    let mut reader = Reader { file: BufReader::new(file), len: len as u64, at: 0 };
    reader.file.rewind().map_err(unreadable)?;
    reader.skip_bytes(MAGIC.len() as u64)?;
    let version = reader.u32()?;
    if !VERSIONS.contains(&version) {
        return Err(format!("is GGUF of version {version}, but only versions 2 and 3 can be read"));
    }
    let (tensors, pairs) = (reader.u64()?, reader.u64()?);
    let mut alignment = ALIGNMENT;
    for _ in 0..pairs {
        let (key, kind) = (reader.name()?, reader.u32()?);
        if key == "general.alignment" && kind == 4 {
            alignment = reader.u32()? as usize;
            if alignment == 0 || !alignment.is_multiple_of(8) {
                return Err(format!("`general.alignment` must be a multiple of 8, but is {alignment}"));
            }
        } else {
            reader.skip(kind, 0)?;
        }
    }
    // What a file claims is not reserved: a tensor that is not there ends the loop.
    let mut entries = Vec::new();
    for _ in 0..tensors {
        entries.push(reader.entry()?);
    }
    let start = (reader.at as usize).next_multiple_of(alignment);
    for entry in &mut entries {
        entry.place(start, alignment, len)?;
    }
    Ok(entries)
}

impl Entry {
    /// Counts the bytes from the start of the file, not of the data, whose length is `len`.
    fn place(&mut self, start: usize, alignment: usize, len: usize) -> Result<(), String> {
        let Range { start: offset, end } = self.bytes;
        if !offset.is_multiple_of(alignment) {
            return Err(format!("tensor `{}` does not start at a multiple of {alignment} but at {offset}", self.name));
        }
        let range = start.checked_add(offset).zip(start.checked_add(end));
        match range.filter(|(_, end)| *end <= len) {
            Some((first, end)) => self.bytes = first..end,
            None => return Err(format!("is not complete: tensor `{}` ends behind the file's {len} bytes", self.name)),
        }
        Ok(())
    }
}

fn unreadable(error: std::io::Error) -> String {
    format!("is not complete: its header cannot be read: {error}")
}

/// A place in a file that may end anywhere.
struct Reader<F: Read + Seek> {
    file: BufReader<F>,
    len: u64,
    at: u64,
}

impl<F: Read + Seek> Reader<F> {
    /// Goes on by `count` bytes, if there are as many.
    fn pass(&mut self, count: u64) -> Result<(), String> {
        let end = self.at.checked_add(count).filter(|end| *end <= self.len);
        self.at =
            end.ok_or_else(|| format!("is not complete: its header ends behind the file's {} bytes", self.len))?;
        Ok(())
    }

    fn fill(&mut self, to: &mut [u8]) -> Result<(), String> {
        self.file.read_exact(to).map_err(unreadable)
    }

    fn skip_bytes(&mut self, count: u64) -> Result<(), String> {
        self.pass(count)?;
        let offset = i64::try_from(count).map_err(|error| error.to_string())?;
        self.file.seek_relative(offset).map_err(unreadable)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], String> {
        let mut bytes = [0; N];
        self.pass(N as u64)?;
        self.fill(&mut bytes)?;
        Ok(bytes)
    }

    fn u32(&mut self) -> Result<u32, String> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn u64(&mut self) -> Result<u64, String> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    /// A key or a tensor's name.
    fn name(&mut self) -> Result<String, String> {
        let len = self.u64()?;
        self.pass(len)?;
        if len > LONGEST_NAME {
            return Err(format!("has a name of {len} bytes, but at most {LONGEST_NAME} are allowed"));
        }
        let mut bytes = vec![0; len as usize];
        self.fill(&mut bytes)?;
        String::from_utf8(bytes).map_err(|_| "has a name that is not UTF-8".to_owned())
    }

    /// Passes over a value of the metadata.
    fn skip(&mut self, kind: u32, depth: usize) -> Result<(), String> {
        match (kind, size_of_kind(kind)) {
            (_, Some(size)) => {
                self.skip_bytes(size)?;
            }
            (8, None) => {
                let len = self.u64()?;
                self.skip_bytes(len)?;
            }
            (9, None) if depth < DEEPEST => {
                let (kind, len) = (self.u32()?, self.u64()?);
                if let Some(size) = size_of_kind(kind) {
                    self.skip_bytes(len.saturating_mul(size))?;
                } else {
                    (0..len).try_for_each(|_| self.skip(kind, depth + 1))?;
                }
            }
            _ => return Err(format!("has metadata of kind {kind}, which is unknown or nested too deeply")),
        }
        Ok(())
    }

    /// A tensor's name, shape, format and place, its bytes counted from the start of the data.
    fn entry(&mut self) -> Result<Entry, String> {
        let name = self.name()?;
        let dimensions = self.u32()?;
        if dimensions > MOST_DIMENSIONS {
            return Err(format!(
                "tensor `{name}` must have at most {MOST_DIMENSIONS} dimensions, but has {dimensions}"
            ));
        }
        let mut shape = Vec::new();
        for _ in 0..dimensions {
            shape.push(usize::try_from(self.u64()?).map_err(|_| format!("tensor `{name}` is too large"))?);
        }
        shape.reverse();
        let (format, offset) = (format_of(self.u32()?), self.u64()?);
        let bytes = format.as_ref().map_or(Some(0), |format| bytes_of(*format, &shape)).ok_or_else(|| {
            format!("tensor `{name}` of shape {shape:?} is too large, or its lines are not whole blocks of its format")
        })?;
        let range = usize::try_from(offset).ok().and_then(|start| Some(start..start.checked_add(bytes)?));
        let bytes = range.ok_or_else(|| format!("tensor `{name}` starts too far behind, at {offset}"))?;
        Ok(Entry { name, format, shape, bytes })
    }
}

/// Bytes that a tensor takes, whose lines (the innermost dimension) must be whole blocks.
fn bytes_of(format: Format, shape: &[usize]) -> Option<usize> {
    let line = shape.last().copied().unwrap_or(1);
    let values = shape.iter().try_fold(1usize, |values, dim| values.checked_mul(*dim))?;
    line.is_multiple_of(format.block().0).then(|| format.bytes(values)).flatten()
}

/// Bytes of a value of the metadata, if all of its kind have as many.
fn size_of_kind(kind: u32) -> Option<u64> {
    match kind {
        0 | 1 | 7 => Some(1),
        2 | 3 => Some(2),
        4..=6 => Some(4),
        10..=12 => Some(8),
        _ => None,
    }
}

/// ggml's number for a format.
fn format_of(number: u32) -> Result<Format, String> {
    Ok(match number {
        0 => Format::F32,
        1 => Format::F16,
        28 => Format::F64,
        30 => Format::Bf16,
        2 => Format::Quantised(Quantisation::Q4_0),
        3 => Format::Quantised(Quantisation::Q4_1),
        6 => Format::Quantised(Quantisation::Q5_0),
        7 => Format::Quantised(Quantisation::Q5_1),
        8 => Format::Quantised(Quantisation::Q8_0),
        12 => Format::Quantised(Quantisation::Q4K),
        13 => Format::Quantised(Quantisation::Q5K),
        14 => Format::Quantised(Quantisation::Q6K),
        10 => return Err("Q2_K".to_owned()),
        11 => return Err("Q3_K".to_owned()),
        other => return Err(format!("number {other} of GGML")),
    })
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use super::*;

    fn string(text: &str) -> Vec<u8> {
        [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat()
    }

    /// A file's header: its metadata, and its tensors' names, dimensions (innermost first), formats and
    /// offsets.
    fn header(pairs: &[(&str, u32, Vec<u8>)], tensors: &[(&str, &[u64], u32, u64)]) -> Vec<u8> {
        let mut file = MAGIC.to_vec();
        file.extend(3u32.to_le_bytes());
        file.extend((tensors.len() as u64).to_le_bytes());
        file.extend((pairs.len() as u64).to_le_bytes());
        for (key, kind, value) in pairs {
            file.extend([string(key), kind.to_le_bytes().to_vec(), value.clone()].concat());
        }
        for (name, dims, format, offset) in tensors {
            file.extend(string(name));
            file.extend((dims.len() as u32).to_le_bytes());
            dims.iter().for_each(|dim| file.extend(dim.to_le_bytes()));
            file.extend([&format.to_le_bytes()[..], &offset.to_le_bytes()[..]].concat());
        }
        file
    }

    fn with_data(mut header: Vec<u8>, alignment: usize, bytes: usize) -> Vec<u8> {
        header.resize(header.len().next_multiple_of(alignment) + bytes, 0);
        header
    }

    fn refusal(file: &[u8]) -> String {
        read(Cursor::new(file), file.len()).err().unwrap()
    }

    #[test]
    fn tensors_are_found_behind_metadata_of_every_kind() {
        let array =
            |kind: u32, len: u64, bytes: Vec<u8>| [&kind.to_le_bytes()[..], &len.to_le_bytes()[..], &bytes].concat();
        let words = array(8, 2, [string("a"), string("bc")].concat());
        let pairs = [
            ("general.architecture", 8, string("flux")),
            ("flag", 7, vec![1]),
            ("short", 2, vec![1, 2]),
            ("number", 12, vec![0; 8]),
            ("general.alignment", 4, 64u32.to_le_bytes().to_vec()),
            ("words", 9, words.clone()),
            ("numbers", 9, array(5, 3, vec![0; 12])),
            ("nested", 9, array(9, 1, words)),
        ];
        let tensors: [(&str, &[u64], u32, u64); 3] =
            [("a", &[256, 3], 12, 0), ("b", &[5], 0, 448), ("scalar", &[], 30, 512)];
        let file = with_data(header(&pairs, &tensors), 64, 514);
        let start = file.len() - 514;
        let entries = read(Cursor::new(&file), file.len()).unwrap();
        let found: Vec<_> =
            entries.iter().map(|entry| (entry.name.as_str(), entry.shape.clone(), entry.bytes.clone())).collect();
        assert_eq!(found[0], ("a", vec![3, 256], start..start + 3 * 144));
        assert_eq!(found[1], ("b", vec![5], start + 448..start + 468));
        assert_eq!(found[2], ("scalar", vec![], start + 512..start + 514));
        assert_eq!(entries[0].format, Ok(Format::Quantised(Quantisation::Q4K)));
    }

    #[test]
    fn a_file_cut_anywhere_is_refused() {
        let pairs = [("words", 9, [&8u32.to_le_bytes()[..], &1u64.to_le_bytes(), &string("abc")].concat())];
        let file = with_data(header(&pairs, &[("a", &[32, 2], 8, 0)]), 32, 68);
        assert!(read(Cursor::new(&file), file.len()).is_ok());
        for len in MAGIC.len()..file.len() {
            assert!(refusal(&file[..len]).starts_with("is not complete"), "{len} bytes");
        }
    }

    #[test]
    fn claims_beyond_the_file_cost_no_memory() {
        let mut many = header(&[], &[]);
        many[8..16].copy_from_slice(&u64::MAX.to_le_bytes());
        assert!(refusal(&many).contains("not complete"));
        let mut pairs = header(&[], &[]);
        pairs[16..24].copy_from_slice(&u64::MAX.to_le_bytes());
        assert!(refusal(&pairs).contains("not complete"));
        let long = [&u64::MAX.to_le_bytes()[..], b"a"].concat();
        assert!(refusal(&header(&[("word", 8, long)], &[])).contains("not complete"));
        let array = [&12u32.to_le_bytes()[..], &u64::MAX.to_le_bytes()].concat();
        assert!(refusal(&header(&[("numbers", 9, array)], &[])).contains("not complete"));
        let tensor =
            |dims: &[u64], format, offset| refusal(&with_data(header(&[], &[("a", dims, format, offset)]), 32, 64));
        assert!(tensor(&[1 << 40, 1 << 40], 0, 0).contains("tensor `a` of shape"));
        assert!(tensor(&[1 << 40], 0, 0).contains("tensor `a` ends behind the file's"));
        assert!(tensor(&[1], 0, u64::MAX - 31).contains("tensor `a` ends behind"));
        assert!(tensor(&[32], 0, u64::MAX - 31).contains("tensor `a` starts too far behind"));
        assert!(tensor(&[1], 0, 1 << 40).contains("tensor `a` ends behind"));
    }

    #[test]
    fn what_the_format_forbids_is_refused_by_name() {
        let tensor =
            |dims: &[u64], format, offset| refusal(&with_data(header(&[], &[("a", dims, format, offset)]), 32, 64));
        assert!(tensor(&[33], 8, 0).contains("whole blocks"));
        assert!(tensor(&[8], 0, 4).contains("multiple of 32 but at 4"));
        assert!(tensor(&[1; 9], 0, 0).contains("at most 8 dimensions, but has 9"));
        let mut old = header(&[], &[]);
        old[4] = 1;
        assert!(refusal(&old).contains("version 1, but only"));
        let alignment = header(&[("general.alignment", 4, vec![0; 4])], &[]);
        assert!(refusal(&alignment).contains("multiple of 8, but is 0"));
        assert!(refusal(&header(&[("odd", 13, vec![])], &[])).contains("kind 13"));
        let long = "a".repeat(65_536);
        assert!(refusal(&header(&[(&long, 7, vec![1])], &[])).contains("a name of 65536 bytes, but at most 65535"));
        let nested: Vec<u8> = (0..9).flat_map(|_| [&9u32.to_le_bytes()[..], &1u64.to_le_bytes()].concat()).collect();
        assert!(refusal(&header(&[("deep", 9, nested)], &[])).contains("nested too deeply"));
    }

    #[test]
    fn a_format_that_cannot_be_read_has_its_word() {
        let file = with_data(header(&[], &[("a", &[256], 10, 0), ("b", &[256], 23, 0)]), 32, 0);
        let words: Vec<_> =
            read(Cursor::new(&file), file.len()).unwrap().into_iter().map(|entry| entry.format.unwrap_err()).collect();
        assert_eq!(words, ["Q2_K", "number 23 of GGML"]);
    }
}
