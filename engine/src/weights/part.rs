//! One part of a checkpoint, wherever it lies.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::{SingleFile, Weights};
use crate::config::ConfigFile;
use crate::ops::Place;
use crate::{FamilyKind, Result};

/// A text encoder, a denoiser or a VAE: its configuration and its weights.
#[derive(Clone)]
pub(crate) enum Part {
    /// A folder with `config.json` and safetensors.
    Folder(PathBuf),
    /// Some of the tensors of a single file.
    Within {
        file: Arc<SingleFile>,
        name: &'static str,
        /// What the tensors do not say is its family's.
        family: FamilyKind,
    },
}

impl Part {
    /// Its configuration.
    pub fn config(&self) -> Result<ConfigFile> {
        match self {
            Self::Folder(folder) => ConfigFile::read(&folder.join("config.json")),
            Self::Within { file, name, family } => file.config(name, *family),
        }
    }

    /// Its weights; in a folder, the files of `stem`. Layers built from them live at `place`.
    pub fn weights(&self, stem: &str, place: &Place) -> Result<Weights> {
        match self {
            Self::Folder(folder) => Weights::open(folder, stem, place),
            Self::Within { file, name, .. } => file.weights(name, place),
        }
    }
}

impl<P: AsRef<Path>> From<P> for Part {
    fn from(folder: P) -> Self {
        Self::Folder(folder.as_ref().to_owned())
    }
}
