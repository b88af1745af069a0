//! Weight files, read piece by piece where their bytes are packed.
//!
//! They are not mapped: where a map's file is cut short or its disk fails, the system ends the process, while a read
//! that fails says so. And a panel's bytes are packed faster from a room that stays in a core's cache than from pages
//! that the system has to map one by one.

use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::ops::Source;
use crate::{Error, Result};

/// An open file of weights.
pub(crate) struct WeightFile {
    file: File,
    path: PathBuf,
    /// Bytes that it had when it was opened.
    len: usize,
}

impl WeightFile {
    /// # Errors
    /// [`Error::Checkpoint`] if there is none that can be opened.
    pub fn open(path: &Path) -> Result<Arc<Self>> {
        let refuse = |error: std::io::Error| Error::checkpoint(path, error);
        let file = File::open(path).map_err(refuse)?;
        let len = usize::try_from(file.metadata().map_err(refuse)?.len()).unwrap_or(usize::MAX);
        Ok(Arc::new(Self { file, path: path.to_owned(), len }))
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn len(&self) -> usize {
        self.len
    }

    /// The file from its beginning, for headers.
    pub fn stream(&self) -> &File {
        &self.file
    }

    /// These bytes.
    ///
    /// # Errors
    /// As [`Source::read`].
    pub fn bytes(&self, range: Range<usize>) -> Result<Vec<u8>> {
        let mut bytes = vec![0; range.len()];
        self.read(range.start, &mut bytes)?;
        Ok(bytes)
    }

    /// Has the system read these bytes ahead, on a thread of its own: on a cold start the disk then works while
    /// weights are packed, and on more than one request at a time.
    pub fn read_ahead(self: &Arc<Self>, bytes: Range<usize>) {
        /// Linux cuts longer wishes short: to what the disk takes at once, or to what it reads ahead by itself, which
        /// is this much where nobody has set more.
        const WISH: usize = 128 << 10;
        let this = Arc::clone(self);
        let ask = move || {
            for start in bytes.clone().step_by(WISH) {
                if let Err(error) = wish_for(&this.file, start as u64, WISH.min(bytes.end - start) as u64) {
                    tracing::debug!(%error, "the system does not read a weight file ahead");
                    return;
                }
            }
        };
        if let Err(error) = std::thread::Builder::new().name("read-ahead".to_owned()).spawn(ask) {
            tracing::debug!(%error, "no thread to read a weight file ahead");
        }
    }
}

#[cfg(target_os = "linux")]
fn wish_for(file: &File, start: u64, len: u64) -> std::io::Result<()> {
    let len = std::num::NonZeroU64::new(len);
    Ok(rustix::fs::fadvise(file, start, len, rustix::fs::Advice::WillNeed)?)
}

#[cfg(target_vendor = "apple")]
fn wish_for(file: &File, start: u64, len: u64) -> std::io::Result<()> {
    Ok(rustix::fs::fcntl_rdadvise(file, start, len)?)
}

#[cfg(not(any(target_os = "linux", target_vendor = "apple")))]
fn wish_for(_file: &File, _start: u64, _len: u64) -> std::io::Result<()> {
    Err(std::io::ErrorKind::Unsupported.into())
}

impl Source for WeightFile {
    fn read(&self, start: usize, to: &mut [u8]) -> Result<()> {
        read_exact_at(&self.file, &self.path, to, start as u64).map_err(|error| {
            let end = start + to.len();
            Error::checkpoint(&self.path, format!("bytes {start} to {end} of {} cannot be read: {error}", self.len))
        })
    }
}

#[cfg(unix)]
fn read_exact_at(file: &File, _path: &Path, to: &mut [u8], start: u64) -> std::io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, to, start)
}

/// Where reading moves a place that all threads share, each reading has a file of its own.
#[cfg(not(unix))]
fn read_exact_at(_file: &File, path: &Path, to: &mut [u8], start: u64) -> std::io::Result<()> {
    use std::io::{Read, Seek, SeekFrom};
    let mut file = File::open(path)?;
    file.seek(SeekFrom::Start(start))?;
    file.read_exact(to)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_come_from_their_place() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), (0..=255).collect::<Vec<u8>>()).unwrap();
        let weights = WeightFile::open(file.path()).unwrap();
        weights.read_ahead(0..256);
        assert_eq!((weights.len(), weights.bytes(254..256).unwrap()), (256, vec![254, 255]));
        assert!(weights.bytes(7..7).unwrap().is_empty());
        let mut room = [0; 3];
        weights.read(100, &mut room).unwrap();
        assert_eq!(room, [100, 101, 102]);
    }

    #[test]
    fn bytes_that_are_gone_are_an_error_with_file_and_place() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), [0; 64]).unwrap();
        let weights = WeightFile::open(file.path()).unwrap();
        std::fs::write(file.path(), [0; 10]).unwrap();
        let error = weights.bytes(8..16).unwrap_err().to_string();
        assert!(error.starts_with(&*file.path().to_string_lossy()), "{error}");
        assert!(error.contains("bytes 8 to 16 of 64 cannot be read"), "{error}");
        assert!(weights.bytes(0..10).is_ok());
    }
}
