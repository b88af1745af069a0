//! Who may call, and what a scheduler refuses to start with.

use std::collections::BTreeMap;

use reqwest::{Method, StatusCode};
use serde_json::json;
use sha2::{Digest, Sha256};
use tokio::net::TcpListener;

use crate::support::{Answer, Farm, Settings};

fn with_keys(keys: &[(&str, &str)]) -> Settings {
    let hash = |key: &str| Sha256::digest(key).iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let mut settings = Settings::default();
    settings.api.key_hashes =
        keys.iter().map(|(name, key)| ((*name).to_owned(), hash(key))).collect::<BTreeMap<_, _>>();
    settings
}

#[tokio::test]
async fn with_keys_configured_everything_but_health_and_documentation_needs_one() {
    let farm = Farm::start_with(with_keys(&[("ada", "open sesame"), ("bob", "other")])).await;
    for path in ["/v1/jobs", "/v1/submissions", "/v1/models", "/v1/workers", "/metrics", "/no/such/path"] {
        let answer = farm.get(path).await;
        answer.problem(401);
        assert_eq!(answer.header("www-authenticate"), "Bearer realm=\"kiln\"", "{path}");
    }
    farm.post("/v1/jobs", json!({"prompt": "a"})).await.problem(401);
    for path in ["/healthz", "/readyz", "/openapi.json"] {
        farm.get(path).await.with_status(StatusCode::OK);
    }
    let jobs = |header: &str| Answer::of(farm.request(Method::GET, "/v1/jobs").header("authorization", header));
    jobs("Bearer open sesame").await.with_status(StatusCode::OK);
    jobs("bearer other").await.with_status(StatusCode::OK);
    for header in ["Bearer wrong", "Bearer ", "open sesame", "Basic b3BlbiBzZXNhbWU=", "Bearer OPEN SESAME"] {
        jobs(header).await.problem(401);
    }
    assert_eq!(farm.jobs_stored().await, 0);
    farm.stop().await;
}

#[tokio::test]
async fn callers_have_idempotency_keys_of_their_own() {
    let farm = Farm::start_with(with_keys(&[("ada", "a-key"), ("bob", "b-key")])).await;
    let submit = |key: &str, prompt: &str| {
        let request = farm.request(Method::POST, "/v1/jobs").bearer_auth(key).header("idempotency-key", "same");
        Answer::of(request.json(&json!({"prompt": prompt})))
    };
    let first = submit("a-key", "x").await.with_status(StatusCode::ACCEPTED);
    let other = submit("b-key", "y").await.with_status(StatusCode::ACCEPTED);
    assert_ne!(first.json["job_id"], other.json["job_id"]);
    submit("b-key", "x").await.problem(409);
}

#[tokio::test]
async fn without_keys_a_web_page_cannot_call_through_the_browser() {
    let farm = Farm::start().await;
    let rebound = farm.request(Method::GET, "/v1/jobs").header("host", "evil.example:8600");
    assert_eq!(Answer::of(rebound).await.problem(403).0, "Host");
    let form =
        farm.request(Method::POST, "/v1/jobs").header("sec-fetch-site", "cross-site").json(&json!({"prompt": "a"}));
    assert_eq!(Answer::of(form).await.problem(403).0, "Sec-Fetch-Site");
    let own =
        farm.request(Method::POST, "/v1/jobs").header("sec-fetch-site", "same-origin").json(&json!({"prompt": "a"}));
    Answer::of(own).await.with_status(StatusCode::ACCEPTED);
    let by_name = farm.request(Method::GET, "/v1/jobs").header("host", "localhost:8600");
    Answer::of(by_name).await.with_status(StatusCode::OK);
    assert_eq!(farm.jobs_stored().await, 1);
}

#[tokio::test]
async fn an_address_that_others_can_reach_needs_keys() {
    let listener = TcpListener::bind("0.0.0.0:0").await.unwrap();
    let error = Farm::refused(Settings::default(), listener).await;
    assert!(error.contains("`api.listen`") && error.contains("`api.key_hashes`"), "{error}");
}

#[tokio::test]
async fn a_key_hash_that_is_none_is_refused_at_the_start() {
    let mut settings = Settings::default();
    settings.api.key_hashes.insert("ada".into(), "open sesame".into());
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let error = Farm::refused(settings, listener).await;
    assert!(error.contains("`api.key_hashes.ada`"), "{error}");
    assert!(!error.contains("open sesame"), "what may be a key is not repeated: {error}");
}

#[tokio::test]
async fn a_spool_folder_that_cannot_be_written_to_is_refused_at_the_start() {
    let mut settings = Settings::default();
    settings.api.spool_dir = Some("/no/such/folder".into());
    let error = Farm::refused(settings, TcpListener::bind("127.0.0.1:0").await.unwrap()).await;
    assert!(error.contains("`api.spool_dir`") && error.contains("/no/such/folder"), "{error}");
}
