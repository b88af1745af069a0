//! What goes wrong, as clients see it: every error is a problem document (RFC 9457).
//!
//! Policy: handlers return [`ApiError`]; the table in [`ProblemKind::facts`] is the only place that knows HTTP status
//! codes. An error is logged once, by [`super::observe`], which finds it in the response's extensions.
//! What a client can mend is told to the client; what only an operator can mend goes to the log, and the client
//! learns no more than that.

use std::error::Error;
use std::fmt;
use std::sync::Arc;

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use farm::artifact::ArtifactError;
use farm::broker::BrokerError;
use farm::job::JobState;
use farm::spec::ValidationError;
use farm::store::StoreError;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::submission::SpoolError;

/// An error's body, `application/problem+json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Problem {
    /// What sort of problem, as a URN: `urn:kiln:problem:invalid-field`.
    #[serde(rename = "type")]
    pub kind: String,
    /// The sort in words.
    pub title: String,
    /// The HTTP status.
    pub status: u16,
    /// This very problem in words.
    pub detail: String,
    /// The field, header or parameter at fault.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub field: Option<String>,
    /// What it must be.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limit: Option<String>,
    /// What it was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub value: Option<String>,
    /// The line of a JSON Lines body, from 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub line: Option<u64>,
    /// The job of a submission's product, from 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub job: Option<u64>,
    /// The state that stands in the way.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state: Option<JobState>,
}

/// The sorts of problems.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ProblemKind {
    MalformedRequest,
    Unauthorized,
    Forbidden,
    NotFound,
    MethodNotAllowed,
    ClientTooSlow,
    IdempotencyConflict,
    WrongState,
    Gone,
    TooLarge,
    UnsupportedMediaType,
    InvalidField,
    Internal,
    Unavailable,
    TookTooLong,
    StorageFull,
}

impl ProblemKind {
    /// Status, slug of the type URN, title.
    fn facts(self) -> (StatusCode, &'static str, &'static str) {
        match self {
            Self::MalformedRequest => (StatusCode::BAD_REQUEST, "malformed-request", "The request cannot be read"),
            Self::Unauthorized => (StatusCode::UNAUTHORIZED, "unauthorized", "An API key is needed"),
            Self::Forbidden => (StatusCode::FORBIDDEN, "forbidden", "The request is not allowed"),
            Self::NotFound => (StatusCode::NOT_FOUND, "not-found", "There is no such thing"),
            Self::MethodNotAllowed => (StatusCode::METHOD_NOT_ALLOWED, "method-not-allowed", "Not with this method"),
            Self::ClientTooSlow => (StatusCode::REQUEST_TIMEOUT, "client-too-slow", "The body did not arrive in time"),
            Self::IdempotencyConflict => {
                (StatusCode::CONFLICT, "idempotency-conflict", "The Idempotency-Key came before with another request")
            }
            Self::WrongState => (StatusCode::CONFLICT, "wrong-state", "The job's state does not allow it"),
            Self::Gone => (StatusCode::GONE, "gone", "The object is gone"),
            Self::TooLarge => (StatusCode::PAYLOAD_TOO_LARGE, "too-large", "The body is too large"),
            Self::UnsupportedMediaType => {
                (StatusCode::UNSUPPORTED_MEDIA_TYPE, "unsupported-media-type", "The content type is not understood")
            }
            Self::InvalidField => (StatusCode::UNPROCESSABLE_ENTITY, "invalid-field", "A field is not valid"),
            Self::Internal => (StatusCode::INTERNAL_SERVER_ERROR, "internal", "The scheduler failed"),
            Self::Unavailable => (StatusCode::SERVICE_UNAVAILABLE, "unavailable", "A service is unavailable"),
            Self::TookTooLong => (StatusCode::GATEWAY_TIMEOUT, "took-too-long", "A service did not answer in time"),
            Self::StorageFull => (StatusCode::INSUFFICIENT_STORAGE, "storage-full", "A disk is full"),
        }
    }
}

/// Seconds after which a client may ask an unavailable service again.
const RETRY_AFTER_SECONDS: u16 = 2;

/// What a handler fails with. Boxed, since results are returned everywhere and errors are rare.
#[derive(Debug)]
pub(crate) struct ApiError(Box<Parts>);

