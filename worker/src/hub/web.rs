//! Requests to the hub, tried again while they bring something.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::path::Path;
use std::time::Duration;

use serde::Deserialize;
use sha2::{Digest, Sha256};
use tokio_util::sync::CancellationToken;
use ureq::config::RedirectAuthHeaders;
use ureq::http::{HeaderMap, Response, StatusCode};
use ureq::{Agent, Body};

use super::{Result, is_name};
use crate::resolve::{HubId, ResolveError};

const PUBLIC: &str = "https://huggingface.co";

/// Tries in a row that bring nothing before a transfer is given up.
const TRIES: u32 = 5;

/// How long to wait for an address, a connection, an answer, or the next bytes of it.
const PATIENCE: Duration = Duration::from_secs(60);

pub(super) struct Web {
    endpoint: String,
    token: Option<String>,
    /// Follows redirects, and sends the token to the hub alone.
    agent: Agent,
    /// Shows redirects, whose headers tell about the file behind them.
    direct: Agent,
    stop: CancellationToken,
}

/// A repository at one commit.
#[derive(Deserialize)]
pub(super) struct RepoInfo {
    pub(super) sha: String,
    pub(super) siblings: Vec<Sibling>,
}

#[derive(Deserialize)]
pub(super) struct Sibling {
    pub(super) rfilename: String,
}

/// A file's content, as its headers name it.
pub(super) struct Content {
    pub(super) etag: String,
    pub(super) size: u64,
}

impl Web {
    pub(super) fn new(endpoint: Option<&str>, token: Option<String>, stop: CancellationToken) -> Self {
        let agent = |redirects: u32| {
            let builder = Agent::config_builder()
                .http_status_as_error(false)
                .max_redirects(redirects)
                .max_redirects_will_error(redirects > 0)
                .redirect_auth_headers(RedirectAuthHeaders::SameHost)
                .timeout_resolve(Some(PATIENCE))
                .timeout_connect(Some(PATIENCE))
                .timeout_recv_response(Some(PATIENCE))
                .timeout_per_read(Some(PATIENCE));
            builder.build().into()
        };
        let endpoint = endpoint.unwrap_or(PUBLIC).trim_end_matches('/').to_owned();
        Self { endpoint, token, agent: agent(10), direct: agent(0), stop }
    }

    pub(super) fn endpoint(&self) -> &str {
        &self.endpoint
    }

    /// A revision's commit and its files.
    pub(super) fn info(&self, id: &HubId) -> Result<RepoInfo> {
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

    /// The address of a commit's file, and what is there.
    pub(super) fn content(&self, id: &HubId, commit: &str, file: &str) -> Result<(String, Content)> {
        let url = format!("{}/{}/resolve/{commit}/{file}", self.endpoint, id.name);
        let content = self.persist(&url, |tries| self.ask_for_content(&url, tries))?;
        Ok((url, content))
    }

    /// What a file's headers say. A redirect elsewhere carries them too; one within the hub is followed.
    fn ask_for_content(&self, url: &str, tries: &Tries) -> Result<Content, Trouble> {
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
    pub(super) fn transfer(&self, url: &str, content: &Content, part: &Path) -> Result<()> {
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

pub(super) fn disk(error: std::io::Error) -> ResolveError {
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
