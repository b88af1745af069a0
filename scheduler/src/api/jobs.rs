//! `/v1/jobs`: one job at a time, and listings.

use axum::Json;
use axum::body::Body;
use axum::extract::{Extension, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use farm::id::{JobId, SubmissionId};
use farm::job::{JobState, JobView, Lane, NewJob, NewSubmission};
use farm::spec::RenderRequest;
use farm::store::{JobFilter, Submitted};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use super::auth::Caller;
use super::error::ApiError;
use super::idempotency::{Fingerprint, ScopedKey};
use super::openapi::Problems;
use super::query::{Id, Parameters, page_limit, parameter};
use super::{Api, SharedApi, body};
use crate::images::Uploads;
use crate::refusal::refuse;
use crate::submission::draw_seed;

/// A job has been stored and will be rendered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct JobAccepted {
    /// The job.
    pub job_id: JobId,
    /// The submission it makes up alone.
    pub submission_id: SubmissionId,
    /// Where its state is.
    pub status_url: String,
    /// Where its news come as server-sent events.
    pub sse_url: String,
    /// Where its image will be.
    pub image_url: String,
}

impl JobAccepted {
    fn new(job_id: JobId, submission_id: SubmissionId) -> Self {
        Self {
            job_id,
            submission_id,
            status_url: format!("/v1/jobs/{job_id}"),
            sse_url: format!("/v1/jobs/{job_id}/stream"),
            image_url: format!("/v1/jobs/{job_id}/image"),
        }
    }
}

/// A page of jobs.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct JobPage {
    /// The jobs, in the order in which they were accepted.
    pub jobs: Vec<JobView>,
    /// Pass it as `after` to get the next page; `null` on the last.
    pub next: Option<JobId>,
}

/// Where a job stands after a change.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct JobStateView {
    /// The job.
    pub job_id: JobId,
    /// Its state. A job that is `leased` while it is cancelled stops at its next step.
    pub state: JobState,
}

/// Filters, which hold together, and the page.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct ListParameters {
    /// Jobs of this submission.
    #[param(value_type = Option<SubmissionId>)]
    submission_id: Option<String>,
    /// Jobs in this state.
    #[param(value_type = Option<JobState>)]
    state: Option<String>,
    /// Jobs of this checkpoint.
    model: Option<String>,
    /// Jobs with this tag.
    tag: Option<String>,
    /// Jobs after this one: `next` of the page before.
    #[param(value_type = Option<JobId>)]
    after: Option<String>,
    /// Jobs of a page, 1 to 1000. Default: 100.
    #[param(value_type = Option<u32>)]
    limit: Option<String>,
}

