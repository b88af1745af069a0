//! What the artifact stores say when something is wrong: disks, servers, keys, and URLs that leave the farm.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use bytes::Bytes;
use farm::artifact::s3::S3Artifacts;
use farm::artifact::{ArtifactError, ArtifactStore, open};
use farm::config::{ArtifactsConfig, Environment, Secret};
use farm::id::SubmissionId;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use crate::artifact::{Subject, image, picture, s3_config};

/// The folder of a small disk, in the process that the test below starts.
const SMALL_DISK: &str = "KILN_TEST_SMALL_DISK";

/// Needs a small file system. A process in a mount namespace of its own may mount one, as root or, where the
/// kernel lets it, as root of a user namespace: so this test starts itself there.
#[test]
fn a_full_disk_is_full_and_keeps_no_part_of_an_object() {
    if let Some(folder) = Environment::of_this_process().get(SMALL_DISK) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        return runtime.block_on(fill(Path::new(folder)));
    }
    let namespace = ["--mount", "--map-root-user"];
    if !Command::new("unshare").args(namespace).arg("true").status().is_ok_and(|status| status.success()) {
        eprintln!("skipped: this user can mount no small disk");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let mount_and_go = "mount -t tmpfs -o size=2m small \"$1\" && shift && exec \"$@\"";
    let status = Command::new("unshare")
        .args(namespace)
        .args(["sh", "-c", mount_and_go, "sh"])
        .arg(folder.path())
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", "artifact_faults::a_full_disk_is_full_and_keeps_no_part_of_an_object"])
        .env(SMALL_DISK, folder.path())
        .status()
        .unwrap();
    assert!(status.success());
}

async fn fill(folder: &Path) {
    let artifacts = open(&ArtifactsConfig::default(), folder).unwrap();
    let mut stored = Vec::new();
    let error = loop {
        let key = image(SubmissionId::new());
        match artifacts.put(&key, picture(stored.len() as u64, 300_000)).await {
            Ok(()) => stored.push(key),
            Err(error) => break error,
        }
        assert!(stored.len() < 20, "the disk takes two megabytes");
    };
    assert!(matches!(error, ArtifactError::Full(_)), "{error}");
    let mut paths: Vec<_> = stored.iter().map(|key| key.path()).collect();
    paths.sort_unstable();
    assert_eq!(artifacts.list("").await.unwrap(), paths, "what was put is there and nothing else");
    for (number, key) in stored.iter().enumerate() {
        assert_eq!(artifacts.get(&key.path()).await.unwrap(), picture(number as u64, 300_000));
    }
    assert_eq!(std::fs::read_dir(folder.join(".staging")).unwrap().count(), 0, "no half-written file stays");

    // To the last byte, so that not even a ping finds room.
    let mut filler = std::fs::File::create(folder.join("filler")).unwrap();
    while std::io::Write::write_all(&mut filler, &[0; 4096]).is_ok() {}
    let error = artifacts.ping().await.unwrap_err();
    assert!(matches!(error, ArtifactError::Full(_)), "{error}");

    artifacts.delete(&stored[0].path()).await.unwrap();
    artifacts.ping().await.unwrap();
    artifacts.put(&stored[0], picture(0, 200_000)).await.unwrap();
}

