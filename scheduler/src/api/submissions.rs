//! `/v1/submissions`: many jobs at once, all or none of them.

use axum::Json;
use axum::body::Body;
use axum::extract::{Extension, RawQuery, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use farm::id::{JobId, SubmissionId};
use farm::job::{Counters, Lane, NewJob, NewSubmission, SubmissionView};
use farm::store::{JobStream, Submitted};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use super::auth::Caller;
use super::body::BodyKind;
use super::error::ApiError;
use super::idempotency::{Fingerprint, ScopedKey};
use super::intake::{self, LinesParameters};
use super::openapi::Problems;
use super::query::{Id, Parameters, page_limit, parameter};
use super::{Api, SharedApi, body};
use crate::images::Uploads;
use crate::refusal::refuse;
use crate::submission::{Expansion, SubmissionRequest, draw_seed};

/// Bytes of a submission's name at most.
const NAME_BYTES: usize = 200;
/// Attempts of a job at most.
const ATTEMPTS: i64 = 100;

/// A submission has been stored, with all its jobs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct SubmissionAccepted {
    /// The submission.
    pub submission_id: SubmissionId,
    /// How many jobs it has.
    pub jobs: u64,
    /// Where its counters are.
    pub status_url: String,
    /// Where its jobs are listed.
    pub jobs_url: String,
}

/// A page of submissions.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct SubmissionPage {
    /// The submissions, the newest first.
    pub submissions: Vec<SubmissionView>,
    /// Pass it as `before` to get the next page; `null` on the last.
    pub next: Option<SubmissionId>,
}

/// Where a submission's jobs stand after a change.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct SubmissionCountersView {
    /// The submission.
    pub submission_id: SubmissionId,
    /// Its counters. Jobs that are `leased` stop at their next step.
    pub counters: Counters,
}

/// What a retry did.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct SubmissionRetried {
    /// The submission.
    pub submission_id: SubmissionId,
    /// Jobs that are tried again.
    pub retried: u64,
}

/// The page.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct PageParameters {
    /// Submissions older than this one: `next` of the page before.
    #[param(value_type = Option<SubmissionId>)]
    before: Option<String>,
    /// Submissions of a page, 1 to 1000. Default: 100.
    #[param(value_type = Option<u32>)]
    limit: Option<String>,
}

/// What to retry.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct RetryParameters {
    /// Retry cancelled jobs as well as failed ones. Default: false.
    #[param(value_type = Option<bool>)]
    cancelled: Option<String>,
}

