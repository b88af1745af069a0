//! Storing a submission: chunk by chunk within one transaction.

use futures_util::StreamExt;
use serde::Serialize;

use super::columns::Moment;
use super::counters::Moves;
use super::driver::{Statement, Transaction, arguments, statement};
use super::sql::SqlStore;
use super::{JobStream, Result, StoreError, Submitted};
use crate::id::{JobId, SubmissionId};
use crate::job::{Idempotency, JobState, NewJob, NewSubmission};
use crate::spec::RenderSpec;

/// Jobs inserted by one statement at most.
const CHUNK_JOBS: usize = 2000;

/// Bytes of JSON in one statement from which no job is added to it.
const CHUNK_BYTES: usize = 2 << 20;

/// A job as `insert_jobs` unpacks it.
#[derive(Serialize)]
struct JobRow<'a> {
    job_id: JobId,
    job_index: u64,
    spec: &'a RenderSpec,
}

/// Jobs on their way into one statement, as a JSON list.
#[derive(Debug, Default)]
struct Chunk {
    json: String,
    jobs: usize,
    first_job: Option<JobId>,
    has_tags: bool,
}

impl Chunk {
    fn add(&mut self, job: &NewJob, job_index: u64) {
        let row = JobRow { job_id: job.id, job_index, spec: &job.spec };
        self.json.push(if self.jobs == 0 { '[' } else { ',' });
        self.json.push_str(&serde_json::to_string(&row).expect("a spec can be written as JSON"));
        self.jobs += 1;
        self.first_job = self.first_job.or(Some(job.id));
        self.has_tags |= !job.spec.tags.is_empty();
    }

    /// Reads the stream until it ends or the chunk is full.
    async fn read(jobs: &mut JobStream<'_>, first_index: u64) -> Result<Self> {
        let mut chunk = Self::default();
        while chunk.jobs < CHUNK_JOBS && chunk.json.len() < CHUNK_BYTES {
            let Some(job) = jobs.next().await else { break };
            chunk.add(&job.map_err(StoreError::Source)?, first_index + chunk.jobs as u64);
        }
        chunk.json.push(']');
        Ok(chunk)
    }
}

/// What a submission with an idempotency key was stored as.
#[derive(Debug, sqlx::FromRow)]
struct EarlierRow {
    submission_id: SubmissionId,
    request_hash: String,
    first_job: JobId,
}

impl EarlierRow {
    fn answer(self, idempotency: &Idempotency) -> Submitted {
        if self.request_hash == idempotency.request_hash {
            Submitted::Existing { submission_id: self.submission_id, first_job: self.first_job }
        } else {
            Submitted::Conflict
        }
    }
}

const SUBMISSION_BY_KEY: Statement = statement!(
    "-- submission_by_key(key)
    SELECT submission_id, request_hash, first_job FROM submissions WHERE idempotency_key = $1"
);

// Waits for a transaction that has inserted the same key a moment ago, and inserts nothing if that commits.
const INSERT_SUBMISSION: Statement = statement!(
    "-- insert_submission(submission_id, name, key, request_hash, max_attempts, failure_limit, jobs, first_job, now)
    INSERT INTO submissions (submission_id, name, idempotency_key, request_hash, max_attempts, failure_limit,
                             jobs, first_job, created_at)
    VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9)
    ON CONFLICT (idempotency_key) DO NOTHING"
);

const INSERT_JOBS: Statement = statement!(
    "-- insert_jobs(jobs, submission_id, max_attempts, now)
    INSERT INTO jobs (job_id, submission_id, job_index, spec, state, max_attempts, created_at, not_before)
    SELECT job.job_id, $2, job.job_index, job.spec, 'pending', $3, $4, $4
    FROM ",
    {
        "jsonb_to_recordset($1::jsonb) AS job(job_id uuid, job_index bigint, spec jsonb)"
            | "(SELECT value ->> 'job_id' AS job_id, value ->> 'job_index' AS job_index, value -> 'spec' AS spec
        FROM json_each($1)) AS job"
    }
);

