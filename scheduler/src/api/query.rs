//! How paths and query strings are read: every error names the parameter, what it must be, and what it was.

use std::str::FromStr;

use axum::extract::rejection::QueryRejection;
use axum::extract::{FromRequestParts, Path, Query};
use axum::http::request::Parts;
use serde::de::DeserializeOwned;

use super::error::ApiError;
use crate::refusal::{explain_mismatch, refuse};

/// Entries of a page if the client does not say.
const PAGE_DEFAULT: u32 = 100;
/// Entries of a page at most.
const PAGE_MAX: u32 = 1000;

/// A query string. Unknown parameters are refused by name. Parameters are read as text and then by
/// [`parameter`], so that a wrong one can be named.
pub(super) struct Parameters<T>(pub(super) T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequestParts<S> for Parameters<T> {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _state: &S) -> Result<Self, ApiError> {
        read_query(Query::try_from_uri(&parts.uri)).map(Self)
    }
}

/// The parameters, or which of them is unknown or given twice.
pub(super) fn read_query<T>(read: Result<Query<T>, QueryRejection>) -> Result<T, ApiError> {
    let rejection = match read {
        Ok(Query(parameters)) => return Ok(parameters),
        Err(rejection) => rejection,
    };
    let text = std::error::Error::source(&rejection).map_or_else(|| rejection.body_text(), ToString::to_string);
    // The text is `PATH: MESSAGE`, or the message alone.
    let begin = ["unknown field `", "duplicate field `"].iter().find_map(|words| text.find(words));
    Err(explain_mismatch(".", &text[begin.unwrap_or(0)..]).into())
}

/// The id in a path.
pub(super) struct Id<T>(pub(super) T);

impl<S: Send + Sync, T: FromStr> FromRequestParts<S> for Id<T> {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let text = Path::<String>::from_request_parts(parts, state).await.map(|Path(text)| text).unwrap_or_default();
        match text.parse() {
            Ok(id) => Ok(Self(id)),
            Err(_) => Err(refuse("id", "a UUID", format!("`{text}`")).into()),
        }
    }
}

/// A parameter's value, if it was sent.
pub(super) fn parameter<T: FromStr>(name: &str, limit: &str, text: Option<&str>) -> Result<Option<T>, ApiError> {
    text.map(|text| text.parse().map_err(|_| refuse(name, limit, format!("`{text}`")).into())).transpose()
}

/// How many entries a page shall have.
pub(super) fn page_limit(text: Option<&str>) -> Result<u32, ApiError> {
    let limit = format!("1 to {PAGE_MAX}");
    match parameter::<u32>("limit", &limit, text)? {
        None => Ok(PAGE_DEFAULT),
        Some(entries @ 1..=PAGE_MAX) => Ok(entries),
        Some(entries) => Err(refuse("limit", limit, entries).into()),
    }
}
