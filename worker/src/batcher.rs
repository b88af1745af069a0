//! Which rows share the next denoising pass: plain values in, plain values out.
//!
//! Rows are served in the order they came, one batch key at a time, with two exceptions: interactive
//! rows go first, and a row that has waited for [`Batcher`]'s patience counts as interactive, whatever
//! its lane. So a stream of rows of one key never starves another key, nor one lane the other.

use std::collections::{BTreeMap, HashMap};
use std::time::{Duration, Instant};

use engine::RowId;
use farm::batch_key::BatchKey;
use farm::id::JobId;
use farm::job::Lane;

/// A job's place on the device.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Row {
    pub(crate) job_id: JobId,
    pub(crate) key: BatchKey,
    pub(crate) lane: Lane,
    pub(crate) arrived: Instant,
    /// Whether it has joined a running batch.
    pub(crate) running: bool,
}

/// What to do at a step boundary: let `join` in, then step the rows of `key`.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Plan {
    pub(crate) key: BatchKey,
    pub(crate) join: Vec<RowId>,
}

/// Every row on the device, waiting or running.
#[derive(Debug)]
pub(crate) struct Batcher {
    max_batch: usize,
    patience: Duration,
    /// By id, which is the order of arrival.
    rows: BTreeMap<RowId, Row>,
    next_id: RowId,
    /// The key stepped last.
    current: Option<BatchKey>,
    /// Rows that fit into memory, where more have been seen not to.
    fitting: HashMap<BatchKey, usize>,
}

impl Batcher {
    /// A batcher of at most `max_batch` rows a pass, in which no row waits behind later ones of
    /// another key or lane for longer than `patience`.
    pub(crate) fn new(max_batch: usize, patience: Duration) -> Self {
        Self {
            max_batch: max_batch.max(1),
            patience,
            rows: BTreeMap::new(),
            next_id: 0,
            current: None,
            fitting: HashMap::new(),
        }
    }

    /// Adds a waiting row.
    pub(crate) fn add(&mut self, job_id: JobId, key: BatchKey, lane: Lane, now: Instant) -> RowId {
        let id = self.next_id;
        self.next_id += 1;
        self.rows.insert(id, Row { job_id, key, lane, arrived: now, running: false });
        id
    }

    /// Takes a row out.
    pub(crate) fn remove(&mut self, row: RowId) -> Option<Row> {
        self.rows.remove(&row)
    }

    /// Takes all rows out that have not joined a batch.
    pub(crate) fn take_waiting(&mut self) -> Vec<(RowId, Row)> {
        self.rows.extract_if(.., |_, row| !row.running).collect()
    }

    /// A row by its id.
    pub(crate) fn row(&self, row: RowId) -> Option<&Row> {
        self.rows.get(&row)
    }

    /// A job's row.
    pub(crate) fn row_of(&self, job: JobId) -> Option<RowId> {
        self.rows.iter().find(|(_, row)| row.job_id == job).map(|(id, _)| *id)
    }

    /// Whether there are no rows.
    pub(crate) fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// The rows of a key that have joined, in order of arrival.
    pub(crate) fn running(&self, key: &BatchKey) -> Vec<RowId> {
        self.rows.iter().filter(|(_, row)| row.running && row.key == *key).map(|(id, _)| *id).collect()
    }

    /// The rows that have not joined, in order of arrival.
    pub(crate) fn waiting(&self) -> Vec<RowId> {
        self.rows.iter().filter(|(_, row)| !row.running).map(|(id, _)| *id).collect()
    }

    /// Rows of a key that may share a pass.
    pub(crate) fn limit(&self, key: &BatchKey) -> usize {
        self.fitting.get(key).map_or(self.max_batch, |fitting| self.max_batch.min(*fitting))
    }

    /// Remembers that no more than `rows` rows of a key fit into memory.
    pub(crate) fn learn_limit(&mut self, key: &BatchKey, rows: usize) {
        let fitting = self.fitting.entry(key.clone()).or_insert(usize::MAX);
        *fitting = rows.clamp(1, *fitting);
    }

    /// A row that was to join could not: it waits on.
    pub(crate) fn put_back(&mut self, row: RowId) {
        if let Some(row) = self.rows.get_mut(&row) {
            row.running = false;
        }
    }

