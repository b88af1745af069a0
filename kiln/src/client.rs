//! The scheduler's API as the commands use it: typed answers, errors in words, patience with a
//! scheduler that is being restarted.

use std::fmt;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use bytes::Bytes;
use farm::config::Config;
use farm::id::{JobId, SubmissionId};
use farm::job::{JobView, SubmissionView};
use reqwest::{Method, RequestBuilder, Response, StatusCode};
use scheduler::{ArtifactStored, JobPage, Problem, SubmissionAccepted, SubmissionPage};
use serde::de::DeserializeOwned;

use crate::cli::ApiArgs;

/// How long a connection may take to come about.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// How long a scheduler may be silent in the middle of an ordinary answer.
const READ_TIMEOUT: Duration = Duration::from_secs(60);

/// The first pause before a request is sent again; doubles up to [`PAUSE_MAX`].
const PAUSE: Duration = Duration::from_millis(200);
const PAUSE_MAX: Duration = Duration::from_secs(3);

/// What went wrong with a request.
#[derive(Debug)]
pub enum ClientError {
    /// Nobody answered, or the connection broke.
    Unreachable {
        /// Where.
        api: String,
        /// Why.
        cause: String,
    },
    /// The scheduler answered that it cannot right now (its store is away, it is stopping).
    Busy(String),
    /// The scheduler refused.
    Refused {
        /// With which status.
        status: StatusCode,
        /// In its own words.
        detail: String,
    },
    /// The answer is not what a scheduler says.
    Strange {
        /// Who said it.
        api: String,
        /// What is odd about it.
        cause: String,
    },
    /// What was to be sent cannot be read.
    Local(String),
}

impl ClientError {
    /// True where the same request may succeed a little later.
    pub fn is_transient(&self) -> bool {
        matches!(self, Self::Unreachable { .. } | Self::Busy(_))
    }
}

impl fmt::Display for ClientError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unreachable { api, cause } => write!(
                f,
                "no scheduler answers at {api} ({cause}); start one with `kiln up`, or name another with --api or KILN_API_URL"
            ),
            Self::Busy(detail) => write!(f, "the scheduler cannot answer right now: {detail}"),
            Self::Refused { status: StatusCode::UNAUTHORIZED, detail } => {
                write!(f, "{detail}; give an API key with --api-key or KILN_API_KEY (`kiln key` makes one)")
            }
            Self::Refused { detail, .. } => f.write_str(detail),
            Self::Local(cause) => write!(f, "what was to be sent cannot be read: {cause}"),
            Self::Strange { api, cause } => {
                write!(f, "what answers at {api} is no kiln scheduler of this version ({cause}); check --api")
            }
        }
    }
}

impl std::error::Error for ClientError {}

/// How long to go on while the scheduler does not answer.
#[derive(Clone, Copy, Debug)]
pub struct Patience(pub Duration);

impl Patience {
    /// For commands that somebody waits for.
    pub const SHORT: Patience = Patience(Duration::from_secs(3));

    /// For commands that wait themselves.
    pub const LONG: Patience = Patience(Duration::from_secs(300));
}

/// Speaks to one scheduler.
#[derive(Clone, Debug)]
pub struct Client {
    api: String,
    key: Option<String>,
    http: reqwest::Client,
}

impl Client {
    /// A client for what the command line and the configuration name.
    pub fn new(args: &ApiArgs, config: &Config) -> Result<Self> {
        let api = match &args.api {
            Some(api) => api.trim_end_matches('/').to_owned(),
            None => format!("http://{}", reachable(config.api.listen)),
        };
        Self::at(api, args.api_key.clone())
    }

    /// A client for the scheduler at `api`, for instance `http://127.0.0.1:8600`.
    pub fn at(api: String, key: Option<String>) -> Result<Self> {
        let url = reqwest::Url::parse(&api)
            .ok()
            .filter(|url| ["http", "https"].contains(&url.scheme()))
            .with_context(|| format!("--api must be an address like http://127.0.0.1:8600, but is `{api}`"))?;
        let builder = || {
            let http = reqwest::Client::builder().connect_timeout(CONNECT_TIMEOUT).tcp_nodelay(true);
            // A proxy cannot reach this machine's own loopback.
            let local =
                url.host_str().is_some_and(|host| host == "localhost" || host.starts_with("127.") || host == "[::1]");
            if local { http.no_proxy() } else { http }
        };
        let http = match builder().build() {
            // A system without certificates still speaks to whom it needs none for.
            Err(_) if url.scheme() == "http" => builder().tls_certs_only([]).build(),
            built => built,
        };
        Ok(Self { api, key, http: http.context("the HTTP client cannot be set up")? })
    }

