//! One part of a checkpoint, wherever it lies.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::{SingleFile, Weights, bytes_at, find, read_header};
use crate::config::ConfigFile;
use crate::ops::Place;
use crate::{FamilyKind, Result};

/// How a head's channels are shared among the axes of a place: no tensor tells, and finetunes keep it.
const AXES: &str = "axes_dims_rope";
const HEADS: &str = "attention_head_dim";

/// A text encoder, a denoiser or a VAE: its configuration and its weights.
#[derive(Clone)]
pub(crate) enum Part {
    /// A folder with `config.json` and safetensors.
    Folder(PathBuf),
    /// Some of the tensors of a single file.
    Within {
        file: Arc<SingleFile>,
        name: &'static str,
        /// What the tensors do not say is its family's,
        family: FamilyKind,
        /// or said by the configuration of the same part in a folder beside the file.
        beside: Option<PathBuf>,
    },
}

impl Part {
    /// Its configuration.
    pub fn config(&self) -> Result<ConfigFile> {
        match self {
            Self::Folder(folder) => ConfigFile::read(&folder.join("config.json")),
            Self::Within { file, name, family, beside } => {
                let mut config = file.config(name, *family)?;
                let beside = beside.as_ref().map(|folder| ConfigFile::read_if_present(&folder.join("config.json")));
                if let Some(other) = beside.transpose()?.flatten()
                    && config.get(HEADS) == other.get(HEADS)
                {
                    config.learn(AXES, &other);
                }
                Ok(config)
            }
        }
    }

    /// Its weights; in a folder, the files of `stem`. Layers built from them live at `place`.
    pub fn weights(&self, stem: &str, place: &Place) -> Result<Weights> {
        match self {
            Self::Folder(folder) => Weights::open(folder, stem, place),
            Self::Within { file, name, .. } => file.weights(name, place),
        }
    }

    /// About how many bytes its weights will take at `place`, from what its files' headers say.
    pub fn weight_bytes(&self, stem: &str, place: &Place) -> Result<usize> {
        match self {
            Self::Within { file, name, .. } => file.weight_bytes(name, place),
            Self::Folder(folder) => {
                let of_file = |path: PathBuf| {
                    let (_, _, entries) = read_header(&path)?;
                    let bytes = entries.iter().map(|it| bytes_at(place, &it.format, &it.shape, it.bytes.len()));
                    Ok(bytes.sum::<usize>())
                };
                find(folder, stem)?.into_iter().map(of_file).sum()
            }
        }
    }
}

impl<P: AsRef<Path>> From<P> for Part {
    fn from(folder: P) -> Self {
        Self::Folder(folder.as_ref().to_owned())
    }
}
