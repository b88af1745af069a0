//! The hub: its cache first, then downloads that go on where they were cut.
//!
//! `hf-hub` knows the cache's layout, shared with Python. The transfers are our own, since its own go
//! wrong where a partial file is complete already, where a server ignores `Range`, and where a
//! connection stalls, and it compares no hashes.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use farm::config::WorkerConfig;
use hf_hub::{Cache, CacheRepo, Repo, RepoType};
use serde::Deserialize;
use sha2::{Digest, Sha256};
use tokio_util::sync::CancellationToken;
use ureq::config::RedirectAuthHeaders;
use ureq::http::{HeaderMap, Response, StatusCode};
use ureq::{Agent, Body};

use crate::resolve::{HubId, INDEX, ResolveError, is_plain, needed};

const PUBLIC: &str = "https://huggingface.co";

/// Tries in a row that bring nothing before a transfer is given up.
const TRIES: u32 = 5;

type Result<T, E = ResolveError> = std::result::Result<T, E>;

pub(crate) struct Hub {
    endpoint: String,
    cache: Cache,
    token: Option<String>,
    offline: bool,
    /// Follows redirects, and sends the token to the hub alone.
    agent: Agent,
    /// Shows redirects, whose headers tell about the file behind them.
    direct: Agent,
    stop: CancellationToken,
}

/// A repository at one commit.
#[derive(Deserialize)]
struct RepoInfo {
    sha: String,
    siblings: Vec<Sibling>,
}

#[derive(Deserialize)]
struct Sibling {
    rfilename: String,
}

/// A file's content, as its headers name it.
struct Content {
    etag: String,
    size: u64,
}

impl Hub {
    pub(crate) fn new(config: &WorkerConfig, stop: CancellationToken) -> Self {
        let cache = match &config.hub_cache {
            Some(folder) => Cache::new(folder.join("hub")),
            None => Cache::from_env(),
        };
        let agent = |redirects: u32| {
            let builder = Agent::config_builder()
                .http_status_as_error(false)
                .max_redirects(redirects)
                .max_redirects_will_error(redirects > 0)
                .redirect_auth_headers(RedirectAuthHeaders::SameHost)
                .timeout_resolve(Some(Duration::from_secs(20)))
                .timeout_connect(Some(Duration::from_secs(20)))
                .timeout_recv_response(Some(Duration::from_secs(60)))
                .timeout_per_read(Some(Duration::from_secs(60)));
            builder.build().into()
        };
        Self {
            endpoint: config.hub_endpoint.as_deref().unwrap_or(PUBLIC).trim_end_matches('/').to_owned(),
            token: config.hub_token.as_ref().map(|token| token.0.clone()).or_else(|| cache.token()),
            cache,
            offline: config.offline,
            agent: agent(10),
            direct: agent(0),
            stop,
        }
    }

    /// The snapshot folder of a repository, with every file that rendering needs.
    pub(crate) fn folder(&self, id: &HubId) -> Result<PathBuf> {
        let repo = Repo::with_revision(id.name.clone(), RepoType::Model, id.revision.clone());
        let cached = self.cached(&repo);
        let lacking = match &cached {
            Some(folder) => match lacking(folder) {
                Ok(()) => return Ok(folder.clone()),
                Err(lacking) => lacking,
            },
            None => "all of it".to_owned(),
        };
        let HubId { name, revision } = id;
        if self.offline {
            let cache = self.cache.path().display();
            return Err(ResolveError::Missing(format!(
                "`{name}` at `{revision}` is not whole in the hub's cache {cache} (missing: {lacking}) and this worker is offline: unset worker.offline (HF_HUB_OFFLINE) once, or copy the files there"
            )));
        }
        tracing::info!(checkpoint = name, revision, missing = lacking, "downloading from the hub");
        self.download(id, &self.cache.repo(repo))
    }

