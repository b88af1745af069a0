//! Artifacts: stored objects. Two implementations, [`s3`] for a farm and [`folder`] for one machine,
//! held together by one conformance suite.

pub mod folder;
mod path;
pub mod s3;

use std::borrow::Cow;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;

use crate::config::ArtifactsConfig;
use crate::id::{JobId, SubmissionId};
use crate::latent;

/// What can go wrong with an artifact store.
#[derive(Debug, thiserror::Error)]
pub enum ArtifactError {
    /// There is no such object.
    #[error("there is no object `{0}`")]
    NotFound(String),
    /// Nobody answers, or the connection broke: try again later.
    #[error("the artifact store is unavailable: {0}")]
    Unavailable(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// There is no room left.
    #[error("the artifact store is full: {0}")]
    Full(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// An error that trying again will not mend (credentials, a missing bucket).
    #[error("the artifact store failed: {0}")]
    Internal(#[source] Box<dyn std::error::Error + Send + Sync>),
}

/// Shorthand.
pub type Result<T, E = ArtifactError> = std::result::Result<T, E>;

/// Names an object; alone knows its path and content type. The attempt is part of the path, so
/// that two attempts never write the same object and the job's row names the winner.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum ArtifactKey {
    /// A rendered PNG.
    Image {
        /// The submission.
        submission_id: SubmissionId,
        /// The job.
        job_id: JobId,
        /// The attempt that rendered it.
        attempt: u32,
    },
    /// What a client sent for jobs to start from: an init image, a mask or a latent. Its name is what it holds, so that it never changes
    /// and counts once however often it is sent.
    Upload {
        /// The SHA-256 of its bytes, in hexadecimal.
        sha256: String,
        /// What it is.
        format: UploadFormat,
    },
    /// The latent of a job that ends in the middle of the way from noise. Its name tells its size.
    Latent {
        /// The submission.
        submission_id: SubmissionId,
        /// The job.
        job_id: JobId,
        /// The attempt that rendered it.
        attempt: u32,
        /// Values of a line.
        width: u32,
        /// Lines.
        height: u32,
    },
    /// The JSON that describes an image.
    Sidecar {
        /// The submission.
        submission_id: SubmissionId,
        /// The job.
        job_id: JobId,
        /// The attempt that rendered it.
        attempt: u32,
    },
}

impl ArtifactKey {
    /// The object's path: ASCII, no `..`, no leading slash.
    pub fn path(&self) -> String {
        match self {
            Self::Image { submission_id, job_id, attempt } => {
                format!("submissions/{submission_id}/images/{job_id}.{attempt}.png")
            }
            Self::Upload { sha256, format } => format!("uploads/{sha256}.{}", format.name_end()),
            Self::Latent { submission_id, job_id, attempt, width, height } => {
                let end = latent::name_end(*width, *height);
                format!("{}{end}", latent_prefix(*submission_id, *job_id, *attempt))
            }
            Self::Sidecar { submission_id, job_id, attempt } => {
                format!("submissions/{submission_id}/sidecars/{job_id}.{attempt}.json")
            }
        }
    }

    /// The object's content type.
    pub fn content_type(&self) -> &'static str {
        match self {
            Self::Image { .. } => "image/png",
            Self::Upload { format, .. } => format.content_type(),
            Self::Latent { .. } => latent::CONTENT_TYPE,
            Self::Sidecar { .. } => "application/json",
        }
    }
}

/// What the paths of an attempt's latents begin with, whatever their size.
fn latent_prefix(submission_id: SubmissionId, job_id: JobId, attempt: u32) -> String {
    format!("submissions/{submission_id}/latents/{job_id}.{attempt}.")
}

/// The content type of what a job has made, by its path: a picture, or a latent.
pub fn content_type_of_result(path: &str) -> &'static str {
    if latent::is_latent(path) { latent::CONTENT_TYPE } else { "image/png" }
}

/// Deletes whatever an attempt has stored, as far as it got.
pub async fn delete_attempt(
    artifacts: &dyn ArtifactStore,
    submission_id: SubmissionId,
    job_id: JobId,
    attempt: u32,
) -> Result<()> {
    let image = ArtifactKey::Image { submission_id, job_id, attempt };
    let sidecar = ArtifactKey::Sidecar { submission_id, job_id, attempt };
    let mut paths = artifacts.list(&latent_prefix(submission_id, job_id, attempt)).await?;
    paths.extend([image.path(), sidecar.path()]);
    for path in paths {
        artifacts.delete(&path).await?;
    }
    Ok(())
}

/// What clients may send for jobs to start from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum UploadFormat {
    /// Portable Network Graphics.
    Png,
    /// JPEG.
    Jpeg,
    /// WebP.
    Webp,
    /// A latent of so many values.
    Latent {
        /// Values of a line.
        width: u32,
        /// Lines.
        height: u32,
    },
}

