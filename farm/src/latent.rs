//! Latents as objects: what a job that ends in the middle of the way from noise leaves, and another goes on from.
//! A safetensors file with one tensor, `latents`, in f32: (channels, height, width) in the denoiser's scale, as
//! diffusers gives it as `output_type="latent"`; its own batch of one, (1, channels, height, width), is read too.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// How the files' names end.
pub const EXTENSION: &str = "safetensors";

/// What the files are.
pub const CONTENT_TYPE: &str = "application/safetensors";

/// The longest side, in values.
const LONGEST_SIDE: usize = 65_536;

/// A latent.
#[derive(Clone, Debug, PartialEq)]
pub struct LatentFile {
    /// Channels.
    pub channels: u32,
    /// Lines of a channel.
    pub height: u32,
    /// Values of a line.
    pub width: u32,
    /// Channel after channel, line after line: as many as the three say.
    pub values: Vec<f32>,
}

/// The header of the file.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Header {
    #[serde(rename = "__metadata__", default, skip_serializing_if = "BTreeMap::is_empty")]
    metadata: BTreeMap<String, String>,
    latents: Tensor,
}

#[derive(Serialize, Deserialize)]
struct Tensor {
    dtype: String,
    shape: Vec<usize>,
    data_offsets: (usize, usize),
}

impl LatentFile {
    /// Whether these bytes begin as a safetensors file does: the length of a header, then the header.
    pub fn is_one(bytes: &[u8]) -> bool {
        bytes.get(8) == Some(&b'{') && split(bytes).is_some()
    }

    /// Reads a file.
    ///
    /// # Errors
    /// What is wrong with it, in words that follow "it".
    pub fn read(bytes: &[u8]) -> Result<Self, String> {
        let (header, data) = split(bytes).ok_or("is no safetensors file, or a broken one")?;
        let header: Header = serde_json::from_slice(header)
            .map_err(|error| format!("must have one tensor, `latents`, and no other: {error}"))?;
        let Tensor { dtype, shape, data_offsets } = header.latents;
        if dtype != "F32" {
            return Err(format!("must have `latents` in F32, but has them in {dtype}"));
        }
        let (channels, height, width) = match shape[..] {
            [channels, height, width] | [1, channels, height, width] => (channels, height, width),
            _ => return Err(format!("must have `latents` of (channels, height, width), but has {shape:?}")),
        };
        if [channels, height, width].into_iter().any(|side| !(1..=LONGEST_SIDE).contains(&side)) {
            return Err(format!("must have `latents` with sides of 1 to {LONGEST_SIDE}, but has {shape:?}"));
        }
        // Three sides of 2^16 fit.
        if data.len() as u128 != 4 * channels as u128 * height as u128 * width as u128
            || data_offsets != (0, data.len())
        {
            return Err(format!(
                "must have the bytes of `latents`, {shape:?}, after its header, but has {}",
                data.len()
            ));
        }
        let values = data.chunks_exact(4).map(|bytes| f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]));
        let values: Vec<f32> = values.collect();
        if !values.iter().all(|value| value.is_finite()) {
            return Err("must have finite `latents`, but some are not".into());
        }
        Ok(Self { channels: channels as u32, height: height as u32, width: width as u32, values })
    }

    /// Writes a file with `metadata` in its header.
    pub fn write(&self, metadata: BTreeMap<String, String>) -> Vec<u8> {
        let shape = [self.channels, self.height, self.width].map(|side| side as usize).to_vec();
        let latents = Tensor { dtype: "F32".into(), shape, data_offsets: (0, 4 * self.values.len()) };
        let mut header = serde_json::to_vec(&Header { metadata, latents }).expect("a header can be written as JSON");
        // The format wants the numbers at a multiple of eight.
        header.resize(header.len().next_multiple_of(8), b' ');
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header);
        bytes.extend(self.values.iter().flat_map(|value| value.to_le_bytes()));
        bytes
    }
}

/// Header and numbers.
fn split(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let (length, rest) = bytes.split_first_chunk::<8>()?;
    rest.split_at_checked(usize::try_from(u64::from_le_bytes(*length)).ok()?)
}

/// How the name of a latent's object ends: with its size in values, so that a job's size is known from the name of
/// what it starts from.
pub fn name_end(width: u32, height: u32) -> String {
    format!("{width}x{height}.{EXTENSION}")
}

