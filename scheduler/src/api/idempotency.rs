//! `Idempotency-Key`: a request that is sent twice counts once.

use axum::http::HeaderMap;
use farm::job::Idempotency;
use serde::Serialize;
use sha2::{Digest, Sha256};

use super::auth::Caller;
use super::error::{ApiError, ProblemKind};
use crate::refusal::refuse;

/// Bytes of a key at most.
const KEY_BYTES: usize = 200;

/// A key as the store knows it: every caller has keys of its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ScopedKey(String);

impl ScopedKey {
    /// Reads the header, if it was sent.
    pub(super) fn read(headers: &HeaderMap, caller: &Caller) -> Result<Option<Self>, ApiError> {
        let Some(header) = headers.get("idempotency-key") else { return Ok(None) };
        let key = header.to_str().unwrap_or_default();
        if !(1..=KEY_BYTES).contains(&key.len()) || !key.bytes().all(|byte| byte.is_ascii_graphic()) {
            let limit = format!("1 to {KEY_BYTES} printable ASCII characters without blanks");
            let value = format!("`{}`", String::from_utf8_lossy(header.as_bytes()));
            return Err(ApiError::refused(ProblemKind::MalformedRequest, refuse("Idempotency-Key", limit, value)));
        }
        // A key has no blanks, so the last one ends the caller's name.
        Ok(Some(Self(format!("{} {key}", caller.0))))
    }

    /// The key together with the request that it stands for.
    pub(super) fn of(self, fingerprint: Fingerprint) -> Idempotency {
        Idempotency { key: self.0, request_hash: fingerprint.finish() }
    }
}

/// What makes two requests the same: the route and everything sent, but not how it was spaced.
#[derive(Clone, Debug)]
pub(super) struct Fingerprint(Sha256);

impl Fingerprint {
    /// The fingerprint of nothing yet, on a route.
    pub(super) fn new(route: &str) -> Self {
        Self(Sha256::new()).with(route.as_bytes())
    }

    /// Adds a request that has been read: its meaning counts, not its spelling.
    pub(super) fn with_request(self, request: &impl Serialize) -> Self {
        let text = serde_json::to_vec(request).expect("a request that was read can be written");
        self.with(&text)
    }

    fn with(mut self, part: &[u8]) -> Self {
        self.add(part);
        self
    }

    /// Adds a part. Parts do not run together.
    pub(super) fn add(&mut self, part: &[u8]) {
        self.0.update((part.len() as u64).to_le_bytes());
        self.0.update(part);
    }

    fn finish(self) -> String {
        self.0.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

#[cfg(test)]
mod tests {
    use axum::http::HeaderValue;
    use farm::spec::RenderRequest;

    use super::*;

    fn read(key: &str, caller: &str) -> Result<Option<ScopedKey>, ApiError> {
        let headers = HeaderMap::from_iter([(
            "idempotency-key".parse().unwrap(),
            HeaderValue::from_str(key).expect("a header can carry it"),
        )]);
        ScopedKey::read(&headers, &Caller(caller.to_owned()))
    }

    #[test]
    fn callers_do_not_share_keys() {
        assert_ne!(read("k", "ada").unwrap(), read("k", "bob").unwrap());
        assert_ne!(read("k", "ada b").unwrap(), read("b-k", "ada").unwrap());
        assert_eq!(ScopedKey::read(&HeaderMap::new(), &Caller("ada".into())).unwrap(), None);
    }

    #[test]
    fn a_key_has_a_length_and_an_alphabet() {
        assert!(read(&"k".repeat(KEY_BYTES), "ada").is_ok());
        for key in ["", "with blank", &"k".repeat(KEY_BYTES + 1)] {
            let error = read(key, "ada").expect_err("not a key");
            assert!(error.to_string().contains("`Idempotency-Key`"), "{error}");
        }
    }

    #[test]
    fn a_request_is_the_same_however_it_is_spelled() {
        let hash = |text: &str| {
            let request: RenderRequest = serde_json::from_str(text).unwrap();
            Fingerprint::new("/v1/jobs").with_request(&request).finish()
        };
        assert_eq!(hash(r#"{"prompt":"a","steps":3}"#), hash(r#"{ "steps": 3, "prompt": "a" }"#));
        assert_ne!(hash(r#"{"prompt":"a"}"#), hash(r#"{"prompt":"b"}"#));
        assert_eq!(hash("{}").len(), 64);
    }

    #[test]
    fn parts_do_not_run_together() {
        let hash = |parts: &[&str]| {
            let mut fingerprint = Fingerprint::new("/");
            parts.iter().for_each(|part| fingerprint.add(part.as_bytes()));
            fingerprint.finish()
        };
        assert_ne!(hash(&["ab", "c"]), hash(&["a", "bc"]));
    }
}