    /// One submission.
    pub async fn submission(&self, id: SubmissionId) -> Result<SubmissionView, ClientError> {
        self.json(self.request(Method::GET, &format!("/v1/submissions/{id}"))).await
    }

    /// The latest submissions, newest first.
    pub async fn submissions(&self, limit: u32) -> Result<Vec<SubmissionView>, ClientError> {
        let path = with_query("/v1/submissions", &[("limit", &limit.to_string())]);
        let page: SubmissionPage = self.json(self.request(Method::GET, &path)).await?;
        Ok(page.submissions)
    }

    /// Jobs of a submission (in one state), in id order, after the job `after`.
    pub async fn jobs(
        &self,
        submission: SubmissionId,
        state: Option<&str>,
        after: Option<JobId>,
        limit: u32,
    ) -> Result<Vec<JobView>, ClientError> {
        let (submission, limit) = (submission.to_string(), limit.to_string());
        let after = after.map(|after| after.to_string());
        let mut query = vec![("submission_id", submission.as_str()), ("limit", &limit)];
        query.extend(state.map(|state| ("state", state)));
        query.extend(after.as_deref().map(|after| ("after", after)));
        let page: JobPage = self.json(self.request(Method::GET, &with_query("/v1/jobs", &query))).await?;
        Ok(page.jobs)
    }

    /// A job's picture, wherever it is stored.
    pub async fn image(&self, job: JobId) -> Result<Bytes, ClientError> {
        let response = self.send(self.request(Method::GET, &format!("/v1/jobs/{job}/image"))).await?;
        response.bytes().await.map_err(|error| self.unreachable(&error))
    }

    /// The JSON that describes a job's picture.
    pub async fn sidecar(&self, job: JobId) -> Result<Bytes, ClientError> {
        let response = self.send(self.request(Method::GET, &format!("/v1/jobs/{job}/sidecar"))).await?;
        response.bytes().await.map_err(|error| self.unreachable(&error))
    }

    /// The checkpoints the scheduler knows.
    pub async fn models<T: DeserializeOwned>(&self) -> Result<T, ClientError> {
        self.json(self.request(Method::GET, "/v1/models")).await
    }

    /// Whatever answers a GET, for instance of `/v1/workers`.
    pub async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        self.json(self.request(Method::GET, path)).await
    }

    /// Sends a submission's body. The answer may take as long as storing it does.
    pub async fn submit(
        &self,
        query: &[(&str, &str)],
        idempotency_key: &str,
        content_type: &str,
        body: reqwest::Body,
    ) -> Result<SubmissionAccepted, ClientError> {
        let request = self
            .bare_request(Method::POST, &with_query("/v1/submissions", query))
            .header("idempotency-key", idempotency_key)
            .header("content-type", content_type)
            .body(body);
        self.json(request).await
    }

    /// Stores a picture that jobs start from.
    pub async fn upload(&self, picture: Bytes) -> Result<ArtifactStored, ClientError> {
        let request = self.request(Method::POST, "/v1/artifacts");
        self.json(request.header("content-type", "application/octet-stream").body(picture)).await
    }

    /// Repeats `call` while its failure is transient and patience lasts, and says so once.
    pub async fn patiently<T, F>(&self, patience: Patience, mut call: F) -> Result<T, ClientError>
    where
        F: AsyncFnMut() -> Result<T, ClientError>,
    {
        let start = Instant::now();
        let mut pause = PAUSE;
        let mut told = false;
        loop {
            match call().await {
                Err(error) if error.is_transient() && start.elapsed() + pause <= patience.0 => {
                    if !told && start.elapsed() >= PAUSE * 4 {
                        eprintln!("kiln: {error}; trying again for up to {} s", patience.0.as_secs());
                        told = true;
                    }
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(PAUSE_MAX);
                }
                outcome => return outcome,
            }
        }
    }

    fn request(&self, method: Method, path: &str) -> RequestBuilder {
        self.bare_request(method, path).timeout(READ_TIMEOUT)
    }

    fn bare_request(&self, method: Method, path: &str) -> RequestBuilder {
        let request = self.http.request(method, format!("{}{path}", self.api));
        match &self.key {
            Some(key) => request.bearer_auth(key),
            None => request,
        }
    }

    async fn json<T: DeserializeOwned>(&self, request: RequestBuilder) -> Result<T, ClientError> {
        let response = self.send(request).await?;
        let body = response.bytes().await.map_err(|error| self.unreachable(&error))?;
        serde_json::from_slice(&body)
            .map_err(|error| ClientError::Strange { api: self.api.clone(), cause: error.to_string() })
    }

    async fn send(&self, request: RequestBuilder) -> Result<Response, ClientError> {
        let response = request.send().await.map_err(|error| self.unreachable(&error))?;
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        let body = response.bytes().await.unwrap_or_default();
        let detail = match serde_json::from_slice::<Problem>(&body) {
            Ok(problem) => problem.detail,
            Err(_) => format!("the answer was {status}"),
        };
        Err(match status {
            StatusCode::SERVICE_UNAVAILABLE
            | StatusCode::BAD_GATEWAY
            | StatusCode::GATEWAY_TIMEOUT
            | StatusCode::TOO_MANY_REQUESTS => ClientError::Busy(detail),
            _ => ClientError::Refused { status, detail },
        })
    }

    fn unreachable(&self, error: &reqwest::Error) -> ClientError {
        let mut cause: &dyn std::error::Error = error;
        while let Some(deeper) = cause.source() {
            cause = deeper;
        }
        ClientError::Unreachable { api: self.api.clone(), cause: cause.to_string() }
    }
}