const INSERT_TAGS: Statement = statement!(
    "-- insert_tags(jobs)
    INSERT INTO job_tags (tag, job_id)
    SELECT DISTINCT ",
    {
        "tag.value, job.job_id
    FROM jsonb_to_recordset($1::jsonb) AS job(job_id uuid, spec jsonb),
         jsonb_array_elements_text(job.spec -> 'tags') AS tag(value)"
            | "tag.value, job.value ->> 'job_id'
    FROM json_each($1) AS job, json_each(job.value, '$.spec.tags') AS tag"
    }
);

const SET_SUBMISSION_JOBS: Statement = statement!(
    "-- set_submission_jobs(submission_id, jobs)
    UPDATE submissions SET jobs = $2 WHERE submission_id = $1"
);

pub(super) async fn submit(store: &SqlStore, submission: &NewSubmission, mut jobs: JobStream<'_>) -> Result<Submitted> {
    // The first chunk is read before anything is locked: most submissions are no longer than it.
    let mut chunk = Chunk::read(&mut jobs, 0).await?;
    let Some(first_job) = chunk.first_job else {
        return Err(StoreError::Source("a submission must have at least 1 job, but has 0".into()));
    };
    let (mut transaction, now) = store.begin().await?;
    let arguments = arguments![
        submission.id,
        // Postgres cannot hold U+0000 in text.
        submission.name.as_ref().map(|name| name.replace('\0', "\u{fffd}")),
        submission.idempotency.as_ref().map(|idempotency| idempotency.key.clone()),
        submission.idempotency.as_ref().map(|idempotency| idempotency.request_hash.clone()),
        max_attempts(submission),
        submission.failure_limit.map(|limit| i64::try_from(limit).unwrap_or(i64::MAX)),
        chunk.jobs as i64,
        first_job,
        now,
    ];
    if transaction.execute(&INSERT_SUBMISSION, arguments).await? == 0 {
        return earlier(&mut transaction, submission).await;
    }
    let first_chunk = chunk.jobs as u64;
    let mut total = 0;
    while chunk.jobs > 0 {
        total += chunk.jobs as u64;
        // The next chunk is prepared while the database works on this one.
        let insert = insert_chunk(&mut transaction, submission, chunk, now);
        (_, chunk) = tokio::try_join!(insert, Chunk::read(&mut jobs, total))?;
    }
    if total > first_chunk {
        transaction.execute(&SET_SUBMISSION_JOBS, arguments![submission.id, total as i64]).await?;
    }
    let mut moves = Moves::default();
    moves.add(submission.id, JobState::Pending, total as i64);
    moves.count(&mut transaction, now).await?;
    transaction.commit().await?;
    Ok(Submitted::Created { jobs: total })
}

fn max_attempts(submission: &NewSubmission) -> i32 {
    i32::try_from(submission.max_attempts).unwrap_or(i32::MAX)
}

async fn insert_chunk(
    transaction: &mut Transaction,
    submission: &NewSubmission,
    chunk: Chunk,
    now: Moment,
) -> Result<()> {
    let tags = chunk.has_tags.then(|| chunk.json.clone());
    let arguments = arguments![chunk.json, submission.id, max_attempts(submission), now];
    transaction.execute(&INSERT_JOBS, arguments).await?;
    if let Some(json) = tags {
        transaction.execute(&INSERT_TAGS, arguments![json]).await?;
    }
    Ok(())
}

/// The submission that has the key: it is committed, or the insert would have waited for it.
async fn earlier(transaction: &mut Transaction, submission: &NewSubmission) -> Result<Submitted> {
    let idempotency = submission.idempotency.as_ref().expect("only a key can be in the way");
    let earlier: Option<EarlierRow> =
        transaction.fetch_optional(&SUBMISSION_BY_KEY, arguments![idempotency.key.clone()]).await?;
    let earlier = earlier.ok_or_else(|| StoreError::Internal("a submission's key is taken by none".into()))?;
    Ok(earlier.answer(idempotency))
}

pub(super) async fn find_idempotent(store: &SqlStore, idempotency: &Idempotency) -> Result<Option<Submitted>> {
    let earlier: Option<EarlierRow> =
        store.driver.fetch_optional(&SUBMISSION_BY_KEY, arguments![idempotency.key.clone()]).await?;
    Ok(earlier.map(|earlier| earlier.answer(idempotency)))
}
