//! Where a checkpoint's parts lie.

use std::path::{Path, PathBuf};

use crate::config::ConfigFile;
use crate::facts::family_of_folder;
use crate::{Error, FamilyKind, Result};

/// A checkpoint on this machine.
pub(crate) struct Source {
    folder: PathBuf,
    told: Option<FamilyKind>,
}

impl Source {
    /// Looks at `path`: a diffusers folder.
    pub fn open(path: &Path, _parts: Option<&Path>, told: Option<FamilyKind>) -> Result<Self> {
        if !path.join("model_index.json").exists() {
            return Err(Error::checkpoint(path, "is not a diffusers folder: it has no `model_index.json`"));
        }
        Ok(Self { folder: path.to_owned(), told })
    }

    /// Its family: the one that it is told to be, or the one that it looks like.
    pub fn family(&self) -> Result<FamilyKind> {
        match self.told {
            Some(family) => Ok(family),
            None => Ok(family_of_folder(&self.folder)?.named(&name(&self.folder))),
        }
    }

    /// What the configuration of a part says, if it has that part.
    pub fn config(&self, part: &str) -> Result<Option<ConfigFile>> {
        let file = if part == "scheduler" { "scheduler_config.json" } else { "config.json" };
        ConfigFile::read_if_present(&self.folder.join(part).join(file))
    }
}

/// What people call the checkpoint at `path`: the last step of it or, in the hub's cache, the
/// repository's (`models--ORG--NAME/snapshots/COMMIT`).
fn name(path: &Path) -> String {
    let steps: Vec<_> = path.components().rev().take(3).map(|step| step.as_os_str().to_string_lossy()).collect();
    let named = steps.iter().find(|step| step.starts_with("models--")).or(steps.first());
    named.map(ToString::to_string).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_checkpoint_is_called_by_its_folder_or_its_repository() {
        assert_eq!(name(Path::new("/turbo/weights/sdxl")), "sdxl");
        let cached = "/hub/models--stabilityai--sdxl-turbo/snapshots/0123";
        assert_eq!(name(Path::new(cached)), "models--stabilityai--sdxl-turbo");
    }
}
