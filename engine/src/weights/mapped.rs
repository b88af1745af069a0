//! Files in memory maps: read ahead of whoever packs them, and given up piece by piece, so that what has been read
//! does not count as this process's memory.

use std::fs::File;
use std::ops::{Deref, Range};
use std::path::Path;
use std::sync::Arc;

use memmap2::Mmap;

use crate::{Error, Result};

/// A file's bytes; read-only.
pub(crate) struct Mapped(Mmap);

impl Mapped {
    pub fn open(path: &Path) -> Result<Arc<Self>> {
        let refuse = |error| Error::checkpoint(path, error);
        let file = File::open(path).map_err(refuse)?;
        // SAFETY: the map is read-only. As with every mapped weight file, the file must not be
        // truncated while it is being loaded; it is unmapped once its parts are built.
        #[allow(unsafe_code)]
        let map = unsafe { Mmap::map(&file) }.map_err(refuse)?;
        Ok(Arc::new(Self(map)))
    }

    /// Has the system read these bytes ahead, on a thread of its own: on a cold start the disk then works while
    /// weights are packed, and on more than one request at a time.
    #[cfg(unix)]
    pub fn read_ahead(self: &Arc<Self>, bytes: Range<usize>) {
        /// Systems cut longer wishes short: Linux to what its disk takes at once, or reads ahead by itself, which is
        /// this much where nobody has set more.
        const WISH: usize = 128 << 10;
        let mapped = Arc::clone(self);
        let ask = move || {
            for start in bytes.clone().step_by(WISH) {
                let len = WISH.min(bytes.end - start);
                if let Err(error) = mapped.0.advise_range(memmap2::Advice::WillNeed, start, len) {
                    tracing::debug!(%error, "the system does not read a weight file ahead");
                    return;
                }
            }
        };
        if let Err(error) = std::thread::Builder::new().name("read-ahead".to_owned()).spawn(ask) {
            tracing::debug!(%error, "no thread to read a weight file ahead");
        }
    }

    #[cfg(not(unix))]
    pub fn read_ahead(self: &Arc<Self>, _bytes: Range<usize>) {}

    /// Tells the system that these bytes have been read.
    #[cfg(unix)]
    pub fn release(&self, bytes: Range<usize>) {
        // SAFETY: a read-only map of a file: pages that are dropped come back from the file if read again.
        #[allow(unsafe_code)]
        let released =
            unsafe { self.0.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, bytes.start, bytes.len()) };
        if let Err(error) = released {
            tracing::debug!(%error, "the system keeps the pages of a weight file");
        }
    }

    #[cfg(not(unix))]
    pub fn release(&self, _bytes: Range<usize>) {}
}

impl Deref for Mapped {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}