/// A path with its query, escaped.
fn with_query(path: &str, query: &[(&str, &str)]) -> String {
    if query.is_empty() {
        return path.to_owned();
    }
    let url = reqwest::Url::parse_with_params("http://host", query).expect("an address with a query is one");
    format!("{path}?{}", url.query().unwrap_or_default())
}

/// The address to call for a server that listens at `listen`: everywhere includes here.
fn reachable(mut listen: std::net::SocketAddr) -> std::net::SocketAddr {
    if listen.ip().is_unspecified() {
        listen.set_ip(match listen.ip() {
            std::net::IpAddr::V4(_) => std::net::Ipv4Addr::LOCALHOST.into(),
            std::net::IpAddr::V6(_) => std::net::Ipv6Addr::LOCALHOST.into(),
        });
    }
    listen
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_that_listens_everywhere_is_called_on_loopback() {
        assert_eq!(reachable("0.0.0.0:8600".parse().unwrap()).to_string(), "127.0.0.1:8600");
        assert_eq!(reachable("[::]:8600".parse().unwrap()).to_string(), "[::1]:8600");
        assert_eq!(reachable("10.0.0.7:8600".parse().unwrap()).to_string(), "10.0.0.7:8600");
    }

    #[test]
    fn a_query_is_escaped() {
        assert_eq!(with_query("/v1/jobs", &[("name", "a&b c")]), "/v1/jobs?name=a%26b+c");
        assert_eq!(with_query("/v1/jobs", &[]), "/v1/jobs");
    }

    #[test]
    fn an_address_without_a_scheme_is_refused_with_an_example() {
        let error = Client::at("localhost:8600".into(), None).unwrap_err().to_string();
        assert!(error.contains("http://127.0.0.1:8600") && error.contains("`localhost:8600`"), "{error}");
    }

    #[tokio::test]
    async fn patience_ends_at_a_refusal_and_outlasts_a_break() {
        let _already = rustls::crypto::ring::default_provider().install_default();
        let client = Client::at("http://127.0.0.1:9".into(), None).unwrap();
        let mut calls = 0;
        let outcome = client
            .patiently(Patience(Duration::from_secs(30)), async || {
                calls += 1;
                match calls {
                    1 | 2 => Err(ClientError::Busy("restarting".into())),
                    _ => Err::<(), _>(ClientError::Refused { status: StatusCode::NOT_FOUND, detail: "no".into() }),
                }
            })
            .await;
        assert!(matches!(outcome, Err(ClientError::Refused { .. })));
        assert_eq!(calls, 3);
    }

    #[tokio::test]
    async fn nobody_there_is_said_with_what_to_do() {
        let _already = rustls::crypto::ring::default_provider().install_default();
        let client = Client::at("http://127.0.0.1:9".into(), None).unwrap();
        let error = client.models::<serde_json::Value>().await.unwrap_err();
        assert!(error.is_transient());
        assert!(error.to_string().contains("kiln up"), "{error}");
    }
}
