//! How many jobs stand where, kept up to date by every transaction that moves jobs, for each submission
//! and for the whole farm. Split over shards, so that transactions do not queue on one row; signed,
//! since a job may enter through one shard and leave through another; summed when read.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use serde::Serialize;
use uuid::Uuid;

use super::Result;
use super::columns::Moment;
use super::driver::{Driver, Statement, Transaction, arguments, given_ids, json_list, statement};
use crate::id::SubmissionId;
use crate::job::{Counters, JobState};

/// The scope that counts the jobs of all submissions.
pub(super) const FARM: SubmissionId = SubmissionId(Uuid::nil());

/// Rows that a count is split over where several transactions write at once.
const SHARDS: i32 = 16;

/// Moves of jobs that a transaction has made and not yet counted.
#[derive(Debug, Default)]
pub(super) struct Moves(BTreeMap<SubmissionId, [i64; JobState::ALL.len()]>);

impl Moves {
    /// So many jobs have come into being.
    pub(super) fn add(&mut self, submission: SubmissionId, state: JobState, jobs: i64) {
        for scope in [FARM, submission] {
            self.0.entry(scope).or_default()[state as usize] += jobs;
        }
    }

    /// So many jobs have moved.
    pub(super) fn shift(&mut self, submission: SubmissionId, from: JobState, to: JobState, jobs: i64) {
        self.add(submission, from, -jobs);
        self.add(submission, to, jobs);
    }

    /// Submissions in which more jobs have failed, and how many more.
    pub(super) fn failing(&self) -> Vec<(SubmissionId, u64)> {
        let failed =
            |counts: &[i64; JobState::ALL.len()]| u64::try_from(counts[JobState::Failed as usize]).unwrap_or(0);
        let submissions = self.0.iter().filter(|(scope, _)| **scope != FARM);
        submissions.map(|(scope, counts)| (*scope, failed(counts))).filter(|(_, failed)| *failed > 0).collect()
    }

    /// Counts the moves. In order of scope, so that no two transactions wait for each other.
    pub(super) async fn count(self, transaction: &mut Transaction, now: Moment) -> Result<()> {
        let rows: Vec<Delta> = self.0.into_iter().filter_map(|(scope, counts)| Delta::of(scope, counts)).collect();
        if rows.is_empty() {
            return Ok(());
        }
        let shard = match transaction {
            Transaction::Postgres(_) => rand::random_range(0..SHARDS),
            Transaction::Sqlite(_) => 0,
        };
        let minute = now.0.timestamp().div_euclid(60);
        transaction.execute(&ADD_TO_COUNTERS, arguments![json_list(&rows), shard, now, minute]).await?;
        Ok(())
    }
}

/// What a transaction changes in the counts of one scope.
#[derive(Debug, Serialize)]
struct Delta {
    scope: SubmissionId,
    pending: i64,
    queued: i64,
    leased: i64,
    done: i64,
    failed: i64,
    cancelled: i64,
}

impl Delta {
    fn of(scope: SubmissionId, counts: [i64; JobState::ALL.len()]) -> Option<Self> {
        let [pending, queued, leased, done, failed, cancelled] = counts;
        let delta = Self { scope, pending, queued, leased, done, failed, cancelled };
        counts.iter().any(|count| *count != 0).then_some(delta)
    }
}

