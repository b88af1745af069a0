//! Where pictures go on this machine: checked before anything is rendered, written whole or not at all.

use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

/// How the names of pictures end, and those of latents.
pub const PICTURE: &str = "png";
pub const LATENT: &str = farm::latent::EXTENSION;

/// How the name of a file ends that holds what is stored under this key.
pub fn extension_of(key: &str) -> &'static str {
    if farm::latent::is_latent(key) { LATENT } else { PICTURE }
}

/// What `--out` of `kiln render` means.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// This very file; an older one is replaced.
    File(PathBuf),
    /// New files in this folder, numbered from `first`: nothing in it is ever replaced.
    Folder {
        /// The folder.
        folder: PathBuf,
        /// The number of the first new picture.
        first: u64,
        /// How the files' names end.
        extension: &'static str,
    },
}

impl Target {
    /// Reads `--out` for `count` pictures or latents, whose names end in `extension`, makes the folder if need be, and
    /// sees that it can be written.
    pub fn prepare(out: &Path, count: u32, extension: &'static str) -> Result<Self> {
        let ends_in = |end: &str| out.extension().is_some_and(|found| found.eq_ignore_ascii_case(end));
        if [PICTURE, LATENT].into_iter().any(ends_in) && !out.is_dir() {
            if !ends_in(extension) {
                bail!("--out must be a folder or a file that ends in .{extension}, but is `{}`", out.display());
            }
            if count > 1 {
                bail!("--out must be a folder for {count} pictures, but is the file `{}`", out.display());
            }
            let parent = match out.parent() {
                Some(parent) if !parent.as_os_str().is_empty() => parent,
                _ => Path::new("."),
            };
            if !parent.is_dir() {
                bail!("--out must be in a folder that exists, but there is no folder `{}`", parent.display());
            }
            check_writable(parent)?;
            return Ok(Self::File(out.to_owned()));
        }
        prepare_folder(out)?;
        Ok(Self::Folder { folder: out.to_owned(), first: next_number(out)?, extension })
    }

    /// Where picture `index` (from 0) with this seed goes.
    pub fn path(&self, index: u64, seed: u64) -> PathBuf {
        match self {
            Self::File(path) => path.clone(),
            Self::Folder { folder, first, extension } => {
                folder.join(format!("{:04}-{seed}.{extension}", first + index))
            }
        }
    }
}

/// Makes a folder for pictures, or sees that it can be written.
pub fn prepare_folder(folder: &Path) -> Result<()> {
    if folder.exists() && !folder.is_dir() {
        bail!("--out must be a folder, but `{}` is a file", folder.display());
    }
    std::fs::create_dir_all(folder)
        .with_context(|| format!("the folder `{}` for --out cannot be made", folder.display()))?;
    check_writable(folder)
}

fn check_writable(folder: &Path) -> Result<()> {
    tempfile::NamedTempFile::new_in(folder)
        .map(drop)
        .with_context(|| format!("--out must be in a folder that can be written, but `{}` cannot", folder.display()))
}

/// One more than the highest number that a picture's name in the folder begins with.
fn next_number(folder: &Path) -> Result<u64> {
    let mut next = 0;
    for entry in std::fs::read_dir(folder).with_context(|| format!("`{}` cannot be listed", folder.display()))? {
        let name = entry?.file_name();
        let Some((number, rest)) = name.to_str().and_then(|name| name.split_once('-')) else { continue };
        if let Ok(number) = number.parse::<u64>()
            && [PICTURE, LATENT].into_iter().any(|end| rest.rsplit_once('.').is_some_and(|(_, found)| found == end))
        {
            next = next.max(number.saturating_add(1));
        }
    }
    Ok(next)
}

