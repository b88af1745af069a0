//! `/v1/jobs/{id}/image` and `/v1/jobs/{id}/sidecar`: what a job has made.

use std::time::Duration;

use axum::extract::State;
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use farm::artifact;
use farm::id::JobId;
use farm::job::{JobState, JobView};

use super::error::ApiError;
use super::openapi::Problems;
use super::query::Id;
use super::{Api, SharedApi};

/// An object is written once and never changed, but it is its owner's.
const CACHE_FOREVER: HeaderValue = HeaderValue::from_static("private, max-age=31536000, immutable");
/// A presigned URL expires.
const CACHE_NEVER: HeaderValue = HeaderValue::from_static("no-store");

/// The PNG of a job that is done (the latent, if that is what it ends in): a redirect to a presigned URL where the
/// artifact store can make one, else the bytes.
#[utoipa::path(
    get, path = "/v1/jobs/{id}/image", tag = "jobs", params(("id" = JobId, Path, description = "The job")),
    responses(
        (status = 200, description = "The PNG, or the latent as a safetensors file", content(
            (Vec<u8> = "image/png"), (Vec<u8> = "application/safetensors"),
        )),
        (status = 304, description = "The client has it (`If-None-Match`)"),
        (status = 307, description = "Where it is: `Location`"),
        Problems,
    )
)]
pub(super) async fn image(
    State(api): State<SharedApi>,
    Id(job): Id<JobId>,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    let view = done(&api, job).await?;
    let kind = artifact::content_type_of_result(view.image_key.as_deref().unwrap_or_default());
    hand_out(&api, view.image_key.as_deref(), view.sha256.as_deref(), kind, &headers).await
}

/// The JSON that describes a job's image, in the same way.
#[utoipa::path(
    get, path = "/v1/jobs/{id}/sidecar", tag = "jobs", params(("id" = JobId, Path, description = "The job")),
    responses(
        (status = 200, description = "The sidecar", body = serde_json::Value),
        (status = 307, description = "Where it is: `Location`"),
        Problems,
    )
)]
pub(super) async fn sidecar(
    State(api): State<SharedApi>,
    Id(job): Id<JobId>,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    let view = done(&api, job).await?;
    hand_out(&api, view.sidecar_key.as_deref(), None, "application/json", &headers).await
}

/// Where a job's image is, as a path of this API.
pub(super) fn image_path(job: JobId) -> String {
    format!("/v1/jobs/{job}/image")
}

/// A URL that needs no API key, where the artifact store can make one.
pub(super) async fn presigned(api: &Api, path: &str) -> artifact::Result<Option<String>> {
    api.artifacts.presign(path, Duration::from_secs(api.config.image_url_seconds)).await
}

async fn done(api: &Api, job: JobId) -> Result<JobView, ApiError> {
    let view = api.job(job).await?;
    match view.state {
        JobState::Done => Ok(view),
        state => Err(ApiError::wrong_state(
            format!("only a job that is done has an image; this one is {}", state.as_str()),
            state,
        )),
    }
}

async fn hand_out(
    api: &Api,
    path: Option<&str>,
    sha256: Option<&str>,
    content_type: &'static str,
    headers: &HeaderMap,
) -> Result<Response, ApiError> {
    let path = path.unwrap_or_default();
    let tag = sha256.and_then(|hash| HeaderValue::from_str(&format!("\"{hash}\"")).ok());
    if let Some(tag) = &tag
        && headers.get_all(header::IF_NONE_MATCH).iter().any(|known| known == tag)
    {
        return Ok((StatusCode::NOT_MODIFIED, [(header::ETAG, tag.clone())]).into_response());
    }
    if let Some(url) = presigned(api, path).await?
        && let Ok(location) = HeaderValue::from_str(&url)
    {
        let headers = [(header::LOCATION, location), (header::CACHE_CONTROL, CACHE_NEVER)];
        return Ok((StatusCode::TEMPORARY_REDIRECT, headers).into_response());
    }
    let bytes = api.artifacts.get(path).await?;
    let mut response = bytes.into_response();
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
    headers.insert(header::CACHE_CONTROL, CACHE_FOREVER);
    // Stored bytes are never a page: a browser shall not guess otherwise.
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    if let Some(tag) = tag {
        headers.insert(header::ETAG, tag);
    }
    Ok(response)
}