const ADD_TO_COUNTERS: Statement = statement!(
    "-- add_to_counters(deltas, shard, now, minute)
    INSERT INTO counters AS mine (scope, shard, pending, queued, leased, done, failed, cancelled,
                                  finished_at, minute, minute_done, before_done)
    SELECT delta.scope, $2, delta.pending, delta.queued, delta.leased, delta.done, delta.failed, delta.cancelled,
           CASE WHEN delta.done > 0 OR delta.failed > 0 OR delta.cancelled > 0 THEN $3 END,
           CASE WHEN delta.done > 0 THEN $4 ELSE 0 END,
           CASE WHEN delta.done > 0 THEN delta.done ELSE 0 END,
           0
    FROM ",
    {
        "jsonb_to_recordset($1::jsonb) AS delta(scope uuid, pending bigint, queued bigint, leased bigint,
                                             done bigint, failed bigint, cancelled bigint)"
            | "(SELECT value ->> 'scope' AS scope, value ->> 'pending' AS pending, value ->> 'queued' AS queued,
               value ->> 'leased' AS leased, value ->> 'done' AS done, value ->> 'failed' AS failed,
               value ->> 'cancelled' AS cancelled FROM json_each($1)) AS delta"
    },
    " WHERE true
    ORDER BY delta.scope
    ON CONFLICT (scope, shard) DO UPDATE SET
        pending = mine.pending + excluded.pending,
        queued = mine.queued + excluded.queued,
        leased = mine.leased + excluded.leased,
        done = mine.done + excluded.done,
        failed = mine.failed + excluded.failed,
        cancelled = mine.cancelled + excluded.cancelled,
        finished_at = coalesce(excluded.finished_at, mine.finished_at),
        minute = CASE WHEN excluded.minute > mine.minute THEN excluded.minute ELSE mine.minute END,
        minute_done = CASE WHEN excluded.minute > mine.minute THEN excluded.minute_done
                           ELSE mine.minute_done + excluded.minute_done END,
        before_done = CASE WHEN excluded.minute = mine.minute + 1 THEN mine.minute_done
                           WHEN excluded.minute > mine.minute THEN 0
                           ELSE mine.before_done END"
);

/// One shard of a scope's counts.
#[derive(Clone, Copy, Debug, sqlx::FromRow)]
struct ShardRow {
    scope: SubmissionId,
    pending: i64,
    queued: i64,
    leased: i64,
    done: i64,
    failed: i64,
    cancelled: i64,
    finished_at: Option<Moment>,
    minute: i64,
    minute_done: i64,
    before_done: i64,
}

const COUNTER_SHARDS: Statement = statement!(
    "-- counter_shards(scopes)
    SELECT scope, pending, queued, leased, done, failed, cancelled, finished_at, minute, minute_done, before_done
    FROM counters WHERE scope IN ",
    given_ids
);

/// A scope's counts, summed over its shards.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Tally {
    sums: [i64; JobState::ALL.len()],
    /// When a job last became final.
    last_final: Option<DateTime<Utc>>,
    minute: i64,
    minute_done: i64,
    before_done: i64,
}

impl Tally {
    fn add(&mut self, row: &ShardRow) {
        let counts = [row.pending, row.queued, row.leased, row.done, row.failed, row.cancelled];
        for (sum, count) in self.sums.iter_mut().zip(counts) {
            *sum += count;
        }
        self.last_final = self.last_final.max(row.finished_at.map(|moment| moment.0));
        // Shards may have seen their last job in different minutes.
        let minute = self.minute.max(row.minute);
        let (mine_now, mine_before) = recent((self.minute, self.minute_done, self.before_done), minute);
        let (its_now, its_before) = recent((row.minute, row.minute_done, row.before_done), minute);
        (self.minute, self.minute_done, self.before_done) = (minute, mine_now + its_now, mine_before + its_before);
    }

    pub(super) fn counters(&self) -> Counters {
        let [pending, queued, leased, done, failed, cancelled] = self.sums.map(|sum| sum.max(0) as u64);
        Counters { pending, queued, leased, done, failed, cancelled }
    }

    /// When the last of the jobs became final; `None` while any is not.
    pub(super) fn finished_at(&self) -> Option<DateTime<Utc>> {
        let counters = self.counters();
        self.last_final.filter(|_| counters.finished() == counters.total())
    }

    /// Done jobs per second over the last minute in which any were, and the part of the minute before it:
    /// one to two minutes, less if the submission is younger.
    pub(super) fn rate(&self, created_at: DateTime<Utc>) -> Option<f64> {
        let done = self.minute_done + self.before_done;
        let window_start = DateTime::from_timestamp((self.minute - 1) * 60, 0)?.max(created_at);
        // A job that failed long after says nothing about the rate.
        let window_end = DateTime::from_timestamp((self.minute + 1) * 60, 0)?.min(self.last_final?);
        let seconds = (window_end - window_start).as_seconds_f64();
        // Jobs that were done within a second tell no more than "so many a second".
        (done > 0).then(|| done as f64 / seconds.max(1.0))
    }
}

