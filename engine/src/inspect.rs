//! What a file or folder is, told without building anything of it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::facts::family_of_folder;
use crate::source::{Source, refuse_pickles};
use crate::weights::{self, Container, Entry, SingleFile};
use crate::{Error, FamilyKind, Result};

/// A part whose tensors belong to none.
const OTHER: &str = "other";

/// What was found.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Inspection {
    /// `diffusers`, a folder; `safetensors` or `gguf`, a single file.
    pub layout: &'static str,
    /// The family's word; `None`: no family that is known.
    pub family: Option<&'static str>,
    /// Its parts, by name.
    pub parts: Vec<InspectedPart>,
    /// The files with tensors, by path. Whoever writes a report lists them with what else it knows of them.
    #[serde(skip)]
    pub files: Vec<InspectedFile>,
}

/// A text encoder, a denoiser, a VAE, or what is left over.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct InspectedPart {
    /// `unet`, `vae`, `text_encoder_2`, or `other`.
    pub name: String,
    /// How many tensors it has.
    pub tensors: usize,
    /// Bytes of them.
    pub bytes: u64,
    /// Tensors by number format.
    pub formats: BTreeMap<String, usize>,
    /// Why its weights cannot be read.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
}

/// A file with tensors.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct InspectedFile {
    /// Where it lies.
    pub path: PathBuf,
    /// Its length.
    pub bytes: u64,
    /// Its tensors, by name.
    pub tensors: Vec<InspectedTensor>,
}

/// A tensor as it is stored.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct InspectedTensor {
    /// Its name in the file.
    pub name: String,
    /// Outermost dimension first.
    pub shape: Vec<usize>,
    /// Its number format: `F16`, `BF16`, `Q4_K`, ….
    pub format: String,
    /// Bytes of it.
    pub bytes: u64,
}

impl From<&Entry> for InspectedTensor {
    fn from(entry: &Entry) -> Self {
        let format = entry.format.as_ref().map_or_else(Clone::clone, |format| format.word().to_owned());
        Self { name: entry.name.clone(), shape: entry.shape.clone(), format, bytes: entry.bytes.len() as u64 }
    }
}

impl InspectedPart {
    fn named(name: &str) -> Self {
        Self { name: name.to_owned(), ..Self::default() }
    }

    fn add(&mut self, tensor: &InspectedTensor) {
        self.tensors += 1;
        self.bytes += tensor.bytes;
        *self.formats.entry(tensor.format.clone()).or_default() += 1;
    }
}

/// Looks at the file or folder at `path`.
///
/// # Errors
/// [`Error::Checkpoint`] naming a file that is a pickle, broken or incomplete, or a folder that is no
/// checkpoint.
pub fn inspect(path: &Path) -> Result<Inspection> {
    if path.is_dir() {
        return inspect_folder(path);
    }
    refuse_pickles(path)?;
    let (container, file) = inspect_file(path)?;
    let single = SingleFile::open(path).ok();
    let family = match &single {
        Some(file) if file.family()?.is_some() => Some(Source::look(path, None, None)?.family()),
        _ => None,
    };
    let prefixes: Vec<(&str, &str)> = single.iter().flat_map(SingleFile::parts).collect();
    let mut parts: BTreeMap<&str, InspectedPart> = BTreeMap::new();
    for tensor in &file.tensors {
        // A part without a prefix has what no other part has.
        let fits = prefixes.iter().filter(|(_, prefix)| tensor.name.starts_with(prefix));
        let name = fits.max_by_key(|(_, prefix)| prefix.len()).map_or(OTHER, |(part, _)| part);
        parts.entry(name).or_insert_with(|| InspectedPart::named(name)).add(tensor);
    }
    let layout = match container {
        Container::Safetensors => "safetensors",
        Container::Gguf => "gguf",
    };
    let family = family.map(FamilyKind::as_str);
    Ok(Inspection { layout, family, parts: parts.into_values().collect(), files: vec![file] })
}

fn inspect_file(path: &Path) -> Result<(Container, InspectedFile)> {
    let (container, bytes, entries) = weights::read_header(path)?;
    let mut tensors: Vec<InspectedTensor> = entries.iter().map(InspectedTensor::from).collect();
    tensors.sort_by(|a, b| a.name.cmp(&b.name));
    Ok((container, InspectedFile { path: path.to_owned(), bytes: bytes as u64, tensors }))
}

fn inspect_folder(folder: &Path) -> Result<Inspection> {
    let unreadable = |error: std::io::Error| Error::checkpoint(folder, error);
    if !folder.join("model_index.json").exists() {
        return Err(Error::checkpoint(folder, "is not a diffusers folder: it has no `model_index.json`"));
    }
    let family = family_of_folder(folder).ok().and_then(|_| Some(Source::look(folder, None, None).ok()?.family()));
    let mut inspection =
        Inspection { layout: "diffusers", family: family.map(FamilyKind::as_str), parts: vec![], files: vec![] };
    let mut names: Vec<String> = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(unreadable)? {
        let entry = entry.map_err(unreadable)?;
        if entry.path().join("config.json").exists() {
            names.push(entry.file_name().to_string_lossy().into_owned());
        }
    }
    names.sort();
    for name in names {
        let mut part = InspectedPart::named(&name);
        let at = folder.join(&name);
        // Encoders are transformers', the rest is diffusers'.
        let found = weights::find(&at, "diffusion_pytorch_model").or_else(|_| weights::find(&at, "model"));
        match found {
            Err(error) => part.problem = Some(error.to_string()),
            Ok(paths) => {
                for path in paths {
                    let (_, file) = inspect_file(&path)?;
                    file.tensors.iter().for_each(|tensor| part.add(tensor));
                    inspection.files.push(file);
                }
            }
        }
        inspection.parts.push(part);
    }
    Ok(inspection)
}