/// Render one image. It is stored before the answer is sent: nothing accepted is lost.
#[utoipa::path(
    post, path = "/v1/jobs", tag = "jobs", request_body = RenderRequest,
    params(("Idempotency-Key" = Option<String>, Header, description = "The same key with the same request gives the same answer, and one job.")),
    responses((status = 202, body = JobAccepted), Problems)
)]
pub(super) async fn submit(
    State(api): State<SharedApi>,
    Extension(caller): Extension<Caller>,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, ApiError> {
    body::require_json(&headers)?;
    let text = body::read_whole(&headers, body, api.limits.body_bytes, body::USE_LINES).await?;
    let mut request: RenderRequest = body::parse(text).await?;
    let idempotency =
        ScopedKey::read(&headers, &caller)?.map(|key| key.of(Fingerprint::new("POST /v1/jobs").with_request(&request)));
    // Before the request is checked: what was accepted once stays accepted, whatever the catalog says today.
    if let Some(idempotency) = &idempotency
        && let Some(earlier) = api.store.find_idempotent(idempotency).await?
    {
        return answer_earlier(earlier);
    }
    let mut uploads = Uploads::default();
    uploads.take_in(&mut request, &api.limits, api.artifacts.as_ref())?;
    let spec = request.validate(&api.catalog, &api.limits, Lane::Interactive, draw_seed)?;
    uploads.store(api.artifacts.as_ref()).await?;
    let submission = NewSubmission {
        id: SubmissionId::new(),
        idempotency,
        name: None,
        max_attempts: api.max_attempts,
        failure_limit: None,
    };
    let job = NewJob { id: JobId::new(), spec };
    let (submission_id, job_id) = (submission.id, job.id);
    let jobs = Box::pin(futures_util::stream::iter([Ok(job)]));
    match api.store.submit(&submission, jobs).await? {
        Submitted::Created { jobs } => {
            api.accepted(jobs);
            Ok(answer(JobAccepted::new(job_id, submission_id)))
        }
        earlier => answer_earlier(earlier),
    }
}

fn answer_earlier(earlier: Submitted) -> Result<Response, ApiError> {
    match earlier {
        Submitted::Existing { submission_id, first_job } => Ok(answer(JobAccepted::new(first_job, submission_id))),
        Submitted::Conflict => Err(ApiError::idempotency_conflict()),
        Submitted::Created { .. } => unreachable!("what came earlier is not created now"),
    }
}

fn answer(accepted: JobAccepted) -> Response {
    let location = HeaderValue::from_str(&accepted.status_url).expect("a path with a UUID is ASCII");
    (StatusCode::ACCEPTED, [(header::LOCATION, location)], Json(accepted)).into_response()
}

impl Api {
    /// New pending jobs are in the store.
    pub(super) fn accepted(&self, jobs: u64) {
        self.metrics.submitted(jobs);
        self.nudge.notify_one();
    }
}

/// List jobs.
#[utoipa::path(get, path = "/v1/jobs", tag = "jobs", params(ListParameters), responses((status = 200, body = JobPage), Problems))]
pub(super) async fn list(
    State(api): State<SharedApi>,
    Parameters(asked): Parameters<ListParameters>,
) -> Result<Json<JobPage>, ApiError> {
    let limit = page_limit(asked.limit.as_deref())?;
    let state = asked.state.as_deref().map(|word| {
        let words = || format!("one of {}", JobState::ALL.map(JobState::as_str).join(", "));
        JobState::parse(word).ok_or_else(|| refuse("state", words(), format!("`{word}`")))
    });
    let filter = JobFilter {
        submission_id: parameter("submission_id", "a UUID", asked.submission_id.as_deref())?,
        state: state.transpose()?,
        model: asked.model,
        tag: asked.tag,
        after: parameter("after", "a UUID: `next` of the page before", asked.after.as_deref())?,
        // One more tells whether there is a next page.
        limit: limit + 1,
    };
    let mut jobs = api.store.jobs(&filter).await?;
    let more = jobs.len() > limit as usize;
    jobs.truncate(limit as usize);
    let next = jobs.last().filter(|_| more).map(|job| job.job_id);
    Ok(Json(JobPage { jobs, next }))
}

/// One job.
#[utoipa::path(
    get, path = "/v1/jobs/{id}", tag = "jobs", params(("id" = JobId, Path, description = "The job")),
    responses((status = 200, body = JobView), Problems)
)]
pub(super) async fn get(State(api): State<SharedApi>, Id(job): Id<JobId>) -> Result<Json<JobView>, ApiError> {
    api.job(job).await.map(Json)
}

/// Cancel a job. A job in a final state stays in it.
#[utoipa::path(
    delete, path = "/v1/jobs/{id}", tag = "jobs", params(("id" = JobId, Path, description = "The job")),
    responses((status = 200, body = JobStateView), Problems)
)]
pub(super) async fn cancel(State(api): State<SharedApi>, Id(job): Id<JobId>) -> Result<Json<JobStateView>, ApiError> {
    let state = api.store.cancel_job(job).await?.ok_or_else(|| ApiError::not_found("job", job))?;
    Ok(Json(JobStateView { job_id: job, state }))
}

/// Try a failed or cancelled job again, with all its attempts. A job that is under way stays so.
#[utoipa::path(
    post, path = "/v1/jobs/{id}/retry", tag = "jobs", params(("id" = JobId, Path, description = "The job")),
    responses((status = 200, body = JobStateView), Problems)
)]
pub(super) async fn retry(State(api): State<SharedApi>, Id(job): Id<JobId>) -> Result<Json<JobStateView>, ApiError> {
    let state = api.store.retry_job(job).await?.ok_or_else(|| ApiError::not_found("job", job))?;
    if state.is_final() {
        let detail = format!("only a failed or cancelled job can be tried again; this one is {}", state.as_str());
        return Err(ApiError::wrong_state(detail, state));
    }
    api.nudge.notify_one();
    Ok(Json(JobStateView { job_id: job, state }))
}

impl Api {
    /// A job that exists.
    pub(super) async fn job(&self, job: JobId) -> Result<JobView, ApiError> {
        self.store.job(job).await?.ok_or_else(|| ApiError::not_found("job", job))
    }
}