/// Render many images. All jobs are stored in one transaction before the answer is sent, or none is.
///
/// As `application/json`: `prompts` or `jobs`, times `sweep`. As `application/x-ndjson`: a job (the body of
/// `POST /v1/jobs`) on each line, of any number and length in all; blank lines are skipped. The query parameters
/// are for JSON Lines alone: what they say of a job holds where its line leaves it open.
#[utoipa::path(
    post, path = "/v1/submissions", tag = "submissions",
    request_body(content(
        (SubmissionRequest = "application/json"),
        (farm::spec::RenderRequest = "application/x-ndjson"),
        (farm::spec::RenderRequest = "application/jsonl"),
    )),
    params(
        LinesParameters,
        ("Idempotency-Key" = Option<String>, Header, description = "The same key with the same request gives the same answer, and one submission."),
    ),
    responses((status = 202, body = SubmissionAccepted), Problems)
)]
pub(super) async fn submit(
    State(api): State<SharedApi>,
    Extension(caller): Extension<Caller>,
    uri: Uri,
    RawQuery(query): RawQuery,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, ApiError> {
    let key = ScopedKey::read(&headers, &caller)?;
    match body::kind(&headers)? {
        BodyKind::JsonLines => intake::submit(&api, &uri, key, body).await,
        BodyKind::Json => {
            if let Some(query) = query.filter(|query| !query.is_empty()) {
                let limit = "absent for a JSON body, which says everything itself";
                return Err(refuse("query", limit, format!("`{query}`")).into());
            }
            let text = body::read_whole(&headers, body, api.limits.body_bytes, body::USE_LINES).await?;
            submit_json(&api, body::parse(text).await?, key).await
        }
    }
}

async fn submit_json(api: &Api, mut request: SubmissionRequest, key: Option<ScopedKey>) -> Result<Response, ApiError> {
    let idempotency = key.map(|key| key.of(Fingerprint::new("POST /v1/submissions").with_request(&request)));
    if let Some(idempotency) = &idempotency
        && let Some(earlier) = api.store.find_idempotent(idempotency).await?
    {
        return api.answer_earlier(earlier).await;
    }
    let submission = NewSubmission {
        idempotency,
        ..api.new_submission(request.name.clone(), request.failure_limit, request.max_attempts)?
    };
    let mut uploads = Uploads::default();
    uploads.take_in_all(&mut request, &api.limits, api.artifacts.as_ref())?;
    let expansion = Expansion::new(request, api.limits.submission_jobs)?;
    uploads.store(api.artifacts.as_ref()).await?;
    let jobs = (0..expansion.jobs()).map(|index| {
        let spec = expansion.job(index).validate(&api.catalog, &api.limits, Lane::Bulk, draw_seed);
        match spec {
            Ok(spec) => Ok(NewJob { id: JobId::new(), spec }),
            Err(refusal) => Err(ApiError::from(refusal).at_job(index).into()),
        }
    });
    api.store_submission(&submission, Box::pin(futures_util::stream::iter(jobs))).await
}

impl Api {
    /// A submission without jobs yet, its settings checked.
    pub(super) fn new_submission(
        &self,
        name: Option<String>,
        failure_limit: Option<i64>,
        max_attempts: Option<i64>,
    ) -> Result<NewSubmission, ApiError> {
        if let Some(name) =
            name.as_deref().filter(|name| !(1..=NAME_BYTES).contains(&name.len()) || name.contains('\0'))
        {
            return Err(refuse("name", format!("1 to {NAME_BYTES} bytes without NUL"), format!("`{name}`")).into());
        }
        let failure_limit = failure_limit.map(|limit| match limit {
            1.. => Ok(limit as u64),
            _ => Err(refuse("failure_limit", "at least 1", limit)),
        });
        let max_attempts = max_attempts.map(|attempts| match attempts {
            1..=ATTEMPTS => Ok(attempts as u32),
            _ => Err(refuse("max_attempts", format!("1 to {ATTEMPTS}"), attempts)),
        });
        Ok(NewSubmission {
            id: SubmissionId::new(),
            idempotency: None,
            name,
            max_attempts: max_attempts.transpose()?.unwrap_or(self.max_attempts),
            failure_limit: failure_limit.transpose()?,
        })
    }

    /// Stores a submission and answers.
    pub(super) async fn store_submission(
        &self,
        submission: &NewSubmission,
        jobs: JobStream<'_>,
    ) -> Result<Response, ApiError> {
        match self.store.submit(submission, jobs).await? {
            Submitted::Created { jobs } => {
                self.accepted(jobs);
                Ok(answer(submission.id, jobs))
            }
            earlier => self.answer_earlier(earlier).await,
        }
    }

    async fn answer_earlier(&self, earlier: Submitted) -> Result<Response, ApiError> {
        match earlier {
            Submitted::Existing { submission_id, .. } => {
                Ok(answer(submission_id, self.submission(submission_id).await?.counters.total()))
            }
            Submitted::Conflict => Err(ApiError::idempotency_conflict()),
            Submitted::Created { .. } => unreachable!("what came earlier is not created now"),
        }
    }

    async fn submission(&self, id: SubmissionId) -> Result<SubmissionView, ApiError> {
        self.store.submission(id).await?.ok_or_else(|| ApiError::not_found("submission", id))
    }
}

fn answer(submission_id: SubmissionId, jobs: u64) -> Response {
    let accepted = SubmissionAccepted {
        submission_id,
        jobs,
        status_url: format!("/v1/submissions/{submission_id}"),
        jobs_url: format!("/v1/jobs?submission_id={submission_id}"),
    };
    let location = HeaderValue::from_str(&accepted.status_url).expect("a path with a UUID is ASCII");
    (StatusCode::ACCEPTED, [(header::LOCATION, location)], Json(accepted)).into_response()
}

/// List submissions, the newest first.
#[utoipa::path(
    get, path = "/v1/submissions", tag = "submissions", params(PageParameters),
    responses((status = 200, body = SubmissionPage), Problems)
)]
pub(super) async fn list(
    State(api): State<SharedApi>,
    Parameters(asked): Parameters<PageParameters>,
) -> Result<Json<SubmissionPage>, ApiError> {
    let limit = page_limit(asked.limit.as_deref())?;
    let before = parameter("before", "a UUID: `next` of the page before", asked.before.as_deref())?;
    let mut submissions = api.store.submissions(before, limit + 1).await?;
    let more = submissions.len() > limit as usize;
    submissions.truncate(limit as usize);
    let next = submissions.last().filter(|_| more).map(|submission| submission.submission_id);
    Ok(Json(SubmissionPage { submissions, next }))
}

/// One submission: counters, rate and time left. Takes the same time whatever its size.
#[utoipa::path(
    get, path = "/v1/submissions/{id}", tag = "submissions",
    params(("id" = SubmissionId, Path, description = "The submission")),
    responses((status = 200, body = SubmissionView), Problems)
)]
pub(super) async fn get(
    State(api): State<SharedApi>,
    Id(submission): Id<SubmissionId>,
) -> Result<Json<SubmissionView>, ApiError> {
    api.submission(submission).await.map(Json)
}

/// Cancel all jobs of a submission that are not in a final state.
#[utoipa::path(
    delete, path = "/v1/submissions/{id}", tag = "submissions",
    params(("id" = SubmissionId, Path, description = "The submission")),
    responses((status = 200, body = SubmissionCountersView), Problems)
)]
pub(super) async fn cancel(
    State(api): State<SharedApi>,
    Id(submission_id): Id<SubmissionId>,
) -> Result<Json<SubmissionCountersView>, ApiError> {
    let counters = api.store.cancel_submission(submission_id).await?;
    let counters = counters.ok_or_else(|| ApiError::not_found("submission", submission_id))?;
    Ok(Json(SubmissionCountersView { submission_id, counters }))
}

/// Try the failed jobs of a submission again, with all their attempts.
#[utoipa::path(
    post, path = "/v1/submissions/{id}/retry", tag = "submissions",
    params(("id" = SubmissionId, Path, description = "The submission"), RetryParameters),
    responses((status = 200, body = SubmissionRetried), Problems)
)]
pub(super) async fn retry(
    State(api): State<SharedApi>,
    Id(submission_id): Id<SubmissionId>,
    Parameters(asked): Parameters<RetryParameters>,
) -> Result<Json<SubmissionRetried>, ApiError> {
    let cancelled = parameter("cancelled", "`true` or `false`", asked.cancelled.as_deref())?.unwrap_or(false);
    let retried = api.store.retry_submission(submission_id, cancelled).await?;
    let retried = retried.ok_or_else(|| ApiError::not_found("submission", submission_id))?;
    api.nudge.notify_one();
    Ok(Json(SubmissionRetried { submission_id, retried }))
}