/// The status and body of a plain GET, as a browser would send it.
async fn http_get(url: &str) -> (u16, Vec<u8>) {
    let (host, rest) = url.strip_prefix("http://").unwrap().split_once('/').unwrap();
    let mut stream = TcpStream::connect(host).await.unwrap();
    let request = format!("GET /{rest} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await.unwrap();
    let end = answer.windows(4).position(|window| window == b"\r\n\r\n").unwrap();
    let head = String::from_utf8_lossy(&answer[..end]).into_owned();
    (head.split(' ').nth(1).unwrap().parse().unwrap(), answer[end + 4..].to_vec())
}

#[tokio::test]
async fn a_presigned_url_reads_its_object_until_it_expires_and_no_other() {
    let Some(subject) = Subject::s3() else { return };
    let (key, other) = (image(SubmissionId::new()), image(SubmissionId::new()));
    subject.artifacts.put(&key, Bytes::from_static(b"picture")).await.unwrap();
    subject.artifacts.put(&other, Bytes::from_static(b"secret")).await.unwrap();
    let path = key.path();
    let presign = |seconds| subject.artifacts.presign(&path, Duration::from_secs(seconds));
    let url = presign(60).await.unwrap().expect("S3 can");
    assert_eq!(http_get(&url).await, (200, b"picture".to_vec()));

    let (place, query) = url.split_once('?').unwrap();
    assert_eq!(http_get(place).await.0, 403, "not without the signature");
    assert_eq!(http_get(&url.replace("X-Amz-Expires=60", "X-Amz-Expires=600")).await.0, 403, "not for longer");
    let elsewhere = place.replace(&path, &other.path());
    assert_ne!(elsewhere, place);
    assert_eq!(http_get(&format!("{elsewhere}?{query}")).await.0, 403, "not another object");

    let short = presign(1).await.unwrap().unwrap();
    tokio::time::sleep(Duration::from_millis(2500)).await;
    assert_eq!(http_get(&short).await.0, 403, "not afterwards");
    // Longer than any server allows becomes the longest.
    assert!(presign(u64::from(u32::MAX)).await.unwrap().unwrap().contains("X-Amz-Expires=604800"));
    subject.end().await;
}

#[tokio::test]
async fn a_presigned_url_names_the_address_that_clients_know() {
    let Some(mut config) = s3_config() else { return };
    config.public_endpoint = Some("https://pictures.example.com".into());
    let artifacts = S3Artifacts::open(&config).unwrap();
    let url = artifacts.presign("a.png", Duration::from_secs(60)).await.unwrap().unwrap();
    assert!(url.starts_with("https://pictures.example.com/"), "{url}");
    artifacts.ping().await.unwrap();
}

#[tokio::test]
async fn a_folder_presigns_nothing() {
    let subject = Subject::folder().unwrap();
    assert_eq!(subject.artifacts.presign("a.png", Duration::from_secs(60)).await.unwrap(), None);
}

/// A server at this address, which no real one has to stand behind.
fn elsewhere(endpoint: String) -> S3Artifacts {
    let config = ArtifactsConfig {
        url: "s3://renders".into(),
        endpoint: Some(endpoint),
        access_key_id: Some("someone".into()),
        secret_access_key: Some(Secret("secret".into())),
        ..ArtifactsConfig::default()
    };
    S3Artifacts::open(&config).unwrap()
}

#[tokio::test]
async fn a_dead_server_is_unavailable_soon() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let artifacts = elsewhere(format!("http://{}", listener.local_addr().unwrap()));
    drop(listener);
    let began = Instant::now();
    for outcome in [artifacts.ping().await, artifacts.get("a.png").await.map(drop), artifacts.delete("a.png").await] {
        assert!(matches!(outcome, Err(ArtifactError::Unavailable(_))), "{outcome:?}");
    }
    assert!(began.elapsed() < Duration::from_secs(20), "{:?}", began.elapsed());
}

#[tokio::test]
async fn a_silent_server_is_unavailable_soon() {
    // Connections wait in the listener's backlog, and nobody ever answers.
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let artifacts = elsewhere(format!("http://{}", listener.local_addr().unwrap()));
    let began = Instant::now();
    let outcome = artifacts.ping().await;
    assert!(matches!(outcome, Err(ArtifactError::Unavailable(_))), "{outcome:?}");
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
}

#[tokio::test]
async fn a_wrong_key_is_refused_in_plain_words() {
    let Some(mut config) = s3_config() else { return };
    config.secret_access_key = Some(Secret("not the secret".into()));
    let artifacts = S3Artifacts::open(&config).unwrap();
    let ping = artifacts.ping().await.unwrap_err();
    let put = artifacts.put(&image(SubmissionId::new()), Bytes::from_static(b"x")).await.unwrap_err();
    for error in [ping, put] {
        assert!(matches!(&error, ArtifactError::Internal(_)), "{error}");
        let said = error.to_string();
        assert!(said.contains("refuses this access key") && !said.contains("not the secret"), "{said}");
    }
}

#[tokio::test]
async fn a_missing_bucket_is_named_and_can_be_made() {
    let Some(mut config) = s3_config() else { return };
    let bucket = format!("test-{}", uuid::Uuid::now_v7());
    config.url = format!("s3://{bucket}");
    let artifacts = S3Artifacts::open(&config).unwrap();
    let error = artifacts.ping().await.unwrap_err();
    assert!(matches!(&error, ArtifactError::Internal(_)) && error.to_string().contains(&bucket), "{error}");
    artifacts.ensure_bucket().await.unwrap();
    artifacts.ensure_bucket().await.unwrap();
    artifacts.ping().await.unwrap();
    let key = image(SubmissionId::new());
    artifacts.put(&key, Bytes::from_static(b"x")).await.unwrap();
    assert_eq!(artifacts.list("").await.unwrap(), [key.path()]);
    artifacts.delete(&key.path()).await.unwrap();
}
