//! Who may call. With API keys, everything but health and documentation needs one. Without, the socket is bound to
//! loopback, and what is left to fend off are pages in this machine's own browser.

use std::collections::BTreeMap;

use anyhow::{Context, ensure};
use axum::extract::{Request, State};
use axum::http::header::{AUTHORIZATION, HOST};
use axum::http::{HeaderMap, Method};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use sha2::{Digest, Sha256};

use super::SharedApi;
use super::error::{ApiError, ProblemKind};
use crate::refusal::refuse;

/// Paths that need no key: they say nothing about anybody's jobs.
const OPEN_PATHS: [&str; 3] = ["/healthz", "/readyz", "/openapi.json"];

/// The name of the caller where no keys are configured.
const ANYBODY: &str = "";

/// Who calls, as the configuration names the key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Caller(pub(crate) String);

/// The configured keys' hashes, by the caller's name.
#[derive(Clone, Debug, Default)]
pub(crate) struct Keys(Vec<(String, [u8; 32])>);

impl Keys {
    /// Reads the configuration's `api.key_hashes`.
    pub(crate) fn read(hashes: &BTreeMap<String, String>) -> anyhow::Result<Self> {
        let keys = hashes.iter().map(|(name, hash)| {
            let digest = hash_from_hex(hash.trim()).with_context(|| {
                format!(
                    "`api.key_hashes.{name}` must be the SHA-256 of a key, 64 hexadecimal digits: `kiln key` makes one"
                )
            })?;
            Ok((name.clone(), digest))
        });
        keys.collect::<anyhow::Result<_>>().map(Self)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    /// Whose key it is. Takes the same time whichever key it is and however much of it is right.
    fn caller(&self, key: &str) -> Option<Caller> {
        let digest: [u8; 32] = Sha256::digest(key.as_bytes()).into();
        let mut found = None;
        for (name, known) in &self.0 {
            let difference = known.iter().zip(&digest).fold(0u8, |sum, (a, b)| sum | (a ^ b));
            if std::hint::black_box(difference) == 0 {
                found = Some(Caller(name.clone()));
            }
        }
        found
    }
}

fn hash_from_hex(text: &str) -> anyhow::Result<[u8; 32]> {
    ensure!(text.len() == 64 && text.bytes().all(|byte| byte.is_ascii_hexdigit()), "it is {} bytes", text.len());
    let mut digest = [0; 32];
    for (byte, pair) in digest.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
        *byte = u8::from_str_radix(std::str::from_utf8(pair)?, 16)?;
    }
    Ok(digest)
}

/// Lets a request through with its [`Caller`], or answers it.
pub(crate) async fn check(State(api): State<SharedApi>, mut request: Request, next: Next) -> Response {
    let caller = if OPEN_PATHS.contains(&request.uri().path()) {
        Ok(Caller(ANYBODY.to_owned()))
    } else if api.keys.is_empty() {
        check_local(request.method(), request.headers()).map(|()| Caller(ANYBODY.to_owned()))
    } else {
        check_key(&api.keys, request.headers())
    };
    match caller {
        Ok(caller) => {
            request.extensions_mut().insert(caller);
            next.run(request).await
        }
        Err(error) => error.into_response(),
    }
}

fn check_key(keys: &Keys, headers: &HeaderMap) -> Result<Caller, ApiError> {
    let wanted = "send the header `Authorization: Bearer KEY`";
    let Some(header) = headers.get(AUTHORIZATION) else {
        return Err(ApiError::new(ProblemKind::Unauthorized, format!("no API key was sent: {wanted}")));
    };
    let bearer = header.to_str().ok().and_then(|text| text.split_once(' '));
    let Some((_, key)) = bearer.filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer")) else {
        return Err(ApiError::new(ProblemKind::Unauthorized, format!("the API key cannot be read: {wanted}")));
    };
    keys.caller(key.trim()).ok_or_else(|| ApiError::new(ProblemKind::Unauthorized, "the API key is not known here"))
}

/// A web page may make this machine's browser call a loopback address, by a name of its own (DNS rebinding) or as
/// a form. Neither looks like a call to this machine by its own name.
fn check_local(method: &Method, headers: &HeaderMap) -> Result<(), ApiError> {
    let host = headers.get(HOST).and_then(|host| host.to_str().ok()).unwrap_or_default();
    if !is_loopback_name(host) {
        let limit = "`localhost` or a loopback address, since the API has no keys (`api.key_hashes`)";
        return Err(ApiError::refused(ProblemKind::Forbidden, refuse("Host", limit, format!("`{host}`"))));
    }
    let site = headers.get("sec-fetch-site").and_then(|site| site.to_str().ok()).unwrap_or("none");
    if !method.is_safe() && !matches!(site, "none" | "same-origin") {
        let limit = "`same-origin` or `none`, since the API has no keys (`api.key_hashes`)";
        return Err(ApiError::refused(ProblemKind::Forbidden, refuse("Sec-Fetch-Site", limit, format!("`{site}`"))));
    }
    Ok(())
}

fn is_loopback_name(host: &str) -> bool {
    let name = match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => name,
        _ => host,
    };
    let name = name.trim_start_matches('[').trim_end_matches(']');
    name.eq_ignore_ascii_case("localhost")
        || name.parse::<std::net::IpAddr>().is_ok_and(|address| address.to_canonical().is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    // SHA-256 of "abc", from FIPS 180-2, appendix B.1.
    const ABC: &str = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";

    #[test]
    fn a_key_is_known_by_its_hash() {
        let keys = Keys::read(&BTreeMap::from([("ada".to_owned(), ABC.to_uppercase())])).unwrap();
        assert_eq!(keys.caller("abc"), Some(Caller("ada".into())));
        assert_eq!(keys.caller("abd"), None);
        assert_eq!(keys.caller(""), None);
    }

    #[test]
    fn a_hash_that_is_none_is_refused_with_its_key() {
        for hash in ["abc", "", &ABC[..63], &format!("{}g", &ABC[..63])] {
            let error = Keys::read(&BTreeMap::from([("ada".to_owned(), hash.to_owned())])).expect_err("not a hash");
            assert!(error.to_string().contains("`api.key_hashes.ada`"), "{error}");
        }
    }

    #[test]
    fn only_names_of_this_very_machine_are_loopback() {
        for host in ["localhost", "LOCALHOST:8600", "127.0.0.1:8600", "127.1.2.3", "[::1]:8600", "[::1]"] {
            assert!(is_loopback_name(host), "{host}");
        }
        for host in ["", "example.com", "localhost.example.com:80", "10.0.0.1", "[::2]:80", "127.0.0.1.example.com"] {
            assert!(!is_loopback_name(host), "{host}");
        }
    }
}
