//! The artifact stores' conformance suite: each sentence holds for every implementation.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use farm::artifact::s3::S3Artifacts;
use farm::artifact::{ArtifactError, ArtifactKey, ArtifactStore, SharedArtifacts, open};
use farm::config::{ArtifactsConfig, Secret};
use farm::id::{JobId, SubmissionId};
use futures_util::{StreamExt, TryStreamExt, stream};
use tempfile::TempDir;

use crate::services;

/// A store under test, with a place of its own.
pub struct Subject {
    pub artifacts: SharedArtifacts,
    /// Removed with the subject.
    _folder: Option<TempDir>,
}

impl Subject {
    pub fn folder() -> Option<Self> {
        let folder = tempfile::tempdir().unwrap();
        let artifacts = open(&ArtifactsConfig::default(), folder.path()).unwrap();
        Some(Self { artifacts, _folder: Some(folder) })
    }

    pub fn s3() -> Option<Self> {
        let artifacts = open(&s3_config()?, std::path::Path::new("unused")).unwrap();
        Some(Self { artifacts, _folder: None })
    }

    /// Removes what the test made.
    pub async fn end(self) {
        let paths = self.artifacts.list("").await.unwrap();
        let deleted = stream::iter(paths).map(|path| {
            let artifacts = self.artifacts.clone();
            async move { artifacts.delete(&path).await }
        });
        deleted.buffer_unordered(16).try_collect::<Vec<()>>().await.unwrap();
    }
}

/// The real server, below a prefix of the test's own.
pub fn s3_config() -> Option<ArtifactsConfig> {
    let url = services::variable("KILN_ARTIFACTS_URL")?;
    let variable = |name| services::variable(name).expect("it is set where the URL is");
    Some(ArtifactsConfig {
        url: format!("{}/test-{}", url.trim_end_matches('/'), uuid::Uuid::now_v7()),
        endpoint: Some(variable("KILN_ARTIFACTS_ENDPOINT")),
        region: variable("KILN_ARTIFACTS_REGION"),
        access_key_id: Some(variable("KILN_ARTIFACTS_ACCESS_KEY_ID")),
        secret_access_key: Some(Secret(variable("KILN_ARTIFACTS_SECRET_ACCESS_KEY"))),
        ..ArtifactsConfig::default()
    })
}

pub fn image(submission_id: SubmissionId) -> ArtifactKey {
    ArtifactKey::Image { submission_id, job_id: JobId::new(), attempt: 1 }
}

/// Bytes that compress badly and tell one number from another.
pub fn picture(number: u64, length: usize) -> Bytes {
    let mut state = number.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let bytes = std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    });
    bytes.take(length).collect()
}

fn is_missing(outcome: Result<Bytes, ArtifactError>, path: &str) -> bool {
    matches!(outcome, Err(ArtifactError::NotFound(missing)) if missing == path)
}

async fn an_object_comes_back_byte_for_byte(subject: &Subject) {
    for length in [0, 1, 100_000, 5_000_000] {
        let (key, bytes) = (image(SubmissionId::new()), picture(length as u64, length));
        subject.artifacts.put(&key, bytes.clone()).await.unwrap();
        assert_eq!(subject.artifacts.get(&key.path()).await.unwrap(), bytes);
    }
}

async fn an_image_and_its_sidecar_are_two_objects(subject: &Subject) {
    let (submission_id, job_id) = (SubmissionId::new(), JobId::new());
    let image = ArtifactKey::Image { submission_id, job_id, attempt: 1 };
    let sidecar = ArtifactKey::Sidecar { submission_id, job_id, attempt: 1 };
    subject.artifacts.put(&image, Bytes::from_static(b"png")).await.unwrap();
    subject.artifacts.put(&sidecar, Bytes::from_static(b"{}")).await.unwrap();
    assert_eq!(subject.artifacts.get(&image.path()).await.unwrap(), "png");
    assert_eq!(subject.artifacts.get(&sidecar.path()).await.unwrap(), "{}");
}

async fn a_missing_object_is_named(subject: &Subject) {
    let key = image(SubmissionId::new());
    assert!(is_missing(subject.artifacts.get(&key.path()).await, &key.path()));
    subject.artifacts.put(&key, Bytes::from_static(b"png")).await.unwrap();
    let other = image(SubmissionId::new()).path();
    assert!(is_missing(subject.artifacts.get(&other).await, &other));
}

