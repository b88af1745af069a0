//! Where the jobs of a streamed submission wait on disk until the last line has been found good.

use std::io;
use std::path::{Path, PathBuf};

use farm::id::JobId;
use farm::job::NewJob;
use farm::spec::RenderSpec;
use farm::store::JobStream;
use tokio::io::{AsyncBufReadExt, AsyncSeekExt, AsyncWriteExt, BufReader, BufWriter};

/// Bytes that are collected before a write.
const BUFFER_BYTES: usize = 256 * 1024;

/// What can go wrong with a spool.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SpoolError {
    /// The disk is full.
    #[error("no room is left in {folder}: {source}", folder = .folder.display())]
    Full {
        /// Where the spool lies.
        folder: PathBuf,
        /// The operating system's word.
        source: io::Error,
    },
    /// Anything else.
    #[error("cannot spool to {folder}: {source}", folder = .folder.display())]
    Failed {
        /// Where the spool lies.
        folder: PathBuf,
        /// The operating system's word.
        source: io::Error,
    },
}

impl SpoolError {
    fn of(folder: &Path, source: io::Error) -> Self {
        let folder = folder.to_owned();
        match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::Full { folder, source },
            _ => Self::Failed { folder, source },
        }
    }
}

/// A file without a name: whatever becomes of this process, nothing stays behind.
#[derive(Debug)]
pub(crate) struct Spool {
    file: BufWriter<tokio::fs::File>,
    folder: PathBuf,
    jobs: u64,
    // The jobs of the current piece, written at once.
    piece: Vec<u8>,
}

impl Spool {
    /// An empty spool in `folder`, or in the system's folder for temporary files.
    pub(crate) async fn create(folder: Option<&Path>) -> Result<Self, SpoolError> {
        let folder = folder.map_or_else(std::env::temp_dir, Path::to_owned);
        let file = tokio::task::spawn_blocking({
            let folder = folder.clone();
            move || tempfile::tempfile_in(folder)
        });
        let file = file.await.map_err(io::Error::other).flatten().map_err(|source| SpoolError::of(&folder, source))?;
        Ok(Self::over(file, folder))
    }

    fn over(file: std::fs::File, folder: PathBuf) -> Self {
        let file = BufWriter::with_capacity(BUFFER_BYTES, tokio::fs::File::from_std(file));
        Self { file, folder, jobs: 0, piece: Vec::new() }
    }

    /// Jobs so far.
    pub(crate) fn jobs(&self) -> u64 {
        self.jobs
    }

    /// Adds a job. It stays in memory until [`Spool::flush`].
    pub(crate) fn push(&mut self, spec: &RenderSpec) {
        serde_json::to_writer(&mut self.piece, spec).expect("a spec can be written as JSON");
        self.piece.push(b'\n');
        self.jobs += 1;
    }

    /// Writes what was pushed.
    pub(crate) async fn flush(&mut self) -> Result<(), SpoolError> {
        let written = self.file.write_all(&self.piece).await;
        self.piece.clear();
        written.map_err(|source| SpoolError::of(&self.folder, source))
    }

    /// Nothing more comes: ready to be read from the start.
    pub(crate) async fn finish(mut self) -> Result<SpooledJobs, SpoolError> {
        self.flush().await?;
        let rewound = async {
            self.file.flush().await?;
            let mut file = self.file.into_inner();
            file.rewind().await?;
            Ok(file)
        };
        let file = rewound.await.map_err(|source| SpoolError::of(&self.folder, source))?;
        Ok(SpooledJobs { file })
    }
}

/// Valid jobs on disk.
#[derive(Debug)]
pub(crate) struct SpooledJobs {
    file: tokio::fs::File,
}

impl SpooledJobs {
    /// The jobs in order, each with a new id.
    pub(crate) fn into_stream(self) -> JobStream<'static> {
        let lines = BufReader::with_capacity(BUFFER_BYTES, self.file).lines();
        Box::pin(futures_util::stream::try_unfold(lines, |mut lines| async move {
            let Some(line) = lines.next_line().await? else { return Ok(None) };
            let spec = serde_json::from_str(&line)?;
            Ok(Some((NewJob { id: JobId::new(), spec }, lines)))
        }))
    }
}

#[cfg(test)]
mod tests {
    use farm::job::Lane;
    use futures_util::TryStreamExt;

    use super::*;

    fn spec(seed: u64) -> RenderSpec {
        RenderSpec {
            model: "demo".into(),
            prompt: "two\nlines and “quotes”".into(),
            negative_prompt: String::new(),
            width: 128,
            height: 64,
            steps: 20,
            guidance_scale: 7.3,
            sampler: None,
            schedule: None,
            seed,
            init_image: None,
            lane: Lane::Bulk,
            tags: vec!["a".into()],
            metadata: serde_json::Map::new(),
            options: farm::spec::FamilyOptions::default(),
        }
    }

    #[tokio::test]
    async fn jobs_come_back_in_order_and_unchanged() {
        let mut spool = Spool::create(None).await.unwrap();
        for seed in 0..1000 {
            spool.push(&spec(seed));
            if seed % 7 == 0 {
                spool.flush().await.unwrap();
            }
        }
        assert_eq!(spool.jobs(), 1000);
        let spooled = spool.finish().await.unwrap();
        let jobs: Vec<NewJob> = spooled.into_stream().try_collect().await.unwrap();
        assert_eq!(
            jobs.iter().map(|job| job.spec.clone()).collect::<Vec<_>>(),
            (0..1000).map(spec).collect::<Vec<_>>()
        );
        assert!(jobs.windows(2).all(|pair| pair[0].id < pair[1].id), "ids grow with the place in the submission");
    }

    #[cfg(target_os = "linux")]
    #[tokio::test]
    async fn a_full_disk_is_told_from_other_failures() {
        let full = std::fs::File::options().read(true).write(true).open("/dev/full").unwrap();
        let mut spool = Spool::over(full, "/dev".into());
        for seed in 0..5000 {
            spool.push(&spec(seed));
        }
        let error = spool.finish().await.expect_err("nothing fits on this device");
        assert!(matches!(&error, SpoolError::Full { folder, .. } if folder == Path::new("/dev")), "{error}");
    }

    #[tokio::test]
    async fn a_folder_that_does_not_exist_is_named() {
        let error = Spool::create(Some(Path::new("/no/such/folder"))).await.expect_err("there is no such folder");
        assert!(matches!(&error, SpoolError::Failed { .. }), "{error}");
        assert!(error.to_string().contains("/no/such/folder"), "{error}");
    }
}
