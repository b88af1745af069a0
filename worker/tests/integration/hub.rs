//! Checkpoints by hub id, against a small server that speaks the hub's API.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{Path as UrlPath, State};
use axum::http::{HeaderMap, Method, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use farm::config::{Secret, WorkerConfig};
use farm::job::FailureKind;
use futures_util::stream;
use sha2::{Digest, Sha256};
use tempfile::TempDir;
use tokio_util::sync::CancellationToken;
use worker::resolve::{ResolveError, resolve};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
const WEIGHTS: &str = "unet/diffusion_pytorch_model.safetensors";

/// What the server does, and what it was asked.
struct Hub {
    files: BTreeMap<String, Vec<u8>>,
    token: Option<&'static str>,
    /// Large files are cut after so many bytes, this often.
    cut_after: usize,
    cuts: AtomicUsize,
    /// Answers with the whole file whatever was asked.
    ignores_ranges: bool,
    /// Sends other bytes than it promised, this often.
    corruptions: AtomicUsize,
    requests: Mutex<Vec<String>>,
    bytes_sent: AtomicU64,
}

impl Hub {
    fn new() -> Self {
        let index = serde_json::json!({
            "_class_name": "StableDiffusionPipeline",
            "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
            "scheduler": ["diffusers", "DDIMScheduler"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "unet": ["diffusers", "UNet2DConditionModel"],
        });
        let weights = (0..300_000u32).flat_map(u32::to_le_bytes).collect();
        let files = [
            ("model_index.json", index.to_string().into_bytes()),
            ("scheduler/scheduler_config.json", b"{}".to_vec()),
            ("tokenizer/merges.txt", b"#version\n".to_vec()),
            ("tokenizer/vocab.json", Vec::new()),
            ("unet/config.json", b"{ }".to_vec()),
            (WEIGHTS, weights),
            ("unet/diffusion_pytorch_model.bin", b"pickle".to_vec()),
            ("safety_checker/model.safetensors", b"unneeded".to_vec()),
        ];
        Self {
            files: files.into_iter().map(|(name, bytes)| (name.to_owned(), bytes)).collect(),
            token: None,
            cut_after: usize::MAX,
            cuts: AtomicUsize::new(0),
            ignores_ranges: false,
            corruptions: AtomicUsize::new(0),
            requests: Mutex::default(),
            bytes_sent: AtomicU64::new(0),
        }
    }

    /// Serves until the test ends; the address.
    async fn serve(self) -> (Arc<Self>, String) {
        let hub = Arc::new(self);
        let router = Router::new()
            .route("/api/models/{org}/{name}/revision/{revision}", get(info))
            .route("/{org}/{name}/resolve/{commit}/{*file}", get(metadata))
            .route("/cdn/{*file}", get(content))
            .with_state(Arc::clone(&hub));
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        tokio::spawn(async move { axum::serve(listener, router).await });
        (hub, address)
    }

    fn note(&self, request: String) {
        self.requests.lock().unwrap().push(request);
    }

    fn requested(&self, what: &str) -> Vec<String> {
        self.requests.lock().unwrap().iter().filter(|request| request.contains(what)).cloned().collect()
    }

    fn admits(&self, headers: &HeaderMap) -> bool {
        let given = headers.get("authorization").and_then(|value| value.to_str().ok());
        self.token.is_none_or(|token| given == Some(&format!("Bearer {token}")))
    }
}

async fn info(
    State(hub): State<Arc<Hub>>,
    UrlPath((org, name, revision)): UrlPath<(String, String, String)>,
    headers: HeaderMap,
) -> Response {
    hub.note(format!("info {org}/{name} {revision}"));
    if !hub.admits(&headers) {
        return StatusCode::UNAUTHORIZED.into_response();
    }
    if (org.as_str(), name.as_str()) != ("org", "shapes") || !["main", "v1", COMMIT].contains(&revision.as_str()) {
        return StatusCode::NOT_FOUND.into_response();
    }
    let siblings: Vec<_> = hub.files.keys().map(|file| serde_json::json!({"rfilename": file})).collect();
    axum::Json(serde_json::json!({"sha": COMMIT, "siblings": siblings})).into_response()
}

/// Small files are answered with here; large ones lie behind a redirect to elsewhere, as the hub does it.
async fn metadata(
    State(hub): State<Arc<Hub>>,
    UrlPath((_, _, commit, file)): UrlPath<(String, String, String, String)>,
    method: Method,
    headers: HeaderMap,
) -> Response {
    hub.note(format!("{method} {file}"));
    if !hub.admits(&headers) {
        return StatusCode::UNAUTHORIZED.into_response();
    }
    let Some(bytes) = hub.files.get(&file).filter(|_| commit == COMMIT) else {
        return StatusCode::NOT_FOUND.into_response();
    };
    if file != WEIGHTS {
        let etag = format!("\"{}\"", &hash(bytes)[..40]);
        return ([("etag", etag), ("x-repo-commit", COMMIT.into())], bytes.clone()).into_response();
    }
    let headers = [
        ("location", format!("/cdn/{file}?signed")),
        ("x-linked-etag", format!("\"{}\"", hash(bytes))),
        ("x-linked-size", bytes.len().to_string()),
        ("x-repo-commit", COMMIT.to_owned()),
    ];
    // The hub's own redirects are relative, those to its content network are not.
    let host = format!("http://localhost{}", headers[0].1);
    let location = if method == Method::HEAD { host } else { headers[0].1.clone() };
    let mut response = (StatusCode::FOUND, headers).into_response();
    response.headers_mut().insert("location", location.parse().unwrap());
    response
}

async fn content(State(hub): State<Arc<Hub>>, UrlPath(file): UrlPath<String>, headers: HeaderMap) -> Response {
    let range = headers.get("range").map(|value| value.to_str().unwrap().to_owned());
    hub.note(format!("content {file} {}", range.as_deref().unwrap_or("whole")));
    let mut bytes = hub.files[&file].clone();
    let start = range
        .filter(|_| !hub.ignores_ranges)
        .map(|range| range.strip_prefix("bytes=").unwrap().strip_suffix('-').unwrap().parse::<usize>().unwrap());
    if hub.corruptions.fetch_update(SeqCst, SeqCst, |left| left.checked_sub(1)).is_ok() {
        bytes[0] ^= 1;
    }
    let (total, rest) = (bytes.len(), bytes.split_off(start.unwrap_or(0)));
    let is_cut =
        rest.len() > hub.cut_after && hub.cuts.fetch_update(SeqCst, SeqCst, |left| left.checked_sub(1)).is_ok();
    let sent = if is_cut { &rest[..hub.cut_after] } else { &rest[..] };
    hub.bytes_sent.fetch_add(sent.len() as u64, SeqCst);
    let mut response = Response::builder().header("content-length", rest.len());
    if let Some(start) = start {
        response = response
            .status(StatusCode::PARTIAL_CONTENT)
            .header("content-range", format!("bytes {start}-{}/{total}", total - 1));
    }
    // An error in the body cuts the connection.
    let mut chunks = vec![Ok(Bytes::copy_from_slice(sent))];
    if is_cut {
        chunks.push(Err(std::io::Error::other("cut by the test")));
    }
    response.body(Body::from_stream(stream::iter(chunks))).unwrap()
}

fn hash(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

fn config(endpoint: &str, cache: &TempDir) -> WorkerConfig {
    WorkerConfig {
        hub_endpoint: Some(endpoint.to_owned()),
        hub_cache: Some(cache.path().to_owned()),
        ..WorkerConfig::default()
    }
}

async fn ask(config: &WorkerConfig, source: &str) -> Result<std::path::PathBuf, ResolveError> {
    resolve(source, config, &CancellationToken::new()).await
}

fn assert_whole(folder: &Path, hub: &Hub) {
    for (file, bytes) in &hub.files {
        let is_needed = !file.starts_with("safety_checker") && !file.ends_with(".bin");
        assert_eq!(std::fs::read(folder.join(file)).ok().as_ref(), is_needed.then_some(bytes), "{file}");
    }
}

#[tokio::test]
async fn what_rendering_needs_is_downloaded_once_and_then_found_offline() {
    let cache = tempfile::tempdir().unwrap();
    let (hub, address) = Hub::new().serve().await;
    let mut config = config(&address, &cache);
    let folder = ask(&config, "org/shapes").await.unwrap();
    assert!(folder.ends_with(format!("hub/models--org--shapes/snapshots/{COMMIT}")), "{}", folder.display());
    assert_whole(&folder, &hub);
    let asked = hub.requests.lock().unwrap().len();
    assert_eq!(ask(&config, "org/shapes").await.unwrap(), folder);
    config.offline = true;
    assert_eq!(ask(&config, "org/shapes").await.unwrap(), folder);
    assert_eq!(hub.requests.lock().unwrap().len(), asked, "the cache comes first");
}

#[tokio::test]
async fn a_cut_download_goes_on_where_it_ended() {
    let cache = tempfile::tempdir().unwrap();
    let hub = Hub { cut_after: 500_000, cuts: AtomicUsize::new(2), ..Hub::new() };
    let (hub, address) = hub.serve().await;
    let folder = ask(&config(&address, &cache), "org/shapes").await.unwrap();
    assert_whole(&folder, &hub);
    let transfers = hub.requested("content ");
    assert_eq!(transfers.len(), 3, "{transfers:?}");
    assert!(transfers[1].contains("bytes="), "{transfers:?}");
    // What was on its way when the connection broke may come twice; the rest does not.
    let total = hub.files[WEIGHTS].len() as u64;
    assert!(hub.bytes_sent.load(SeqCst) <= total + 2 * 500_000);
}

#[tokio::test]
async fn a_download_goes_on_after_the_worker_was_restarted() {
    let cache = tempfile::tempdir().unwrap();
    let (hub, address) = Hub::new().serve().await;
    let weights = &hub.files[WEIGHTS];
    let blobs = cache.path().join("hub/models--org--shapes/blobs");
    std::fs::create_dir_all(&blobs).unwrap();
    std::fs::write(blobs.join(format!("{}.part", hash(weights))), &weights[..1_000_000]).unwrap();
    let folder = ask(&config(&address, &cache), "org/shapes").await.unwrap();
    assert_whole(&folder, &hub);
    assert_eq!(hub.requested("content "), [format!("content {WEIGHTS} bytes=1000000-")]);
    assert_eq!(hub.bytes_sent.load(SeqCst), 200_000);
}

#[tokio::test]
async fn a_part_that_is_whole_already_is_taken_and_one_that_is_too_long_is_not() {
    for extra in [0, 7] {
        let cache = tempfile::tempdir().unwrap();
        let (hub, address) = Hub::new().serve().await;
        let mut part = hub.files[WEIGHTS].clone();
        part.extend(std::iter::repeat_n(0, extra));
        let blobs = cache.path().join("hub/models--org--shapes/blobs");
        std::fs::create_dir_all(&blobs).unwrap();
        std::fs::write(blobs.join(format!("{}.part", hash(&hub.files[WEIGHTS]))), part).unwrap();
        let folder = ask(&config(&address, &cache), "org/shapes").await.unwrap();
        assert_whole(&folder, &hub);
        assert_eq!(hub.requested("content ").len(), usize::from(extra > 0));
    }
}

#[tokio::test]
async fn a_server_that_ignores_ranges_gives_the_right_file_all_the_same() {
    let cache = tempfile::tempdir().unwrap();
    let hub = Hub { cut_after: 500_000, cuts: AtomicUsize::new(1), ignores_ranges: true, ..Hub::new() };
    let (hub, address) = hub.serve().await;
    let folder = ask(&config(&address, &cache), "org/shapes").await.unwrap();
    assert_whole(&folder, &hub);
}

#[tokio::test]
async fn a_file_that_does_not_match_its_hash_is_fetched_again() {
    let cache = tempfile::tempdir().unwrap();
    let hub = Hub { corruptions: AtomicUsize::new(1), ..Hub::new() };
    let (hub, address) = hub.serve().await;
    let folder = ask(&config(&address, &cache), "org/shapes").await.unwrap();
    assert_whole(&folder, &hub);
    assert_eq!(hub.requested("content ").len(), 2);
}

#[tokio::test]
async fn a_revision_can_be_pinned() {
    let cache = tempfile::tempdir().unwrap();
    let (hub, address) = Hub::new().serve().await;
    let config = config(&address, &cache);
    ask(&config, "org/shapes@v1").await.unwrap();
    ask(&config, &format!("org/shapes@{COMMIT}")).await.unwrap();
    // The commit's files are there already, by another name.
    assert_eq!(hub.requested("info "), ["info org/shapes v1"]);
    let error = ask(&config, "org/shapes@v2").await.unwrap_err();
    assert_eq!(error.kind(), FailureKind::Invalid);
    assert!(error.to_string().contains("`org/shapes` at `v2`"), "{error}");
}

#[tokio::test]
async fn a_gated_checkpoint_needs_the_token_and_says_so() {
    let cache = tempfile::tempdir().unwrap();
    let (hub, address) = Hub { token: Some("secret"), ..Hub::new() }.serve().await;
    let mut config = config(&address, &cache);
    let error = ask(&config, "org/shapes").await.unwrap_err();
    assert_eq!(error.kind(), FailureKind::Invalid);
    assert!(error.to_string().contains("set worker.hub_token (HF_TOKEN)"), "{error}");
    config.hub_token = Some(Secret("secret".into()));
    assert_whole(&ask(&config, "org/shapes").await.unwrap(), &hub);
}

#[tokio::test]
async fn an_offline_worker_names_what_its_cache_lacks_and_asks_nobody() {
    let cache = tempfile::tempdir().unwrap();
    let (hub, address) = Hub::new().serve().await;
    let mut config = config(&address, &cache);
    config.offline = true;
    let error = ask(&config, "org/shapes").await.unwrap_err().to_string();
    assert!(error.contains("`org/shapes` at `main` is not whole") && error.contains("worker.offline"), "{error}");
    // A snapshot with a hole is no better.
    config.offline = false;
    let folder = ask(&config, "org/shapes").await.unwrap();
    std::fs::remove_file(folder.join(WEIGHTS)).unwrap();
    let asked = hub.requests.lock().unwrap().len();
    config.offline = true;
    let error = ask(&config, "org/shapes").await.unwrap_err().to_string();
    assert!(error.contains("missing: unet/*.safetensors"), "{error}");
    assert_eq!(hub.requests.lock().unwrap().len(), asked);
}

#[tokio::test]
async fn a_hub_that_is_away_is_retryable() {
    let cache = tempfile::tempdir().unwrap();
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    drop(listener);
    let error = ask(&config(&address, &cache), "org/shapes").await.unwrap_err();
    assert_eq!(error.kind(), FailureKind::Retryable, "{error}");
    assert!(error.to_string().contains(&address), "{error}");
}

#[tokio::test]
async fn a_repository_without_safetensors_is_refused_with_the_reason() {
    let cache = tempfile::tempdir().unwrap();
    let mut hub = Hub::new();
    hub.files.remove(WEIGHTS);
    let (_hub, address) = hub.serve().await;
    let error = ask(&config(&address, &cache), "org/shapes").await.unwrap_err().to_string();
    assert!(error.contains("lacks unet/*.safetensors (there are pickled weights, which are never read)"), "{error}");
}

#[tokio::test]
async fn a_download_ends_early_when_the_worker_stops() {
    let cache = tempfile::tempdir().unwrap();
    let (_hub, address) = Hub::new().serve().await;
    let stop = CancellationToken::new();
    stop.cancel();
    let stopped = resolve("org/shapes", &config(&address, &cache), &stop).await;
    assert_eq!(stopped, Err(ResolveError::Stopped));
}
