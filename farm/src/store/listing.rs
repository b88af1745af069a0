//! What clients read: jobs, submissions, totals. Each listing is a keyset page that one index serves.

use super::columns::Moment;
use super::counters::{self, FARM, Tally};
use super::driver::{Statement, arguments, statement};
use super::sql::SqlStore;
use super::{JobFilter, Result};
use crate::id::{JobId, SubmissionId, WorkerId};
use crate::job::{Counters, Failure, FailureKind, JobState, JobView, SubmissionView};
use crate::spec::RenderSpec;
use uuid::Uuid;

#[derive(Debug, sqlx::FromRow)]
struct JobRow {
    job_id: JobId,
    submission_id: SubmissionId,
    job_index: i64,
    state: JobState,
    #[sqlx(json)]
    spec: RenderSpec,
    attempts: i32,
    worker: Option<String>,
    image_key: Option<String>,
    sidecar_key: Option<String>,
    sha256: Option<String>,
    render_ms: Option<i64>,
    error_kind: Option<FailureKind>,
    error_message: Option<String>,
    created_at: Moment,
    queued_at: Option<Moment>,
    started_at: Option<Moment>,
    finished_at: Option<Moment>,
}

impl From<JobRow> for JobView {
    fn from(row: JobRow) -> Self {
        let error = row.error_kind.zip(row.error_message).map(|(kind, message)| Failure { kind, message });
        let time = |moment: Option<Moment>| moment.map(|moment| moment.0);
        Self {
            job_id: row.job_id,
            submission_id: row.submission_id,
            index: row.job_index as u64,
            state: row.state,
            spec: row.spec,
            attempts: row.attempts as u32,
            worker: row.worker.map(WorkerId),
            image_key: row.image_key,
            sidecar_key: row.sidecar_key,
            sha256: row.sha256,
            error,
            created_at: row.created_at.0,
            queued_at: time(row.queued_at),
            started_at: time(row.started_at),
            finished_at: time(row.finished_at),
            render_ms: row.render_ms.map(|ms| ms as u64),
        }
    }
}

macro_rules! job_columns {
    ($dialect:ident) => {
        "SELECT jobs.job_id, jobs.submission_id, jobs.job_index, jobs.state, jobs.spec, jobs.attempts, jobs.worker,
           jobs.image_key, jobs.sidecar_key, jobs.sha256, jobs.render_ms, jobs.error_kind, jobs.error_message,
           jobs.created_at, jobs.queued_at, jobs.started_at, jobs.finished_at
    FROM jobs "
    };
}

/// The filters, each of which may be NULL. A statement names the one filter again that it reads its
/// index by.
macro_rules! filters {
    ($dialect:ident) => {
        " AND jobs.job_id > $1
      AND ($3 IS NULL OR jobs.submission_id = $3)
      AND ($4 IS NULL OR jobs.state = $4)
      AND ($5 IS NULL OR jobs.model = $5)
      AND ($6 IS NULL OR EXISTS (SELECT 1 FROM job_tags WHERE job_tags.job_id = jobs.job_id AND job_tags.tag = $6))"
    };
}

macro_rules! page {
    ($dialect:ident) => {
        "\n    ORDER BY jobs.job_id LIMIT $2"
    };
}

const JOB: Statement = statement!("-- job(job_id)\n    ", job_columns, "WHERE jobs.job_id = $1");

const JOBS: Statement = statement!(
    "-- jobs(after, limit, submission_id, state, model, tag)\n    ",
    job_columns,
    "WHERE true",
    filters,
    page
);

const JOBS_OF_SUBMISSION: Statement = statement!(
    "-- jobs_of_submission(after, limit, submission_id, state, model, tag)\n    ",
    job_columns,
    "WHERE jobs.submission_id = $3",
    filters,
    page
);

const JOBS_OF_SUBMISSION_IN_STATE: Statement = statement!(
    "-- jobs_of_submission_in_state(after, limit, submission_id, state, model, tag)\n    ",
    job_columns,
    "WHERE jobs.submission_id = $3 AND jobs.state = $4",
    filters,
    page
);

const JOBS_IN_STATE: Statement = statement!(
    "-- jobs_in_state(after, limit, submission_id, state, model, tag)\n    ",
    job_columns,
    "WHERE jobs.state = $4",
    filters,
    page
);

