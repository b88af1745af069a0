//! The fleet: heartbeats, who is alive, and who serves what.

use std::collections::HashMap;
use std::time::Duration;

use chrono::TimeDelta;

use super::columns::Moment;
use super::driver::{Statement, Transaction, arguments, statement};
use super::sql::SqlStore;
use super::{Decide, Heartbeat, Result, StoreSettings, WorkerStatus, WorkerView, attempts, dispatch};
use crate::fleet::TextStatus;
use crate::id::{JobId, WorkerId};
use crate::job::Lease;

/// Workers silent for longer are not listed.
const FORGOTTEN_AFTER: TimeDelta = TimeDelta::days(1);

const RECORD_WORKER: Statement = statement!(
    "-- record_worker(worker_id, host, device, serving, warm, draining, rows, done, failed, loads, embedding_hits,
    --               embedding_misses, embedding_bytes, encoder_reads, encoder_bytes, now)
    INSERT INTO workers (worker_id, host, device, serving, warm, draining, batch_rows, done, failed, loads,
                         embedding_hits, embedding_misses, embedding_bytes, encoder_reads, encoder_bytes,
                         started_at, last_seen)
    VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $16)
    ON CONFLICT (worker_id) DO UPDATE SET
        host = excluded.host, device = excluded.device, serving = excluded.serving, warm = excluded.warm,
        draining = excluded.draining, batch_rows = excluded.batch_rows, done = excluded.done,
        failed = excluded.failed, loads = excluded.loads, embedding_hits = excluded.embedding_hits,
        embedding_misses = excluded.embedding_misses, embedding_bytes = excluded.embedding_bytes,
        encoder_reads = excluded.encoder_reads, encoder_bytes = excluded.encoder_bytes,
        last_seen = excluded.last_seen"
);

// On Postgres the rows are locked in id order first: a worker renews and finishes at the same time. The
// plus keeps SQLite from reading all that are leased.
const RENEW_LEASES: Statement = statement!("-- renew_leases(leases, now, expires_at)\n    ", {
    "WITH held AS (
        SELECT jobs.job_id
        FROM jsonb_to_recordset($1::jsonb) AS given(job_id uuid, token uuid)
        JOIN jobs ON jobs.job_id = given.job_id
        WHERE jobs.state = 'leased' AND jobs.token = given.token AND jobs.expires_at > $2
        ORDER BY jobs.job_id FOR UPDATE OF jobs
    )
    UPDATE jobs SET expires_at = $3 FROM held WHERE jobs.job_id = held.job_id
    RETURNING jobs.job_id, jobs.cancel_requested"
        | "UPDATE jobs SET expires_at = $3
    FROM (SELECT value ->> 'job_id' AS job_id, value ->> 'token' AS token FROM json_each($1)) AS given
    WHERE jobs.job_id = given.job_id AND +jobs.state = 'leased' AND jobs.token = given.token AND jobs.expires_at > $2
    RETURNING job_id, cancel_requested"
});

pub(super) async fn heartbeat(
    store: &SqlStore,
    status: &WorkerStatus,
    leases: &[Lease],
    lease: Duration,
) -> Result<Heartbeat> {
    let (mut transaction, now) = store.begin().await?;
    let arguments = arguments![
        status.worker_id.0.clone(),
        status.host.clone(),
        status.device.clone(),
        status.serving.clone(),
        status.warm.clone(),
        status.draining,
        i64::from(status.rows),
        status.done as i64,
        status.failed as i64,
        status.loads as i64,
        status.text.embedding_hits as i64,
        status.text.embedding_misses as i64,
        status.text.embedding_bytes as i64,
        status.text.encoder_reads as i64,
        status.text.encoder_bytes as i64,
        now,
    ];
    transaction.execute(&RECORD_WORKER, arguments).await?;
    let mut renewed: HashMap<JobId, bool> = HashMap::new();
    if !leases.is_empty() {
        let arguments = arguments![attempts::given(leases), now, Moment(now.0 + lease)];
        let rows: Vec<(JobId, bool)> = transaction.fetch(&RENEW_LEASES, arguments).await?;
        renewed.extend(rows);
    }
    transaction.commit().await?;
    let jobs = leases.iter().map(|lease| lease.job_id);
    Ok(Heartbeat {
        lost: jobs.clone().filter(|job| !renewed.contains_key(job)).collect(),
        cancelled: jobs.filter(|job| renewed.get(job) == Some(&true)).collect(),
    })
}

const SAY_GOODBYE: Statement = statement!(
    "-- say_goodbye(worker_id, now)
    UPDATE workers SET left_at = $2, last_seen = $2 WHERE worker_id = $1 AND left_at IS NULL"
);

// Each start of a worker is a row of its own: the old ones go with those that leave.
const FORGET_WORKERS: Statement = statement!(
    "-- forget_workers(last_seen_before)
    DELETE FROM workers WHERE last_seen < $1"
);

