//! `/v1/artifacts`: pictures and latents that jobs start from, sent before the jobs that name them.

use axum::Json;
use axum::body::Body;
use axum::extract::State;
use axum::http::header::CONTENT_TYPE;
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::error::{ApiError, ProblemKind};
use super::openapi::Problems;
use super::{SharedApi, body};
use crate::images::Upload;
use crate::refusal::refuse;

/// A picture or a latent has been stored.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ArtifactStored {
    /// What jobs name it by: `init_image` and `mask_image`. The same bytes always have the same key.
    pub key: String,
    /// What it is, whatever it was sent as.
    pub content_type: String,
    /// Its length.
    pub bytes: u64,
    /// The SHA-256 of its bytes, in hexadecimal.
    pub sha256: String,
    /// Pixels across, before any orientation that its EXIF data asks for; of a latent: values across.
    pub width: u32,
    /// Pixels or values down.
    pub height: u32,
}

/// What a body may be called.
const KINDS: [&str; 5] =
    ["image/png", "image/jpeg", "image/webp", farm::latent::CONTENT_TYPE, "application/octet-stream"];

/// Store an init image, a mask or a latent. The body is the picture itself, a PNG, JPEG or WebP, or a safetensors file
/// with one tensor, `latents`: f32, (channels, height, width).
#[utoipa::path(
    post, path = "/v1/artifacts", tag = "artifacts",
    request_body(content(
        (Vec<u8> = "image/png"), (Vec<u8> = "image/jpeg"), (Vec<u8> = "image/webp"),
        (Vec<u8> = "application/safetensors"), (Vec<u8> = "application/octet-stream"),
    )),
    responses((status = 201, body = ArtifactStored), Problems)
)]
pub(super) async fn store(State(api): State<SharedApi>, headers: HeaderMap, body: Body) -> Result<Response, ApiError> {
    // A browser sends forms and text across sites unasked, but no pictures.
    let kind = headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    if !KINDS.contains(&kind) {
        let limit = format!("one of {}", KINDS.map(|kind| format!("`{kind}`")).join(", "));
        let refusal = refuse("Content-Type", limit, format!("`{kind}`"));
        return Err(ApiError::refused(ProblemKind::UnsupportedMediaType, refusal));
    }
    let bytes = body::read_whole(&headers, body, api.limits.init_image_bytes, "").await?;
    let limits = api.limits.clone();
    let upload = tokio::task::spawn_blocking(move || Upload::check("body", bytes.into(), &limits));
    let upload = upload.await.expect("looking at a picture does not panic")?;
    let key = upload.key();
    let stored = ArtifactStored {
        key: key.path(),
        content_type: key.content_type().to_owned(),
        bytes: upload.bytes.len() as u64,
        sha256: upload.sha256,
        width: upload.width,
        height: upload.height,
    };
    api.artifacts.put(&key, upload.bytes).await?;
    Ok((StatusCode::CREATED, Json(stored)).into_response())
}