    /// The folder of the commit that a revision stood for when it was last seen.
    fn cached(&self, repo: &Repo) -> Option<PathBuf> {
        let root = self.cache.path().join(repo.folder_name());
        let commit = std::fs::read_to_string(root.join("refs").join(repo.revision()));
        let commit = commit.map_or_else(|_| repo.revision().to_owned(), |text| text.trim().to_owned());
        let folder = root.join("snapshots").join(commit);
        folder.is_dir().then_some(folder)
    }

    fn download(&self, id: &HubId, repo: &CacheRepo) -> Result<PathBuf> {
        let info = self.info(id)?;
        let folder = repo.pointer_path(&info.sha);
        let files: Vec<_> = info.siblings.into_iter().map(|file| file.rfilename).filter(|file| is_file(file)).collect();
        let incomplete = |problem| ResolveError::Missing(format!("`{}` on {} lacks {problem}", id.name, self.endpoint));
        if !files.iter().any(|file| file == INDEX) {
            return Err(incomplete(format!("{INDEX}: it is no checkpoint in diffusers layout")));
        }
        self.fetch(id, &info.sha, INDEX, repo)?;
        let index = read_index(&folder).map_err(incomplete)?;
        for file in needed(&index, &files).map_err(incomplete)? {
            self.fetch(id, &info.sha, &file, repo)?;
        }
        // Last: a revision that is in the cache is there whole.
        repo.create_ref(&info.sha).map_err(disk)?;
        Ok(folder)
    }

    fn info(&self, id: &HubId) -> Result<RepoInfo> {
        let url = format!("{}/api/models/{}/revision/{}", self.endpoint, id.name, id.revision.replace('/', "%2F"));
        self.persist(&url, |tries| {
            let mut response = self.get(&self.agent, &url, None)?;
            tries.check(&response, || format!("`{}` at `{}`", id.name, id.revision))?;
            let info: RepoInfo = serde_json::from_reader(response.body_mut().as_reader())
                .map_err(|error| Trouble::Passing(format!("unreadable answer: {error}")))?;
            if !is_name(&info.sha) {
                return Err(Trouble::Passing(format!("`{}` is no commit", info.sha)));
            }
            Ok(info)
        })
    }

    /// Brings one file into the snapshot folder of a commit.
    fn fetch(&self, id: &HubId, commit: &str, file: &str, repo: &CacheRepo) -> Result<()> {
        let pointer = repo.pointer_path(commit).join(file);
        if pointer.exists() {
            return Ok(());
        }
        let url = format!("{}/{}/resolve/{commit}/{file}", self.endpoint, id.name);
        let content = self.persist(&url, |tries| self.content(&url, tries))?;
        let blob = repo.blob_path(&content.etag);
        std::fs::create_dir_all(blob.parent().expect("a blob lies in a folder")).map_err(disk)?;
        let lock = File::create(blob.with_extension("lock")).map_err(disk)?;
        lock.lock().map_err(disk)?;
        if !blob.exists() {
            self.transfer(&url, &content, &blob.with_extension("part"))?;
            std::fs::rename(blob.with_extension("part"), &blob).map_err(disk)?;
        }
        drop(lock);
        std::fs::create_dir_all(pointer.parent().expect("a file lies in a folder")).map_err(disk)?;
        link(&blob, &pointer, file.split('/').count()).map_err(disk)
    }

    /// What a file's headers say. A redirect elsewhere carries them too; one within the hub is followed.
    fn content(&self, url: &str, tries: &Tries) -> Result<Content, Trouble> {
        let mut at = url.to_owned();
        for _ in 0..10 {
            let request = self.authorised(self.direct.head(&at)).header("Accept-Encoding", "identity");
            let response = request.call().map_err(|error| Trouble::Passing(error.to_string()))?;
            let target = text(response.headers(), "location");
            match target {
                Some(path) if response.status().is_redirection() && path.starts_with('/') => {
                    at = format!("{}{path}", self.endpoint);
                }
                _ => {
                    tries.check(&response, || format!("`{url}`"))?;
                    return content_of(response.headers()).ok_or_else(|| Trouble::Passing("no ETag or no size".into()));
                }
            }
        }
        Err(Trouble::Passing("too many redirects".into()))
    }