#[derive(Debug)]
struct Parts {
    kind: ProblemKind,
    problem: Problem,
    source: Option<Box<dyn Error + Send + Sync>>,
}

/// What [`super::observe`] logs of an error.
#[derive(Clone, Debug)]
pub(crate) struct ErrorReport(pub(crate) Arc<str>);

impl ApiError {
    pub(crate) fn new(kind: ProblemKind, detail: impl Into<String>) -> Self {
        let (status, slug, title) = kind.facts();
        let problem = Problem {
            kind: format!("urn:kiln:problem:{slug}"),
            title: title.to_owned(),
            status: status.as_u16(),
            detail: detail.into(),
            field: None,
            limit: None,
            value: None,
            line: None,
            job: None,
            state: None,
        };
        Self(Box::new(Parts { kind, problem, source: None }))
    }

    /// A field, header or parameter that is not what it must be.
    pub(crate) fn refused(kind: ProblemKind, refusal: ValidationError) -> Self {
        let mut error = Self::new(kind, refusal.to_string());
        let problem = &mut error.0.problem;
        (problem.field, problem.limit, problem.value) = (Some(refusal.field), Some(refusal.limit), Some(refusal.value));
        error
    }

    /// There is no such job or submission.
    pub(crate) fn not_found(what: &str, id: impl fmt::Display) -> Self {
        let refusal = ValidationError {
            field: format!("{what}_id"),
            limit: format!("the id of a {what} that exists"),
            value: id.to_string(),
        };
        Self::refused(ProblemKind::NotFound, refusal)
    }

    /// A job's state stands in the way.
    pub(crate) fn wrong_state(detail: impl Into<String>, state: JobState) -> Self {
        let mut error = Self::new(ProblemKind::WrongState, detail);
        error.0.problem.state = Some(state);
        error
    }

    /// The `Idempotency-Key` came before, with another request.
    pub(crate) fn idempotency_conflict() -> Self {
        let detail = "this Idempotency-Key came before with another request; use a new key for a new request";
        let mut error = Self::new(ProblemKind::IdempotencyConflict, detail);
        error.0.problem.field = Some("Idempotency-Key".into());
        error
    }

    /// A handler panicked.
    pub(crate) fn panicked(panic: &(dyn std::any::Any + Send)) -> Self {
        Self::internal(format!("a handler panicked: {}", crate::loops::panic_message(panic)).into())
    }

    fn internal(source: Box<dyn Error + Send + Sync>) -> Self {
        Self::new(ProblemKind::Internal, "an error that is not the request's fault; the scheduler's log says more")
            .caused_by(source)
    }

    fn unavailable(service: &str, source: Box<dyn Error + Send + Sync>) -> Self {
        let detail =
            format!("the {service} does not answer; try again: with an Idempotency-Key a repeated request counts once");
        Self::new(ProblemKind::Unavailable, detail).caused_by(source)
    }

    fn full(what: &str, source: Box<dyn Error + Send + Sync>) -> Self {
        let refusal = ValidationError { field: what.to_owned(), limit: "not full".into(), value: source.to_string() };
        Self::refused(ProblemKind::StorageFull, refusal).caused_by(source)
    }

    fn caused_by(mut self, source: Box<dyn Error + Send + Sync>) -> Self {
        self.0.source = Some(source);
        self
    }

    /// Names the line of a JSON Lines body, from 1, unless it has been named.
    pub(crate) fn at_line(mut self, line: u64) -> Self {
        if self.0.problem.line.is_some() {
            return self;
        }
        self.0.problem.detail = format!("line {line}: {}", self.0.problem.detail);
        self.0.problem.line = Some(line);
        self
    }

    /// Names the job of a submission's product, from 0.
    pub(crate) fn at_job(mut self, job: u64) -> Self {
        self.0.problem.detail = format!("job {job}: {}", self.0.problem.detail);
        self.0.problem.job = Some(job);
        self
    }

    fn report(&self) -> String {
        let mut report = self.0.problem.detail.clone();
        let mut cause = self.0.source.as_deref().map(|source| source as &(dyn Error + 'static));
        while let Some(error) = cause {
            report.push_str(&format!(": {error}"));
            cause = error.source();
        }
        report
    }
}

impl fmt::Display for ApiError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.problem.detail)
    }
}

