//! Artifacts in a folder of this machine: an object is a file, its path below the folder is its name.

use std::fs::{self, File};
use std::io::{self, ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use bytes::Bytes;
use tempfile::NamedTempFile;

use super::path::{check, check_prefix};
use super::{ArtifactError, ArtifactKey, ArtifactStore, Result};

/// Files being written lie here, below the folder, so that they share its file system and a rename
/// makes them visible at once. No object's name begins with a dot.
const STAGING: &str = ".staging";

/// A staged file that has not changed for so long belongs to a process that died.
const STALE: Duration = Duration::from_secs(3600);

/// Objects as files. Cheap to clone.
#[derive(Clone, Debug)]
pub struct FolderArtifacts {
    folder: PathBuf,
}

impl FolderArtifacts {
    /// Opens a folder, making it if there is none, and clears away what crashed writers left in it.
    pub fn open(folder: &Path) -> Result<Self> {
        let staging = folder.join(STAGING);
        fs::create_dir_all(&staging).map_err(|error| failed("make the folder", &staging, error))?;
        let folder = folder.canonicalize().map_err(|error| failed("open the folder", folder, error))?;
        let artifacts = Self { folder };
        artifacts.sweep()?;
        Ok(artifacts)
    }

    /// Where an object lies.
    fn file(&self, path: &str) -> Result<PathBuf> {
        Ok(self.folder.join(check(path)?))
    }

    fn stage(&self, bytes: &[u8]) -> Result<NamedTempFile> {
        let staging = self.folder.join(STAGING);
        let fail = |error| failed("write to the folder", &staging, error);
        let mut builder = tempfile::Builder::new();
        // As any other file of this user: the umask decides who may read.
        #[cfg(unix)]
        builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
        let mut staged = builder.tempfile_in(&staging).map_err(fail)?;
        staged.write_all(bytes).map_err(fail)?;
        Ok(staged)
    }

    fn put_blocking(&self, path: &str, bytes: &[u8]) -> Result<()> {
        let target = self.file(path)?;
        let parent = target.parent().expect("an object lies below the folder");
        let fail = |error| failed("write the object", &target, error);
        let staged = self.stage(bytes)?;
        staged.as_file().sync_all().map_err(fail)?;
        self.make_folders(parent).map_err(fail)?;
        staged.persist(&target).map_err(|error| fail(error.error))?;
        sync_folder(parent).map_err(fail)
    }

    /// Makes the folders down to `parent` so that they outlast a power failure.
    fn make_folders(&self, parent: &Path) -> io::Result<()> {
        let missing: Vec<_> = parent.ancestors().take_while(|folder| !folder.is_dir()).collect();
        for folder in missing.into_iter().rev() {
            match fs::create_dir(folder) {
                Err(error) if error.kind() != ErrorKind::AlreadyExists => return Err(error),
                _ => sync_folder(folder.parent().expect("it lies below the store's folder"))?,
            }
        }
        Ok(())
    }

    fn list_blocking(&self, prefix: &str) -> Result<Vec<String>> {
        let mut paths = Vec::new();
        // Only the part of the tree that the prefix leaves open is walked.
        let start = check_prefix(prefix)?.rsplit_once('/').map_or("", |(folder, _)| folder);
        let mut folders = vec![start.to_owned()];
        while let Some(folder) = folders.pop() {
            let fail = |error| failed("list the folder", &self.folder.join(&folder), error);
            let entries = match fs::read_dir(self.folder.join(&folder)) {
                Err(error) if is_missing(&error) => continue,
                entries => entries.map_err(fail)?,
            };
            for entry in entries {
                let entry = entry.map_err(fail)?;
                let name = entry.file_name();
                let Some(name) = name.to_str().filter(|name| !name.starts_with('.')) else { continue };
                let path = if folder.is_empty() { name.to_owned() } else { format!("{folder}/{name}") };
                let kind = entry.file_type().map_err(fail)?;
                if kind.is_dir() && (path.starts_with(prefix) || prefix.starts_with(&path)) {
                    folders.push(path);
                } else if kind.is_file() && path.starts_with(prefix) {
                    paths.push(path);
                }
            }
        }
        paths.sort_unstable();
        Ok(paths)
    }

    fn sweep(&self) -> Result<()> {
        let staging = self.folder.join(STAGING);
        let fail = |error| failed("clear the folder", &staging, error);
        for entry in fs::read_dir(&staging).map_err(fail)? {
            let entry = entry.map_err(fail)?;
            // A file that is gone by now was renamed or removed by its writer.
            let Ok(changed) = entry.metadata().and_then(|data| data.modified()) else { continue };
            if SystemTime::now().duration_since(changed).is_ok_and(|age| age > STALE) {
                match fs::remove_file(entry.path()) {
                    Err(error) if !is_missing(&error) => return Err(fail(error)),
                    _ => tracing::info!(file = %entry.path().display(), "removed what a crashed writer left"),
                }
            }
        }
        Ok(())
    }
}

#[async_trait]
impl ArtifactStore for FolderArtifacts {
    async fn ping(&self) -> Result<()> {
        let this = self.clone();
        off_thread(move || this.stage(b"ping").map(drop)).await
    }

    async fn put(&self, key: &ArtifactKey, bytes: Bytes) -> Result<()> {
        let (this, path) = (self.clone(), key.path());
        off_thread(move || this.put_blocking(&path, &bytes)).await
    }

    async fn get(&self, path: &str) -> Result<Bytes> {
        let (file, path) = (self.file(path)?, path.to_owned());
        off_thread(move || match fs::read(&file) {
            Err(error) if is_missing(&error) => Err(ArtifactError::NotFound(path)),
            read => read.map(Bytes::from).map_err(|error| failed("read the object", &file, error)),
        })
        .await
    }

    async fn delete(&self, path: &str) -> Result<()> {
        let file = self.file(path)?;
        off_thread(move || match fs::remove_file(&file) {
            Err(error) if !is_missing(&error) && !file.is_dir() => Err(failed("delete the object", &file, error)),
            _ => Ok(()),
        })
        .await
    }

    async fn list(&self, prefix: &str) -> Result<Vec<String>> {
        let (this, prefix) = (self.clone(), prefix.to_owned());
        off_thread(move || this.list_blocking(&prefix)).await
    }

    fn path_of(&self, _address: &str) -> Option<String> {
        None
    }

    async fn presign(&self, path: &str, _valid_for: Duration) -> Result<Option<String>> {
        check(path)?;
        Ok(None)
    }
}

/// File systems block: their work runs beside the runtime's threads.
async fn off_thread<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|error| Err(ArtifactError::Internal(error.into())))
}