/// Of `(minute, done in it, done in the minute before)`, what falls into `minute` and the one before it.
fn recent((last, last_done, before_done): (i64, i64, i64), minute: i64) -> (i64, i64) {
    match minute - last {
        0 => (last_done, before_done),
        1 => (0, last_done),
        _ => (0, 0),
    }
}

fn sum(rows: &[ShardRow]) -> BTreeMap<SubmissionId, Tally> {
    let mut tallies: BTreeMap<SubmissionId, Tally> = BTreeMap::new();
    for row in rows {
        tallies.entry(row.scope).or_default().add(row);
    }
    tallies
}

/// The counts of each scope.
pub(super) async fn read(driver: &Driver, scopes: &[SubmissionId]) -> Result<BTreeMap<SubmissionId, Tally>> {
    Ok(sum(&driver.fetch(&COUNTER_SHARDS, arguments![json_list(scopes)]).await?))
}

/// The counts of a scope as a transaction sees them, its own moves included.
pub(super) async fn read_within(transaction: &mut Transaction, scope: SubmissionId) -> Result<Counters> {
    let rows = transaction.fetch(&COUNTER_SHARDS, arguments![json_list(&[scope])]).await?;
    Ok(sum(&rows).get(&scope).copied().unwrap_or_default().counters())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(minute: i64, minute_done: i64, before_done: i64) -> ShardRow {
        let finished_at = (minute > 0).then(|| Moment(DateTime::from_timestamp(minute * 60 + 30, 0).unwrap()));
        let done = minute_done + before_done;
        ShardRow {
            scope: FARM,
            pending: -done,
            queued: 0,
            leased: 0,
            done,
            failed: 0,
            cancelled: 0,
            finished_at,
            minute,
            minute_done,
            before_done,
        }
    }

    #[test]
    fn shards_are_summed_minute_by_minute() {
        let tally = sum(&[row(100, 5, 7), row(99, 11, 13), row(50, 1000, 0), row(0, 0, 0)])[&FARM];
        assert_eq!((tally.minute, tally.minute_done, tally.before_done), (100, 5, 7 + 11));
        assert_eq!(tally.sums[JobState::Done as usize], 5 + 7 + 11 + 13 + 1000);
    }

    #[test]
    fn the_rate_covers_the_last_minute_with_done_jobs_and_the_one_before() {
        let tally = sum(&[row(100, 30, 60)])[&FARM];
        let long_ago = DateTime::from_timestamp(0, 0).unwrap();
        assert_eq!(tally.rate(long_ago), Some(1.0), "90 jobs in the 90 s from the start of minute 99");
        let young = DateTime::from_timestamp(100 * 60 + 20, 0).unwrap();
        assert_eq!(tally.rate(young), Some(9.0), "all of them in the 10 s since the submission");
        assert_eq!(Tally::default().rate(long_ago), None);
    }

    #[test]
    fn a_shard_below_zero_is_made_up_for_by_the_others() {
        let entered = ShardRow { pending: 10, done: 0, ..row(0, 0, 0) };
        let left = ShardRow { pending: -4, done: 4, ..row(100, 4, 0) };
        let counters = sum(&[entered, left])[&FARM].counters();
        assert_eq!((counters.pending, counters.done, counters.total()), (6, 4, 10));
    }

    #[test]
    fn moves_count_for_the_submission_and_for_the_farm() {
        let submission = SubmissionId::new();
        let mut moves = Moves::default();
        moves.shift(submission, JobState::Leased, JobState::Failed, 2);
        moves.shift(SubmissionId::new(), JobState::Leased, JobState::Done, 1);
        assert_eq!(moves.0[&FARM], [0, 0, -3, 1, 2, 0]);
        assert_eq!(moves.failing(), [(submission, 2)]);
    }
}