    /// Downloads into `part`, from where it ends.
    fn transfer(&self, url: &str, content: &Content, part: &Path) -> Result<()> {
        let mut file = OpenOptions::new().create(true).append(true).open(part).map_err(disk)?;
        self.persist(url, |tries| {
            let have = file.metadata().map_err(Trouble::disk)?.len();
            if have > content.size {
                file.set_len(0).map_err(Trouble::disk)?;
                return Err(Trouble::Passing("the part in the cache was longer than the file".into()));
            }
            if have < content.size {
                let response = self.get(&self.agent, url, Some(have))?;
                tries.check(&response, || format!("`{url}`"))?;
                if response.status() != StatusCode::PARTIAL_CONTENT {
                    file.set_len(0).map_err(Trouble::disk)?;
                }
                self.copy(response, &mut file, tries)?;
            }
            let have = file.metadata().map_err(Trouble::disk)?.len();
            if have != content.size {
                return Err(Trouble::Passing(format!("{have} of {} bytes arrived", content.size)));
            }
            file.sync_all().map_err(Trouble::disk)?;
            verify(part, &content.etag).inspect_err(|_| drop(file.set_len(0)))
        })
    }

    fn copy(&self, response: Response<Body>, file: &mut File, tries: &mut Tries) -> Result<(), Trouble> {
        let mut reader = response.into_body().into_reader();
        let mut buffer = vec![0; 256 * 1024];
        loop {
            if self.stop.is_cancelled() {
                return Err(Trouble::Final(ResolveError::Stopped));
            }
            match reader.read(&mut buffer).map_err(|error| Trouble::Passing(error.to_string()))? {
                0 => return Ok(()),
                count => file.write_all(&buffer[..count]).map_err(Trouble::disk)?,
            }
            tries.made_progress();
        }
    }

    fn get(&self, agent: &Agent, url: &str, from: Option<u64>) -> Result<Response<Body>, Trouble> {
        let mut request = self.authorised(agent.get(url)).header("Accept-Encoding", "identity");
        if let Some(from) = from.filter(|from| *from > 0) {
            request = request.header("Range", format!("bytes={from}-"));
        }
        request.call().map_err(|error| Trouble::Passing(error.to_string()))
    }

    fn authorised<B>(&self, request: ureq::RequestBuilder<B>) -> ureq::RequestBuilder<B> {
        let request = request.header("User-Agent", concat!("kiln/", env!("CARGO_PKG_VERSION")));
        match &self.token {
            Some(token) => request.header("Authorization", format!("Bearer {token}")),
            None => request,
        }
    }

    /// Tries until it works, it cannot work, or it has brought nothing for too many times.
    fn persist<T>(&self, url: &str, mut attempt: impl FnMut(&mut Tries) -> Result<T, Trouble>) -> Result<T> {
        let mut tries = Tries::default();
        loop {
            let problem = match attempt(&mut tries) {
                Ok(value) => return Ok(value),
                Err(Trouble::Final(error)) => return Err(error),
                Err(Trouble::Passing(problem)) => problem,
            };
            tries.in_vain += 1;
            if tries.in_vain >= TRIES {
                return Err(ResolveError::Unavailable(format!("{url}: {problem}")));
            }
            tracing::warn!(url, problem, "a request to the hub failed: trying again");
            for _ in 0..1 << tries.in_vain {
                if self.stop.is_cancelled() {
                    return Err(ResolveError::Stopped);
                }
                std::thread::sleep(Duration::from_millis(100));
            }
        }
    }
}

/// Why an attempt failed.
enum Trouble {
    Passing(String),
    Final(ResolveError),
}

impl Trouble {
    fn disk(error: std::io::Error) -> Self {
        Self::Final(disk(error))
    }
}

#[derive(Default)]
struct Tries {
    in_vain: u32,
}

impl Tries {
    fn made_progress(&mut self) {
        self.in_vain = 0;
    }