impl UploadFormat {
    /// Every format of pictures.
    pub const PICTURES: [Self; 3] = [Self::Png, Self::Jpeg, Self::Webp];

    /// Its content type.
    pub fn content_type(self) -> &'static str {
        match self {
            Self::Png => "image/png",
            Self::Jpeg => "image/jpeg",
            Self::Webp => "image/webp",
            Self::Latent { .. } => latent::CONTENT_TYPE,
        }
    }

    fn name_end(self) -> Cow<'static, str> {
        match self {
            Self::Png => "png".into(),
            Self::Jpeg => "jpg".into(),
            Self::Webp => "webp".into(),
            Self::Latent { width, height } => latent::name_end(width, height).into(),
        }
    }
}

/// Stores objects whole.
#[async_trait]
pub trait ArtifactStore: Send + Sync + 'static {
    /// Answers if the store can be reached and written to.
    async fn ping(&self) -> Result<()>;

    /// Writes an object; an existing one is replaced. A reader sees the old or the new, never a part.
    async fn put(&self, key: &ArtifactKey, bytes: Bytes) -> Result<()>;

    /// Reads an object by its path, as a job's row names it.
    async fn get(&self, path: &str) -> Result<Bytes>;

    /// Deletes an object; it is fine if there is none.
    async fn delete(&self, path: &str) -> Result<()>;

    /// Paths of all objects that start with `prefix`, in order. For tests, exports and operators.
    async fn list(&self, prefix: &str) -> Result<Vec<String>>;

    /// The path of the object that an `s3://` address names, if it lies in this store.
    fn path_of(&self, address: &str) -> Option<String>;

    /// A URL that anyone may read the object with for that long (a week at most), or `None` where the store cannot
    /// make one (a folder).
    async fn presign(&self, path: &str, valid_for: Duration) -> Result<Option<String>>;
}

/// A shared artifact store.
pub type SharedArtifacts = Arc<dyn ArtifactStore>;

/// The artifact store that the configuration names, or `default_folder` if it names none. A folder is made if it is
/// missing; a bucket is not, and is first asked for by [`ArtifactStore::ping`].
pub fn open(config: &ArtifactsConfig, default_folder: &Path) -> Result<SharedArtifacts> {
    let folder = match config.url.as_str() {
        "" => default_folder,
        url if url.starts_with("s3:") => return Ok(Arc::new(s3::S3Artifacts::open(config)?)),
        url => Path::new(folder_of(url)?),
    };
    Ok(Arc::new(folder::FolderArtifacts::open(folder)?))
}

/// The folder that `file:FOLDER`, `file://FOLDER` or a plain path names.
fn folder_of(url: &str) -> Result<&str> {
    let wrong = || {
        let message = format!(
            "the artifact store's URL must be `s3://BUCKET[/PREFIX]`, `file:FOLDER` or a folder, but is `{url}`"
        );
        ArtifactError::Internal(message.into())
    };
    let folder = match url.strip_prefix("file:") {
        None if url.contains("://") => return Err(wrong()),
        None => url,
        Some(rest) => match rest.strip_prefix("//") {
            None => rest,
            Some(absolute) if absolute.starts_with('/') => absolute,
            Some(_) => return Err(wrong()),
        },
    };
    if folder.is_empty() { Err(wrong()) } else { Ok(folder) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_uploads_path_is_what_it_holds() {
        let formats = UploadFormat::PICTURES.into_iter().chain([UploadFormat::Latent { width: 128, height: 96 }]);
        let paths = ["uploads/ab.png", "uploads/ab.jpg", "uploads/ab.webp", "uploads/ab.128x96.safetensors"];
        for (format, path) in formats.zip(paths) {
            let key = ArtifactKey::Upload { sha256: "ab".into(), format };
            assert_eq!(key.path(), path);
            assert!(path::check(&key.path()).is_ok());
            assert_eq!(key.content_type(), format.content_type());
        }
    }

    #[test]
    fn a_folder_can_be_named_in_three_ways() {
        for url in ["/data/pictures", "file:/data/pictures", "file:///data/pictures"] {
            assert_eq!(folder_of(url).unwrap(), "/data/pictures");
        }
        assert_eq!(folder_of("file:pictures").unwrap(), "pictures");
    }

    #[test]
    fn other_urls_are_refused_with_what_is_allowed() {
        for url in ["http://x/y", "gs://bucket", "file:", "file://host/x"] {
            let error = folder_of(url).unwrap_err().to_string();
            assert!(error.contains("s3://BUCKET") && error.contains(url), "{error}");
        }
    }
}