impl Error for ApiError {}

impl From<ValidationError> for ApiError {
    fn from(refusal: ValidationError) -> Self {
        Self::refused(ProblemKind::InvalidField, refusal)
    }
}

impl From<StoreError> for ApiError {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::Unavailable(_) => Self::unavailable("store", error.into()),
            StoreError::Full(_) => Self::full("store", error.into()),
            // The stream of jobs fails with this very type.
            StoreError::Source(source) => match source.downcast::<ApiError>() {
                Ok(own) => *own,
                Err(source) => Self::internal(source),
            },
            StoreError::Schema { .. } | StoreError::Internal(_) => Self::internal(error.into()),
        }
    }
}

impl From<BrokerError> for ApiError {
    fn from(error: BrokerError) -> Self {
        match error {
            BrokerError::Unavailable(_) => Self::unavailable("broker", error.into()),
            BrokerError::Internal(_) => Self::internal(error.into()),
        }
    }
}

impl From<ArtifactError> for ApiError {
    fn from(error: ArtifactError) -> Self {
        match error {
            ArtifactError::NotFound(path) => Self::new(
                ProblemKind::Gone,
                format!("the job is done, but its object `{path}` is no longer in the artifact store"),
            ),
            ArtifactError::Unavailable(_) => Self::unavailable("artifact store", error.into()),
            ArtifactError::Full(_) => Self::full("artifacts", error.into()),
            ArtifactError::Internal(_) => Self::internal(error.into()),
        }
    }
}

impl From<SpoolError> for ApiError {
    fn from(error: SpoolError) -> Self {
        match &error {
            SpoolError::Full { folder, .. } => {
                let refusal = ValidationError {
                    field: "api.spool_dir".into(),
                    limit: "a folder with room for the whole submission".into(),
                    value: format!("`{}`, which is full", folder.display()),
                };
                Self::refused(ProblemKind::StorageFull, refusal).caused_by(error.into())
            }
            SpoolError::Failed { .. } => Self::internal(error.into()),
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let (status, ..) = self.0.kind.facts();
        let report = ErrorReport(self.report().into());
        let mut response = (status, Json(&self.0.problem)).into_response();
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
        match self.0.kind {
            ProblemKind::Unauthorized => {
                headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer realm=\"kiln\""));
            }
            ProblemKind::Unavailable | ProblemKind::TookTooLong => {
                headers.insert(header::RETRY_AFTER, HeaderValue::from(RETRY_AFTER_SECONDS));
            }
            _ => {}
        }
        response.extensions_mut().insert(report);
        response
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    #[test]
    fn a_full_spool_is_told_as_insufficient_storage_with_its_folder() {
        let full = SpoolError::Full { folder: "/spool".into(), source: io::ErrorKind::StorageFull.into() };
        let error = ApiError::from(full);
        let problem = &error.0.problem;
        assert_eq!(problem.field.as_deref(), Some("api.spool_dir"));
        assert_eq!(problem.value.as_deref(), Some("`/spool`, which is full"));
        assert_eq!(error.into_response().status(), StatusCode::INSUFFICIENT_STORAGE);
    }

    #[test]
    fn what_a_stream_of_jobs_failed_with_comes_through_the_store_unchanged() {
        let refusal = ValidationError { field: "steps".into(), limit: "1 to 1000".into(), value: "0".into() };
        let source = StoreError::Source(ApiError::from(refusal).at_job(3).into());
        let error = ApiError::from(source);
        assert_eq!((error.0.kind, error.0.problem.job), (ProblemKind::InvalidField, Some(3)));
    }

    #[test]
    fn the_log_gets_the_whole_chain_and_the_client_does_not() {
        let error = ApiError::from(StoreError::Internal("a secret cause".into()));
        assert!(error.report().contains("a secret cause"), "{}", error.report());
        assert!(!error.to_string().contains("secret"), "{error}");
    }

    #[test]
    fn the_innermost_line_is_the_one_that_is_named() {
        let error = ApiError::new(ProblemKind::MalformedRequest, "broken").at_line(7).at_line(9);
        assert_eq!((error.0.problem.line, error.to_string()), (Some(7), "line 7: broken".to_owned()));
    }
}