    fn check(&self, response: &Response<Body>, what: impl Fn() -> String) -> Result<(), Trouble> {
        let status = response.status();
        let missing = |message| Err(Trouble::Final(ResolveError::Missing(message)));
        match status {
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => missing(format!(
                "the hub refuses {} ({status}): it does not exist, or is private or gated; accept its terms there and set worker.hub_token (HF_TOKEN)",
                what()
            )),
            StatusCode::NOT_FOUND | StatusCode::GONE => missing(format!("the hub does not know {} ({status})", what())),
            _ if status.is_success() || status.is_redirection() => Ok(()),
            _ => Err(Trouble::Passing(format!("the hub answered {status}"))),
        }
    }
}

fn disk(error: std::io::Error) -> ResolveError {
    ResolveError::Unavailable(format!("the hub's cache cannot be written: {error}"))
}

fn text<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name)?.to_str().ok()
}

fn content_of(headers: &HeaderMap) -> Option<Content> {
    let etag = text(headers, "x-linked-etag").or_else(|| text(headers, "etag"))?;
    let etag = etag.trim_start_matches("W/").trim_matches('"').to_owned();
    let size = text(headers, "x-linked-size").or_else(|| text(headers, "content-length"))?.parse().ok()?;
    is_name(&etag).then_some(Content { etag, size })
}

/// A name from the network that becomes a file's.
fn is_name(name: &str) -> bool {
    !name.is_empty() && name.len() <= 200 && !name.starts_with('.') && name.chars().all(is_plain)
}

/// A repository's file that may be stored under its own name.
fn is_file(path: &str) -> bool {
    path.split('/').count() <= 2 && path.split('/').all(is_name)
}

/// Large files are named by their SHA-256; the names of small ones are not checked.
fn verify(part: &Path, etag: &str) -> Result<(), Trouble> {
    if etag.len() != 64 || !etag.chars().all(|character| character.is_ascii_hexdigit()) {
        return Ok(());
    }
    let mut hasher = Sha256::new();
    let mut file = File::open(part).map_err(Trouble::disk)?;
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer).map_err(Trouble::disk)? {
            0 => break,
            count => hasher.update(&buffer[..count]),
        }
    }
    let found: String = hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    let matches = found.eq_ignore_ascii_case(etag);
    if matches { Ok(()) } else { Err(Trouble::Passing(format!("the file's SHA-256 is {found}, not {etag}"))) }
}

fn read_index(folder: &Path) -> Result<serde_json::Value, String> {
    let bytes = std::fs::read(folder.join(INDEX)).map_err(|_| INDEX.to_owned())?;
    serde_json::from_slice(&bytes).map_err(|error| format!("a readable {INDEX} ({error})"))
}

/// What a snapshot folder lacks for rendering.
fn lacking(folder: &Path) -> Result<(), String> {
    let index = read_index(folder)?;
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten().filter(|entry| entry.path().is_dir()) {
        let part = entry.file_name();
        for file in std::fs::read_dir(entry.path()).into_iter().flatten().flatten() {
            // A link whose blob is gone is not there.
            if file.path().exists() {
                files.push(format!("{}/{}", part.to_string_lossy(), file.file_name().to_string_lossy()));
            }
        }
    }
    needed(&index, &files).map(drop)
}

/// Links a file of a snapshot to its blob, relative as Python does it: the cache can be moved.
fn link(blob: &Path, pointer: &Path, depth: usize) -> std::io::Result<()> {
    let _broken_link = std::fs::remove_file(pointer);
    let name = blob.file_name().expect("a blob has a name");
    #[cfg(unix)]
    {
        let target: PathBuf = std::iter::repeat_n("..", depth + 1).collect::<PathBuf>().join("blobs").join(name);
        std::os::unix::fs::symlink(target, pointer)
    }
    #[cfg(not(unix))]
    {
        let _ = (name, depth);
        std::fs::copy(blob, pointer).map(drop)
    }
}
