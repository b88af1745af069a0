//! How request bodies are read: bounded in size, and in the time between two pieces.

use std::time::Duration;

use axum::body::{Body, BodyDataStream};
use axum::http::HeaderMap;
use axum::http::header::{CONTENT_LENGTH, CONTENT_TYPE};
use bytes::Bytes;
use futures_util::StreamExt;
use serde::de::DeserializeOwned;

use super::error::{ApiError, ProblemKind};
use crate::refusal::{JsonError, read_json, refuse};

/// The longest silence in the middle of a body.
const IDLE_LIMIT: Duration = Duration::from_secs(30);
/// Bodies above this are parsed beside the runtime's threads.
const INLINE_BYTES: usize = 64 * 1024;
/// How much of a refused body is still taken, and for how long, so that the client reads the answer and not a broken
/// connection.
const DRAIN_BYTES: usize = 256 * 1024 * 1024;
const DRAIN_TIME: Duration = Duration::from_secs(20);

/// What a body holds, by its `Content-Type`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum BodyKind {
    /// One JSON object.
    Json,
    /// A JSON object on each line.
    JsonLines,
}

/// Reads the `Content-Type`. It is required: a browser sends anything but JSON across sites unasked.
pub(super) fn kind(headers: &HeaderMap) -> Result<BodyKind, ApiError> {
    let header = headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let name = header.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    match name.as_str() {
        "application/json" => Ok(BodyKind::Json),
        "application/x-ndjson" | "application/ndjson" | "application/jsonl" | "application/x-jsonlines" => {
            Ok(BodyKind::JsonLines)
        }
        _ => Err(wrong_kind("`application/json` or, for submissions, `application/x-ndjson`", header)),
    }
}

/// Insists on a JSON object.
pub(super) fn require_json(headers: &HeaderMap) -> Result<(), ApiError> {
    match kind(headers)? {
        BodyKind::Json => Ok(()),
        BodyKind::JsonLines => Err(wrong_kind("`application/json`; `/v1/submissions` takes JSON Lines", "JSON Lines")),
    }
}

fn wrong_kind(limit: &str, value: &str) -> ApiError {
    ApiError::refused(ProblemKind::UnsupportedMediaType, refuse("Content-Type", limit, format!("`{value}`")))
}

/// A body that arrives piece by piece.
pub(super) struct Pieces(BodyDataStream);

impl Pieces {
    pub(super) fn of(body: Body) -> Self {
        Self(body.into_data_stream())
    }

    /// The next piece; `None` at the end.
    pub(super) async fn next(&mut self) -> Result<Option<Bytes>, ApiError> {
        match tokio::time::timeout(IDLE_LIMIT, self.0.next()).await {
            Ok(None) => Ok(None),
            Ok(Some(Ok(piece))) => Ok(Some(piece)),
            Ok(Some(Err(error))) => {
                Err(ApiError::new(ProblemKind::MalformedRequest, format!("the body ended before its end: {error}")))
            }
            Err(_elapsed) => {
                let detail = format!("nothing more of the body came for {} seconds", IDLE_LIMIT.as_secs());
                Err(ApiError::new(ProblemKind::ClientTooSlow, detail))
            }
        }
    }

    /// Takes what still comes, to no purpose but to let the client finish and read the answer.
    pub(super) fn drain(mut self) {
        tokio::spawn(tokio::time::timeout(DRAIN_TIME, async move {
            let mut bytes = 0;
            while let Some(Ok(piece)) = self.0.next().await {
                bytes += piece.len();
                if bytes > DRAIN_BYTES {
                    break;
                }
            }
        }));
    }
}

/// Reads a whole body of at most `limit` bytes; a refusal ends with `advice`.
pub(super) async fn read_whole(
    headers: &HeaderMap,
    body: Body,
    limit: usize,
    advice: &str,
) -> Result<Vec<u8>, ApiError> {
    let mut pieces = Pieces::of(body);
    let announced = headers.get(CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse::<usize>().ok());
    let mut whole = Vec::new();
    let mut excess = announced.filter(|bytes| *bytes > limit);
    while excess.is_none()
        && let Some(piece) = pieces.next().await?
    {
        whole.extend_from_slice(&piece);
        excess = Some(whole.len()).filter(|bytes| *bytes > limit);
    }
    let Some(bytes) = excess else { return Ok(whole) };
    pieces.drain();
    let refusal = refuse("body", format!("at most {limit} bytes{advice}"), format!("{bytes} bytes or more"));
    Err(ApiError::refused(ProblemKind::TooLarge, refusal))
}

/// What to do about a JSON body that is too long.
pub(super) const USE_LINES: &str = "; JSON Lines have no such limit";

/// Reads a JSON object.
pub(super) async fn parse<T: DeserializeOwned + Send + 'static>(text: Vec<u8>) -> Result<T, ApiError> {
    if text.len() <= INLINE_BYTES {
        return read_json(&text).map_err(ApiError::from);
    }
    tokio::task::spawn_blocking(move || read_json(&text))
        .await
        .expect("reading JSON does not panic")
        .map_err(Into::into)
}

impl From<JsonError> for ApiError {
    fn from(error: JsonError) -> Self {
        match error {
            JsonError::Malformed(refusal) => Self::refused(ProblemKind::MalformedRequest, refusal),
            JsonError::Field(refusal) => Self::refused(ProblemKind::InvalidField, refusal),
        }
    }
}