/// A rename is durable once its folder is.
fn sync_folder(folder: &Path) -> io::Result<()> {
    if cfg!(unix) { File::open(folder)?.sync_all() } else { Ok(()) }
}

/// True where no object of that path can exist.
fn is_missing(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory | ErrorKind::IsADirectory)
}

/// The one place where the file system's errors become the port's.
fn failed(what: &str, path: &Path, error: io::Error) -> ArtifactError {
    let told = format!("could not {what} {}: {error}", path.display()).into();
    match error.kind() {
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => ArtifactError::Full(told),
        ErrorKind::TimedOut | ErrorKind::StaleNetworkFileHandle => ArtifactError::Unavailable(told),
        _ => ArtifactError::Internal(told),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::id::{JobId, SubmissionId};

    fn image() -> ArtifactKey {
        ArtifactKey::Image { submission_id: SubmissionId::new(), job_id: JobId::new(), attempt: 1 }
    }

    #[test]
    fn a_full_disk_and_a_spent_quota_are_full() {
        for code in [28, 122] {
            let error = failed("write the object", Path::new("x"), io::Error::from_raw_os_error(code));
            assert!(matches!(error, ArtifactError::Full(_)), "{error}");
        }
    }

    #[tokio::test]
    async fn what_a_crashed_writer_left_is_swept_at_open_and_never_listed() {
        let folder = tempfile::tempdir().unwrap();
        let artifacts = FolderArtifacts::open(folder.path()).unwrap();
        let (stale, fresh) = (folder.path().join(STAGING).join("stale"), folder.path().join(STAGING).join("fresh"));
        for file in [&stale, &fresh] {
            fs::write(file, b"half a picture").unwrap();
        }
        let long_ago = SystemTime::now() - STALE - Duration::from_secs(60);
        File::options().write(true).open(&stale).unwrap().set_modified(long_ago).unwrap();
        assert!(artifacts.list("").await.unwrap().is_empty());
        FolderArtifacts::open(folder.path()).unwrap();
        assert!(!stale.exists(), "the stale file is gone");
        assert!(fresh.exists(), "another process may be writing this one");
    }

    #[tokio::test]
    async fn putting_and_pinging_leave_nothing_in_the_staging_folder() {
        let folder = tempfile::tempdir().unwrap();
        let artifacts = FolderArtifacts::open(folder.path()).unwrap();
        artifacts.ping().await.unwrap();
        artifacts.put(&image(), Bytes::from_static(b"picture")).await.unwrap();
        assert_eq!(fs::read_dir(folder.path().join(STAGING)).unwrap().count(), 0);
    }

    #[tokio::test]
    async fn an_object_that_cannot_be_put_in_its_place_leaves_nothing_behind() {
        let folder = tempfile::tempdir().unwrap();
        let artifacts = FolderArtifacts::open(folder.path()).unwrap();
        // A file where a folder has to be.
        fs::write(folder.path().join("submissions"), b"in the way").unwrap();
        let error = artifacts.put(&image(), Bytes::from_static(b"picture")).await.unwrap_err();
        assert!(matches!(error, ArtifactError::Internal(_)), "{error}");
        assert_eq!(fs::read_dir(folder.path().join(STAGING)).unwrap().count(), 0);
    }

    #[tokio::test]
    async fn a_part_of_a_path_is_no_object() {
        let folder = tempfile::tempdir().unwrap();
        let artifacts = FolderArtifacts::open(folder.path()).unwrap();
        let path = image().path();
        fs::create_dir_all(folder.path().join(&path).parent().unwrap()).unwrap();
        fs::write(folder.path().join(&path), b"picture").unwrap();
        for part in [path.rsplit_once('/').unwrap().0.to_owned(), format!("{path}/more")] {
            let read = artifacts.get(&part).await;
            assert!(matches!(&read, Err(ArtifactError::NotFound(missing)) if *missing == part), "{read:?}");
            artifacts.delete(&part).await.unwrap();
        }
        assert_eq!(artifacts.get(&path).await.unwrap(), "picture");
    }

    #[cfg(unix)]
    #[tokio::test]
    async fn a_link_out_of_the_folder_is_not_listed() {
        let (folder, outside) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        fs::write(outside.path().join("secret"), b"secret").unwrap();
        let artifacts = FolderArtifacts::open(folder.path()).unwrap();
        std::os::unix::fs::symlink(outside.path(), folder.path().join("link")).unwrap();
        assert!(artifacts.list("").await.unwrap().is_empty());
    }
}