pub(super) async fn goodbye(store: &SqlStore, worker: &WorkerId) -> Result<()> {
    let (mut transaction, now) = store.begin().await?;
    transaction.execute(&SAY_GOODBYE, arguments![worker.0.clone(), now]).await?;
    transaction.execute(&FORGET_WORKERS, arguments![Moment(now.0 - FORGOTTEN_AFTER)]).await?;
    transaction.commit().await
}

#[derive(Debug, sqlx::FromRow)]
struct WorkerRow {
    worker_id: String,
    host: String,
    device: String,
    serving: Option<String>,
    warm: Option<String>,
    draining: bool,
    batch_rows: i64,
    done: i64,
    failed: i64,
    loads: i64,
    embedding_hits: i64,
    embedding_misses: i64,
    embedding_bytes: i64,
    encoder_reads: i64,
    encoder_bytes: i64,
    started_at: Moment,
    last_seen: Moment,
    left_at: Option<Moment>,
}

impl WorkerRow {
    fn view(self, settings: &StoreSettings, now: Moment) -> WorkerView {
        let silence = (now.0 - self.last_seen.0).to_std().unwrap_or_default();
        WorkerView {
            status: WorkerStatus {
                worker_id: WorkerId(self.worker_id),
                host: self.host,
                device: self.device,
                serving: self.serving,
                warm: self.warm,
                draining: self.draining,
                rows: self.batch_rows as u32,
                done: self.done as u64,
                failed: self.failed as u64,
                loads: self.loads as u64,
                text: TextStatus {
                    embedding_hits: self.embedding_hits as u64,
                    embedding_misses: self.embedding_misses as u64,
                    embedding_bytes: self.embedding_bytes as u64,
                    encoder_reads: self.encoder_reads as u64,
                    encoder_bytes: self.encoder_bytes as u64,
                },
            },
            started_at: self.started_at.0,
            last_seen: self.last_seen.0,
            alive: self.left_at.is_none() && silence <= settings.worker_timeout,
        }
    }
}

const WORKERS: Statement = statement!(
    "-- workers(last_seen_after)
    SELECT worker_id, host, device, serving, warm, draining, batch_rows, done, failed, loads,
           embedding_hits, embedding_misses, embedding_bytes, encoder_reads, encoder_bytes,
           started_at, last_seen, left_at
    FROM workers WHERE last_seen > $1 ORDER BY worker_id"
);

fn views(rows: Vec<WorkerRow>, settings: &StoreSettings, now: Moment) -> Vec<WorkerView> {
    let mut views: Vec<WorkerView> = rows.into_iter().map(|row| row.view(settings, now)).collect();
    // The sort is stable: by name within the living and the dead.
    views.sort_by_key(|view| !view.alive);
    views
}

pub(super) async fn workers(store: &SqlStore) -> Result<Vec<WorkerView>> {
    let now = store.now();
    let rows = store.driver.fetch(&WORKERS, arguments![Moment(now.0 - FORGOTTEN_AFTER)]).await?;
    Ok(views(rows, &store.settings, now))
}

/// The workers as a transaction sees them.
pub(super) async fn within(
    transaction: &mut Transaction,
    settings: &StoreSettings,
    now: Moment,
) -> Result<Vec<WorkerView>> {
    let rows = transaction.fetch(&WORKERS, arguments![Moment(now.0 - FORGOTTEN_AFTER)]).await?;
    Ok(views(rows, settings, now))
}

// Nobody else decides until this transaction ends. The number has no meaning but to be this lock's.
const LOCK_PLACEMENT: Statement = statement!("-- lock_placement()\n    ", {
    "SELECT true FROM (SELECT pg_advisory_xact_lock(7203918)) AS lock" | "SELECT true"
});

const RECORD_SERVING: Statement = statement!(
    "-- record_serving(worker_id, serving, now)
    INSERT INTO workers (worker_id, host, device, serving, started_at, last_seen) VALUES ($1, '', '', $2, $3, $3)
    ON CONFLICT (worker_id) DO UPDATE SET serving = excluded.serving"
);

pub(super) async fn place(store: &SqlStore, worker: &WorkerId, decide: Decide<'_>) -> Result<Option<String>> {
    let mut transaction = store.driver.begin().await?;
    let _locked: Vec<(bool,)> = transaction.fetch(&LOCK_PLACEMENT, arguments![]).await?;
    let now = store.now();
    let demand = dispatch::demand_within(&mut transaction, now).await?;
    let fleet = within(&mut transaction, &store.settings, now).await?;
    let serving = decide(&demand, &fleet, now.0);
    transaction.execute(&RECORD_SERVING, arguments![worker.0.clone(), serving.clone(), now]).await?;
    transaction.commit().await?;
    Ok(serving)
}