const JOBS_OF_MODEL: Statement = statement!(
    "-- jobs_of_model(after, limit, submission_id, state, model, tag)\n    ",
    job_columns,
    "WHERE jobs.model = $5",
    filters,
    page
);

const JOBS_WITH_TAG: Statement = statement!(
    "-- jobs_with_tag(after, limit, submission_id, state, model, tag)\n    ",
    job_columns,
    "JOIN job_tags AS by_tag ON by_tag.job_id = jobs.job_id WHERE by_tag.tag = $6 AND by_tag.job_id > $1",
    filters,
    "\n    ORDER BY by_tag.job_id LIMIT $2"
);

pub(super) async fn job(store: &SqlStore, job: JobId) -> Result<Option<JobView>> {
    let row: Option<JobRow> = store.driver.fetch_optional(&JOB, arguments![job]).await?;
    Ok(row.map(JobView::from))
}

pub(super) async fn jobs(store: &SqlStore, filter: &JobFilter) -> Result<Vec<JobView>> {
    // Read by the index of the filter that leaves the fewest; the others are checked row by row.
    let statement = match filter {
        JobFilter { submission_id: Some(_), state: Some(_), .. } => &JOBS_OF_SUBMISSION_IN_STATE,
        JobFilter { submission_id: Some(_), .. } => &JOBS_OF_SUBMISSION,
        JobFilter { tag: Some(_), .. } => &JOBS_WITH_TAG,
        JobFilter { state: Some(_), .. } => &JOBS_IN_STATE,
        JobFilter { model: Some(_), .. } => &JOBS_OF_MODEL,
        _ => &JOBS,
    };
    let arguments = arguments![
        filter.after.unwrap_or(JobId(Uuid::nil())),
        i64::from(filter.limit),
        filter.submission_id,
        filter.state,
        filter.model.clone(),
        filter.tag.clone(),
    ];
    let rows: Vec<JobRow> = store.driver.fetch(statement, arguments).await?;
    Ok(rows.into_iter().map(JobView::from).collect())
}

#[derive(Debug, sqlx::FromRow)]
struct SubmissionRow {
    submission_id: SubmissionId,
    name: Option<String>,
    created_at: Moment,
}

const SUBMISSION: Statement = statement!(
    "-- submission(submission_id)
    SELECT submission_id, name, created_at FROM submissions WHERE submission_id = $1"
);

const SUBMISSIONS: Statement = statement!(
    "-- submissions(before, limit)
    SELECT submission_id, name, created_at FROM submissions WHERE submission_id < $1
    ORDER BY submission_id DESC LIMIT $2"
);

pub(super) async fn submission(store: &SqlStore, submission: SubmissionId) -> Result<Option<SubmissionView>> {
    let row = store.driver.fetch(&SUBMISSION, arguments![submission]).await?;
    Ok(with_counters(store, row).await?.pop())
}

pub(super) async fn submissions(
    store: &SqlStore,
    before: Option<SubmissionId>,
    limit: u32,
) -> Result<Vec<SubmissionView>> {
    let before = before.unwrap_or(SubmissionId(Uuid::max()));
    let rows = store.driver.fetch(&SUBMISSIONS, arguments![before, i64::from(limit)]).await?;
    with_counters(store, rows).await
}

async fn with_counters(store: &SqlStore, rows: Vec<SubmissionRow>) -> Result<Vec<SubmissionView>> {
    let scopes: Vec<SubmissionId> = rows.iter().map(|row| row.submission_id).collect();
    if scopes.is_empty() {
        return Ok(Vec::new());
    }
    let tallies = counters::read(&store.driver, &scopes).await?;
    let view = |row: SubmissionRow| view(&tallies.get(&row.submission_id).copied().unwrap_or_default(), row);
    Ok(rows.into_iter().map(view).collect())
}

fn view(tally: &Tally, row: SubmissionRow) -> SubmissionView {
    let counters = tally.counters();
    let rate = tally.rate(row.created_at.0);
    let left = (counters.total() - counters.finished()) as f64;
    SubmissionView {
        submission_id: row.submission_id,
        name: row.name,
        created_at: row.created_at.0,
        finished_at: tally.finished_at(),
        counters,
        rate,
        eta_seconds: rate.filter(|_| left > 0.0).map(|rate| left / rate),
    }
}

pub(super) async fn totals(store: &SqlStore) -> Result<Counters> {
    let tallies = counters::read(&store.driver, &[FARM]).await?;
    Ok(tallies.get(&FARM).copied().unwrap_or_default().counters())
}
