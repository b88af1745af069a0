//! The API as a client sees it.

use std::time::Duration;

use reqwest::StatusCode;
use serde_json::Value;

/// Speaks to one scheduler.
#[derive(Clone)]
pub struct Client {
    base: String,
    http: reqwest::Client,
}

impl Client {
    /// A client of the scheduler at `base`, for instance `http://127.0.0.1:8600`.
    pub fn new(base: String) -> Self {
        // Another test may have installed it.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let http = reqwest::Client::builder().timeout(Duration::from_secs(60)).build().expect("a client can be made");
        Self { base, http }
    }

    /// The scheduler's address.
    pub fn base(&self) -> &str {
        &self.base
    }

    /// GET as JSON; `None` while nobody answers.
    pub async fn try_get(&self, path: &str) -> Option<(StatusCode, Value)> {
        let response = self.http.get(format!("{}{path}", self.base)).send().await.ok()?;
        let status = response.status();
        Some((status, response.json().await.unwrap_or(Value::Null)))
    }

    /// GET that must succeed.
    pub async fn get(&self, path: &str) -> Value {
        let (status, body) = self.try_get(path).await.expect("the scheduler answers");
        assert!(status.is_success(), "GET {path}: {status} {body}");
        body
    }

    /// GET as bytes, redirects followed.
    pub async fn bytes(&self, path: &str) -> Vec<u8> {
        let response = self.http.get(format!("{}{path}", self.base)).send().await.expect("the scheduler answers");
        assert!(response.status().is_success(), "GET {path}: {}", response.status());
        response.bytes().await.expect("a whole body").to_vec()
    }

    /// POST of JSON that must be accepted.
    pub async fn post(&self, path: &str, body: &Value) -> Value {
        let response =
            self.http.post(format!("{}{path}", self.base)).json(body).send().await.expect("the scheduler answers");
        let status = response.status();
        let answer: Value = response.json().await.expect("a JSON answer");
        assert!(status.is_success(), "POST {path}: {status} {answer}");
        answer
    }

    /// Stores a PNG; its key.
    pub async fn upload(&self, png: Vec<u8>) -> String {
        self.upload_as("image/png", png).await
    }

    /// Stores what jobs start from; its key.
    pub async fn upload_as(&self, kind: &str, bytes: Vec<u8>) -> String {
        let (status, answer) = self.send_artifact(kind, bytes).await;
        assert!(status.is_success(), "POST /v1/artifacts: {status} {answer}");
        answer["key"].as_str().expect("a key").to_owned()
    }

    /// Sends bytes that must be refused; the status and the problem.
    pub async fn refused_upload(&self, bytes: Vec<u8>) -> (u16, Value) {
        let (status, problem) = self.send_artifact("application/octet-stream", bytes).await;
        assert!(status.is_client_error(), "POST /v1/artifacts: {status} {problem}");
        (status.as_u16(), problem)
    }

    async fn send_artifact(&self, kind: &str, bytes: Vec<u8>) -> (StatusCode, Value) {
        let request = self.http.post(format!("{}/v1/artifacts", self.base)).header("content-type", kind);
        let response = request.body(bytes).send().await.expect("the scheduler answers");
        (response.status(), response.json().await.expect("a JSON answer"))
    }

    /// POST of JSON that must be refused; the status and the problem.
    pub async fn refused(&self, path: &str, body: &Value) -> (u16, Value) {
        let response =
            self.http.post(format!("{}{path}", self.base)).json(body).send().await.expect("the scheduler answers");
        let status = response.status();
        let problem: Value = response.json().await.expect("a JSON answer");
        assert!(status.is_client_error(), "POST {path}: {status} {problem}");
        (status.as_u16(), problem)
    }

    /// DELETE that must succeed.
    pub async fn delete(&self, path: &str) -> Value {
        let response = self.http.delete(format!("{}{path}", self.base)).send().await.expect("the scheduler answers");
        let status = response.status();
        let answer: Value = response.json().await.expect("a JSON answer");
        assert!(status.is_success(), "DELETE {path}: {status} {answer}");
        answer
    }

    /// Submits jobs at once; the submission's id.
    pub async fn submit(&self, jobs: Vec<Value>) -> String {
        let answer = self.post("/v1/submissions", &serde_json::json!({ "jobs": jobs })).await;
        answer["submission_id"].as_str().expect("an id").to_owned()
    }

    /// One counter of a submission; `None` while nobody answers.
    pub async fn counter(&self, submission: &str, name: &str) -> Option<u64> {
        let (status, body) = self.try_get(&format!("/v1/submissions/{submission}")).await?;
        if !status.is_success() {
            return None;
        }
        body["counters"][name].as_u64()
    }
}