async fn a_reader_sees_the_old_object_or_the_new_one_and_never_a_part(subject: &Subject) {
    let key = image(SubmissionId::new());
    let versions = [picture(1, 600_000), picture(2, 500_000)];
    subject.artifacts.put(&key, versions[0].clone()).await.unwrap();
    let writer = tokio::spawn({
        let (artifacts, key, versions) = (subject.artifacts.clone(), key.clone(), versions.clone());
        async move {
            for turn in 0..20 {
                artifacts.put(&key, versions[turn % 2].clone()).await.unwrap();
            }
        }
    });
    let mut reads = 0;
    while !writer.is_finished() || reads == 0 {
        match subject.artifacts.get(&key.path()).await {
            Ok(read) => assert!(versions.contains(&read), "a torn object of {} bytes", read.len()),
            // A server that keeps an object's checksum apart may send the one of the other version: the client
            // notices and says that another try may work.
            Err(ArtifactError::Unavailable(_)) => {}
            Err(error) => panic!("{error}"),
        }
        reads += 1;
    }
    writer.await.unwrap();
    assert_eq!(subject.artifacts.get(&key.path()).await.unwrap(), versions[1]);
}

async fn deleting_twice_is_fine(subject: &Subject) {
    let key = image(SubmissionId::new());
    subject.artifacts.put(&key, Bytes::from_static(b"png")).await.unwrap();
    subject.artifacts.delete(&key.path()).await.unwrap();
    assert!(is_missing(subject.artifacts.get(&key.path()).await, &key.path()));
    subject.artifacts.delete(&key.path()).await.unwrap();
    subject.artifacts.delete("submissions/never/was.png").await.unwrap();
}

async fn a_listing_is_whole_and_in_order_beyond_a_thousand_objects(subject: &Subject) {
    let submission = SubmissionId::new();
    let other = image(SubmissionId::new());
    subject.artifacts.put(&other, Bytes::from_static(b"other")).await.unwrap();
    let keys: Vec<_> = (0..1203).map(|_| image(submission)).collect();
    let puts = stream::iter(keys.clone()).map(|key| {
        let artifacts: Arc<dyn ArtifactStore> = subject.artifacts.clone();
        async move { artifacts.put(&key, Bytes::from_static(b"x")).await }
    });
    puts.buffer_unordered(32).try_collect::<Vec<()>>().await.unwrap();
    let mut wanted: Vec<_> = keys.iter().map(ArtifactKey::path).collect();
    wanted.sort_unstable();
    let folder = format!("submissions/{submission}/");
    assert_eq!(subject.artifacts.list(&folder).await.unwrap(), wanted);
    assert_eq!(subject.artifacts.list("").await.unwrap().len(), wanted.len() + 1);
    assert_eq!(subject.artifacts.list(&wanted[7]).await.unwrap(), wanted[7..8]);
    let start = &wanted[7][..wanted[7].len() - 3];
    assert_eq!(subject.artifacts.list(start).await.unwrap(), wanted[7..8], "a prefix may end anywhere");
    assert!(subject.artifacts.list("submissions/none").await.unwrap().is_empty());
}

async fn no_path_leads_out_of_the_store(subject: &Subject) {
    for path in ["../evil", "submissions/../../evil", "/etc/passwd", "a//b", "a\\..\\b", "a\0b", "", ".staging/x"] {
        let read = subject.artifacts.get(path).await;
        assert!(matches!(read, Err(ArtifactError::Internal(_))), "{path:?}: {read:?}");
        assert!(subject.artifacts.delete(path).await.is_err(), "{path:?}");
        assert!(subject.artifacts.presign(path, Duration::from_secs(60)).await.is_err(), "{path:?}");
    }
    assert!(subject.artifacts.list("../").await.is_err());
}

async fn it_answers_a_ping(subject: &Subject) {
    subject.artifacts.ping().await.unwrap();
}

/// One test per sentence and implementation.
macro_rules! conformance {
    ($($sentence:ident)*) => {
        mod folder {
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $sentence() {
                super::$sentence(&super::Subject::folder().unwrap()).await;
            })*
        }
        mod s3 {
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $sentence() {
                let Some(subject) = super::Subject::s3() else { return };
                super::$sentence(&subject).await;
                subject.end().await;
            })*
        }
    };
}

conformance! {
    an_object_comes_back_byte_for_byte
    an_image_and_its_sidecar_are_two_objects
    a_missing_object_is_named
    a_reader_sees_the_old_object_or_the_new_one_and_never_a_part
    deleting_twice_is_fine
    a_listing_is_whole_and_in_order_beyond_a_thousand_objects
    no_path_leads_out_of_the_store
    it_answers_a_ping
}

#[test]
fn an_s3_store_and_a_folder_cannot_be_mistaken_for_each_other() {
    let url = |url: &str| ArtifactsConfig { url: url.into(), ..ArtifactsConfig::default() };
    let folder = tempfile::tempdir().unwrap();
    assert!(S3Artifacts::open(&url("file:/tmp/x")).is_err());
    assert!(open(&url("s3:bucket"), folder.path()).is_err());
    assert!(open(&url("ftp://host/x"), folder.path()).is_err());
}