/// Writes a file that is never seen half: under another name first, then moved.
pub fn write_whole(path: &Path, bytes: &[u8]) -> Result<()> {
    let folder = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let outcome = (|| {
        let mut file =
            tempfile::Builder::new().prefix(".kiln-").permissions(ordinary_permissions()).tempfile_in(folder)?;
        file.write_all(bytes)?;
        file.persist(path).map_err(|error| error.error)?;
        Ok::<(), std::io::Error>(())
    })();
    outcome.with_context(|| format!("`{}` cannot be written", path.display()))
}

/// What other programs' files get (the umask takes its share): temporary files are private otherwise.
fn ordinary_permissions() -> std::fs::Permissions {
    use std::os::unix::fs::PermissionsExt;
    std::fs::Permissions::from_mode(0o666)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_png_is_a_file_and_anything_else_a_folder() {
        let root = tempfile::tempdir().unwrap();
        let file = root.path().join("x.PNG");
        assert_eq!(Target::prepare(&file, 1, PICTURE).unwrap(), Target::File(file));
        let folder = root.path().join("new/folder");
        let expected = Target::Folder { folder: folder.clone(), first: 0, extension: PICTURE };
        assert_eq!(Target::prepare(&folder, 1, PICTURE).unwrap(), expected);
        assert!(folder.is_dir());
    }

    #[test]
    fn a_picture_does_not_go_into_a_latents_file_nor_the_other_way() {
        let root = tempfile::tempdir().unwrap();
        for (name, extension) in [("x.png", LATENT), ("x.safetensors", PICTURE)] {
            let error = Target::prepare(&root.path().join(name), 1, extension).unwrap_err().to_string();
            assert!(error.contains(&format!("ends in .{extension}")) && error.contains(name), "{error}");
        }
        let file = root.path().join("x.safetensors");
        assert_eq!(Target::prepare(&file, 1, LATENT).unwrap(), Target::File(file));
        assert_eq!(extension_of("submissions/a/latents/b.1.8x8.safetensors"), LATENT);
        assert_eq!(extension_of("submissions/a/images/b.1.png"), PICTURE);
    }

    #[test]
    fn many_pictures_do_not_fit_into_one_file() {
        let root = tempfile::tempdir().unwrap();
        let error = Target::prepare(&root.path().join("x.png"), 3, PICTURE).unwrap_err().to_string();
        assert!(error.contains("must be a folder for 3 pictures"), "{error}");
    }

    #[test]
    fn a_file_in_a_folder_that_does_not_exist_is_refused() {
        let root = tempfile::tempdir().unwrap();
        let error = Target::prepare(&root.path().join("none/x.png"), 1, PICTURE).unwrap_err().to_string();
        assert!(error.contains("there is no folder"), "{error}");
        assert!(!root.path().join("none").exists());
    }

    #[test]
    fn a_folder_where_a_file_is_in_the_way_is_refused() {
        let root = tempfile::tempdir().unwrap();
        std::fs::write(root.path().join("taken"), b"").unwrap();
        let error = Target::prepare(&root.path().join("taken"), 1, PICTURE).unwrap_err().to_string();
        assert!(error.contains("is a file"), "{error}");
    }

    #[test]
    fn numbers_go_on_where_the_folder_left_off() {
        let root = tempfile::tempdir().unwrap();
        for name in ["0000-5.png", "0007-9.png", "12-notes.txt", "cat.png"] {
            std::fs::write(root.path().join(name), b"").unwrap();
        }
        let target = Target::prepare(root.path(), 2, PICTURE).unwrap();
        assert_eq!(target.path(1, 42), root.path().join("0009-42.png"));
        std::fs::write(root.path().join("0010-1.safetensors"), b"").unwrap();
        let target = Target::prepare(root.path(), 2, LATENT).unwrap();
        assert_eq!(target.path(0, 7), root.path().join("0011-7.safetensors"));
    }

    #[test]
    fn a_file_is_written_whole_and_replaces_an_older_one() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("x.png");
        write_whole(&path, b"old").unwrap();
        write_whole(&path, b"new").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"new");
        assert_eq!(std::fs::read_dir(root.path()).unwrap().count(), 1);
    }
}