/// Whether an object's name is that of a latent.
pub fn is_latent(name: &str) -> bool {
    name.rsplit_once('.').is_some_and(|(_, end)| end == EXTENSION)
}

/// The width and height in values that the name of a latent's object tells. One that came into the store by another
/// way may tell none.
pub fn size_in_name(name: &str) -> Option<(u32, u32)> {
    let (stem, _) = name.rsplit_once('.').filter(|_| is_latent(name))?;
    let (width, height) = stem.rsplit(['.', '/']).next()?.split_once('x')?;
    let side = |text: &str| text.parse().ok().filter(|side| *side > 0);
    Some((side(width)?, side(height)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn latent() -> LatentFile {
        LatentFile { channels: 2, height: 2, width: 3, values: (0..12).map(|value| value as f32 / 4.0).collect() }
    }

    /// A file of this header and so many bytes.
    fn file(header: &str, bytes: usize) -> Vec<u8> {
        let mut file = (header.len() as u64).to_le_bytes().to_vec();
        file.extend(header.as_bytes());
        file.resize(file.len() + bytes, 0);
        file
    }

    #[test]
    fn a_file_reads_back_with_its_numbers_where_the_format_wants_them() {
        for note in ["", "x", "a note of some length with “quotes”"] {
            let bytes = latent().write(BTreeMap::from([("kiln".to_owned(), note.to_owned())]));
            assert_eq!(LatentFile::read(&bytes).unwrap(), latent());
            assert_eq!((bytes.len() - 12 * 4) % 8, 0);
            assert!(LatentFile::is_one(&bytes));
        }
        let batch = file(r#"{"latents":{"dtype":"F32","shape":[1,1,2,3],"data_offsets":[0,24]}}"#, 24);
        assert_eq!(LatentFile::read(&batch).unwrap().values, [0.0; 6]);
    }

    #[test]
    fn another_file_is_refused_with_the_reason() {
        let one = |dtype: &str, shape: &str, bytes: usize| {
            let header = format!(r#"{{"latents":{{"dtype":"{dtype}","shape":{shape},"data_offsets":[0,{bytes}]}}}}"#);
            file(&header, bytes)
        };
        let infinite = LatentFile { values: vec![f32::INFINITY; 12], ..latent() }.write(BTreeMap::new());
        let long = file("{}", 0)[..9].to_vec();
        for (bytes, reason) in [
            (b"GIF89a, or so it says".to_vec(), "is no safetensors file"),
            (Vec::new(), "is no safetensors file"),
            (long, "is no safetensors file"),
            (u64::MAX.to_le_bytes().to_vec(), "is no safetensors file"),
            (file("{}", 0), "must have one tensor, `latents`"),
            (file("nonsense", 0), "must have one tensor, `latents`"),
            (file(r#"{"unet":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#, 4), "unknown field `unet`"),
            (one("F16", "[4,8,8]", 512), "in F32, but has them in F16"),
            (one("F32", "[8,8]", 256), "of (channels, height, width), but has [8, 8]"),
            (one("F32", "[2,4,8,8]", 2048), "but has [2, 4, 8, 8]"),
            (one("F32", "[4,0,8]", 0), "sides of 1 to 65536"),
            (one("F32", "[65536,65536,65536]", 4), "must have the bytes of `latents`"),
            (one("F32", "[18446744073709551615,1,1]", 4), "sides of 1 to 65536"),
            (one("F32", "[4,8,8]", 1020), "after its header, but has 1020"),
            (infinite, "must have finite `latents`"),
        ] {
            let problem = LatentFile::read(&bytes).unwrap_err();
            assert!(problem.contains(reason), "{problem}");
        }
    }

    #[test]
    fn a_name_tells_the_size() {
        let name = format!("submissions/a/latents/b.1.{}", name_end(128, 96));
        assert_eq!(name, "submissions/a/latents/b.1.128x96.safetensors");
        assert_eq!(size_in_name(&name), Some((128, 96)));
        assert_eq!(size_in_name("latents/16x8.safetensors"), Some((16, 8)));
        for name in ["a/b.safetensors", "a/b.0x8.safetensors", "a/1x2.png", "safetensors", "", "a/-1x8.safetensors"] {
            assert_eq!(size_in_name(name), None, "{name}");
        }
        assert!(is_latent("a/b.safetensors") && !is_latent("a.safetensors/b.png"));
    }
}
