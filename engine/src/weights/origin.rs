//! Where a part was read from, so that it can be read again: from the same files, or not at all.

use std::fs::Metadata;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use super::{Part, SingleFile, find};
use crate::{Error, FamilyKind, Result};

/// A part without its files being open.
pub(crate) struct Origin {
    place: Place,
    /// What its files are called in a folder.
    stem: &'static str,
    files: Vec<(PathBuf, Mark)>,
}

enum Place {
    Folder(PathBuf),
    Within { path: PathBuf, name: &'static str, family: FamilyKind, beside: Option<PathBuf> },
}

/// What tells a file from another one in its place. Names and shapes of tensors would not: a finetuned encoder has
/// the same.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Mark {
    bytes: u64,
    modified: Option<SystemTime>,
    /// The file system and the file's number in it.
    number: Option<(u64, u64)>,
}

impl Origin {
    /// Remembers where `part`, whose files are those of `stem`, is.
    pub fn of(part: &Part, stem: &'static str) -> Result<Self> {
        let place = match part {
            Part::Folder(folder) => Place::Folder(folder.clone()),
            Part::Within { file, name, family, beside } => {
                Place::Within { path: file.path().to_owned(), name, family: *family, beside: beside.clone() }
            }
        };
        let marked = |path: PathBuf| match Mark::of(&path) {
            Ok(mark) => Ok((path, mark)),
            Err(error) => Err(Error::checkpoint(path, error)),
        };
        let files = place.files(stem)?.into_iter().map(marked).collect::<Result<_>>()?;
        Ok(Self { place, stem, files })
    }

    /// What `read` makes of the part.
    ///
    /// # Errors
    /// [`Error::Changed`] if its files are not those of the beginning any more; else as `read`.
    pub fn read<T>(&self, read: impl Fn(&Part) -> Result<T>) -> Result<T> {
        self.check()?;
        let made = read(&self.place.open()?)?;
        // They may have been replaced since.
        self.check()?;
        Ok(made)
    }

    fn check(&self) -> Result<()> {
        let changed = |path: &Path, problem: String| Error::Changed { path: path.to_owned(), problem };
        for (path, mark) in &self.files {
            match Mark::of(path) {
                Err(error) => return Err(changed(path, error.to_string())),
                Ok(now) if now != *mark => {
                    return Err(changed(path, "it is not the file that the checkpoint was loaded from".to_owned()));
                }
                Ok(_) => {}
            }
        }
        let now = self.place.files(self.stem).map_err(|error| changed(self.place.path(), error.to_string()))?;
        if !now.iter().eq(self.files.iter().map(|(path, _)| path)) {
            let named: Vec<_> = now.iter().map(|path| path.display().to_string()).collect();
            return Err(changed(self.place.path(), format!("its weights would be those of {}", named.join(", "))));
        }
        Ok(())
    }
}

impl Place {
    fn path(&self) -> &Path {
        match self {
            Self::Folder(folder) => folder,
            Self::Within { path, .. } => path,
        }
    }

    fn files(&self, stem: &str) -> Result<Vec<PathBuf>> {
        match self {
            Self::Folder(folder) => find(folder, stem),
            Self::Within { path, .. } => Ok(vec![path.clone()]),
        }
    }

    fn open(&self) -> Result<Part> {
        match self {
            Self::Folder(folder) => Ok(Part::Folder(folder.clone())),
            Self::Within { path, name, family, beside } => {
                let file = Arc::new(SingleFile::open_for(path, name)?);
                Ok(Part::Within { file, name, family: *family, beside: beside.clone() })
            }
        }
    }
}

impl Mark {
    fn of(path: &Path) -> std::io::Result<Self> {
        let metadata = std::fs::metadata(path)?;
        Ok(Self { bytes: metadata.len(), modified: metadata.modified().ok(), number: number(&metadata) })
    }
}

#[cfg(unix)]
fn number(metadata: &Metadata) -> Option<(u64, u64)> {
    use std::os::unix::fs::MetadataExt;
    Some((metadata.dev(), metadata.ino()))
}

#[cfg(not(unix))]
fn number(_metadata: &Metadata) -> Option<(u64, u64)> {
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder() -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("model.fp16.safetensors"), "weights").unwrap();
        folder
    }

    fn read(origin: &Origin) -> Result<PathBuf> {
        origin.read(|part| match part {
            Part::Folder(folder) => Ok(folder.clone()),
            Part::Within { file, .. } => Ok(file.path().to_owned()),
        })
    }

    fn refusal(origin: &Origin) -> String {
        let error = read(origin).unwrap_err();
        assert!(matches!(error, Error::Changed { .. }), "{error}");
        error.to_string()
    }

    #[test]
    fn a_part_whose_files_stay_is_read_again() {
        let folder = folder();
        let origin = Origin::of(&Part::from(folder.path()), "model").unwrap();
        // What lies beside them is no concern.
        std::fs::write(folder.path().join("notes.txt"), "").unwrap();
        assert_eq!(read(&origin).unwrap(), folder.path());
        assert_eq!(read(&origin).unwrap(), folder.path());
    }

    #[test]
    fn a_file_that_went_or_became_another_is_named() {
        let folder = folder();
        let path = folder.path().join("model.fp16.safetensors");
        let origin = Origin::of(&Part::from(folder.path()), "model").unwrap();

        // Another file of the same length and time.
        let (time, other) = (std::fs::metadata(&path).unwrap().modified().unwrap(), folder.path().join("other"));
        std::fs::write(&other, "unknown").unwrap();
        std::fs::File::options().write(true).open(&other).unwrap().set_modified(time).unwrap();
        std::fs::rename(&other, &path).unwrap();
        let text = refusal(&origin);
        assert!(text.contains("model.fp16.safetensors") && text.contains("not the file"), "{text}");

        // The same file, written anew.
        let origin = Origin::of(&Part::from(folder.path()), "model").unwrap();
        std::fs::write(&path, "longer weights").unwrap();
        assert!(refusal(&origin).contains("not the file"));

        std::fs::remove_file(&path).unwrap();
        assert!(refusal(&origin).contains("model.fp16.safetensors"));
    }

    #[test]
    fn files_that_would_be_preferred_are_not_taken_for_the_first_ones() {
        let folder = folder();
        let origin = Origin::of(&Part::from(folder.path()), "model").unwrap();
        std::fs::write(folder.path().join("model.safetensors"), "weights").unwrap();
        assert!(refusal(&origin).contains("model.safetensors"));
    }

    #[test]
    fn a_file_replaced_while_it_is_read_is_not_taken() {
        let folder = folder();
        let path = folder.path().join("model.fp16.safetensors");
        let origin = Origin::of(&Part::from(folder.path()), "model").unwrap();
        let error = origin.read(|_| {
            std::fs::write(&path, "another checkpoint").unwrap();
            Ok(())
        });
        assert!(matches!(error, Err(Error::Changed { .. })));
    }
}