    /// What to do at this step boundary; `None` without rows. Marks the joining rows as running.
    pub(crate) fn plan(&mut self, now: Instant) -> Option<Plan> {
        let urgent = |row: &Row| row.lane == Lane::Interactive || now.duration_since(row.arrived) >= self.patience;
        let oldest_urgent = self.rows.values().find(|row| urgent(row)).map(|row| &row.key);
        let current =
            || self.current.as_ref().filter(|key| self.rows.values().any(|row| row.running && row.key == **key));
        let oldest = || self.rows.values().next().map(|row| &row.key);
        let key = oldest_urgent.or_else(current).or_else(oldest)?.clone();

        let free = self.limit(&key).saturating_sub(self.running(&key).len());
        let mut waiting: Vec<_> = self
            .rows
            .iter()
            .filter(|(_, row)| !row.running && row.key == key)
            .map(|(id, row)| (!urgent(row), *id))
            .collect();
        waiting.sort_unstable();
        let join: Vec<_> = waiting.into_iter().take(free).map(|(_, id)| id).collect();
        for id in &join {
            self.rows.get_mut(id).expect("the row was just seen").running = true;
        }
        self.current = Some(key.clone());
        Some(Plan { key, join })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATIENCE: Duration = Duration::from_secs(60);

    fn key(width: u32) -> BatchKey {
        BatchKey { model: "demo".into(), width, height: 64 }
    }

    struct Bench {
        batcher: Batcher,
        start: Instant,
    }

    impl Bench {
        fn new(max_batch: usize) -> Self {
            Self { batcher: Batcher::new(max_batch, PATIENCE), start: Instant::now() }
        }

        fn at(&self, seconds: u64) -> Instant {
            self.start + Duration::from_secs(seconds)
        }

        fn add(&mut self, width: u32, lane: Lane, seconds: u64) -> RowId {
            let at = self.at(seconds);
            self.batcher.add(JobId::new(), key(width), lane, at)
        }

        fn plan(&mut self, seconds: u64) -> (u32, Vec<RowId>) {
            let at = self.at(seconds);
            let plan = self.batcher.plan(at).expect("there are rows");
            (plan.key.width, plan.join)
        }
    }

    #[test]
    fn without_rows_there_is_nothing_to_do() {
        let mut bench = Bench::new(4);
        assert_eq!(bench.batcher.plan(bench.start), None);
    }

    #[test]
    fn rows_join_in_order_up_to_the_batch_size_and_later_as_others_leave() {
        let mut bench = Bench::new(2);
        let rows: Vec<_> = (0..3).map(|_| bench.add(64, Lane::Bulk, 0)).collect();
        assert_eq!(bench.plan(0), (64, rows[..2].to_vec()));
        assert_eq!(bench.plan(1), (64, vec![]));
        assert_eq!(bench.batcher.waiting(), rows[2..]);
        bench.batcher.remove(rows[0]);
        assert_eq!(bench.plan(2), (64, vec![rows[2]]));
        assert_eq!(bench.batcher.running(&key(64)), rows[1..]);
    }

    #[test]
    fn an_interactive_row_joins_before_bulk_rows_that_came_first() {
        let mut bench = Bench::new(1);
        bench.add(64, Lane::Bulk, 0);
        let urgent = bench.add(64, Lane::Interactive, 1);
        assert_eq!(bench.plan(1), (64, vec![urgent]));
    }

    #[test]
    fn an_interactive_row_of_another_key_suspends_a_running_batch() {
        let mut bench = Bench::new(4);
        let bulk = bench.add(64, Lane::Bulk, 0);
        assert_eq!(bench.plan(0), (64, vec![bulk]));
        let urgent = bench.add(32, Lane::Interactive, 1);
        assert_eq!(bench.plan(1), (32, vec![urgent]));
        assert_eq!(bench.plan(2), (32, vec![]));
        bench.batcher.remove(urgent);
        assert_eq!(bench.plan(3), (64, vec![]));
    }

    #[test]
    fn a_stream_of_one_key_starves_another_for_no_longer_than_the_patience() {
        let mut bench = Bench::new(2);
        bench.add(64, Lane::Bulk, 0);
        bench.add(64, Lane::Bulk, 0);
        let other = bench.add(32, Lane::Bulk, 0);
        for second in 0..60 {
            assert_eq!(bench.plan(second).0, 64, "second {second}");
            // The oldest row leaves and a new one of the same key comes: this batch never runs dry.
            let oldest = bench.batcher.running(&key(64))[0];
            bench.batcher.remove(oldest);
            bench.add(64, Lane::Bulk, second);
        }
        assert_eq!(bench.plan(60), (32, vec![other]));
    }

    #[test]
    fn a_bulk_row_that_waited_for_the_patience_goes_before_later_interactive_rows() {
        let mut bench = Bench::new(1);
        let bulk = bench.add(64, Lane::Bulk, 0);
        let urgent = bench.add(64, Lane::Interactive, 59);
        assert_eq!(bench.plan(59), (64, vec![urgent]));
        bench.batcher.remove(urgent);
        bench.add(64, Lane::Interactive, 60);
        assert_eq!(bench.plan(60), (64, vec![bulk]));
    }

    #[test]
    fn a_learnt_limit_holds_for_its_key_alone_and_never_grows() {
        let mut bench = Bench::new(8);
        bench.batcher.learn_limit(&key(64), 4);
        bench.batcher.learn_limit(&key(64), 6);
        assert_eq!((bench.batcher.limit(&key(64)), bench.batcher.limit(&key(32))), (4, 8));
        bench.batcher.learn_limit(&key(64), 0);
        assert_eq!(bench.batcher.limit(&key(64)), 1);
        for _ in 0..3 {
            bench.add(64, Lane::Bulk, 0);
        }
        assert_eq!(bench.plan(0).1.len(), 1);
    }

    #[test]
    fn waiting_rows_can_be_taken_back_and_running_ones_stay() {
        let mut bench = Bench::new(1);
        let first = bench.add(64, Lane::Bulk, 0);
        let second = bench.add(64, Lane::Bulk, 0);
        bench.plan(0);
        let taken: Vec<_> = bench.batcher.take_waiting().into_iter().map(|(id, _)| id).collect();
        assert_eq!(taken, [second]);
        assert_eq!(bench.batcher.running(&key(64)), [first]);
    }
}
