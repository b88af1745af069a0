use std::collections::VecDeque;

use super::*;
use crate::fleet::{TextStatus, WorkerStatus};
use crate::message::QueueKey;

const BOUNDS: Bounds = Bounds { interactive: Duration::from_secs(5), bulk: Duration::from_secs(60) };

fn at(seconds: i64) -> DateTime<Utc> {
    DateTime::from_timestamp(1_800_000_000 + seconds, 0).unwrap()
}

fn id(worker: usize) -> WorkerId {
    WorkerId(format!("worker-{worker}"))
}

fn waits(model: &str, lane: Lane, waiting: u64, oldest: DateTime<Utc>) -> Demand {
    Demand { queue: QueueKey { model: model.into(), lane }, waiting, queued: waiting, oldest }
}

fn serves(worker: usize, model: Option<&str>) -> WorkerView {
    let status = WorkerStatus {
        worker_id: id(worker),
        host: "here".into(),
        device: "cpu".into(),
        serving: model.map(str::to_owned),
        warm: model.map(str::to_owned),
        draining: false,
        rows: 0,
        done: 0,
        failed: 0,
        loads: 0,
        text: TextStatus::default(),
    };
    WorkerView { status, started_at: at(0), last_seen: at(0), alive: true }
}

/// Worker 0 asks at second 100, having served its checkpoint for 100 seconds.
fn ask(serving: Option<&str>, demand: &[Demand], fleet: &[WorkerView]) -> Option<String> {
    let worker = id(0);
    let asker = Asker { worker: &worker, serving, since: at(0), warm: serving, has_waiting: false };
    choose(&asker, demand, fleet, at(100), &BOUNDS)
}

#[test]
fn without_demand_a_worker_stays_where_it_is() {
    assert_eq!(ask(None, &[], &[]), None);
    assert_eq!(ask(Some("a"), &[], &[serves(0, Some("a"))]).as_deref(), Some("a"));
}

#[test]
fn a_worker_stays_while_its_checkpoint_has_work_and_no_other_is_overdue() {
    let demand = [waits("a", Lane::Bulk, 1, at(99)), waits("b", Lane::Bulk, 9000, at(50))];
    assert_eq!(ask(Some("a"), &demand, &[serves(0, Some("a"))]).as_deref(), Some("a"));
}

#[test]
fn rows_in_hand_count_as_work_of_its_own() {
    let worker = id(0);
    let asker = Asker { worker: &worker, serving: Some("a"), since: at(0), warm: Some("a"), has_waiting: true };
    let demand = [waits("b", Lane::Bulk, 5, at(90))];
    assert_eq!(choose(&asker, &demand, &[], at(100), &BOUNDS).as_deref(), Some("a"));
    let later = choose(&asker, &demand, &[], at(151), &BOUNDS);
    assert_eq!(later.as_deref(), Some("b"));
}

#[test]
fn an_overdue_checkpoint_that_nobody_serves_calls_a_worker_away() {
    let demand = [waits("a", Lane::Bulk, 50, at(99)), waits("b", Lane::Bulk, 1, at(39))];
    assert_eq!(ask(Some("a"), &demand, &[serves(0, Some("a"))]).as_deref(), Some("b"));
}

#[test]
fn an_interactive_job_calls_sooner_than_a_bulk_job() {
    let waited = at(94);
    let bulk = [waits("a", Lane::Bulk, 50, at(99)), waits("b", Lane::Bulk, 1, waited)];
    let interactive = [waits("a", Lane::Bulk, 50, at(99)), waits("b", Lane::Interactive, 1, waited)];
    assert_eq!(ask(Some("a"), &bulk, &[]).as_deref(), Some("a"));
    assert_eq!(ask(Some("a"), &interactive, &[]).as_deref(), Some("b"));
}

#[test]
fn a_worker_that_has_just_moved_serves_its_turn_even_if_another_is_overdue() {
    let worker = id(0);
    let demand = [waits("a", Lane::Bulk, 500, at(0)), waits("b", Lane::Bulk, 500, at(0))];
    let asker = |since| Asker { worker: &worker, serving: Some("a"), since, warm: Some("a"), has_waiting: true };
    let choose_since = |since| choose(&asker(since), &demand, &[], at(1000), &BOUNDS);
    assert_eq!(choose_since(at(941)).as_deref(), Some("a"));
    assert_eq!(choose_since(at(939)).as_deref(), Some("b"));
}

#[test]
fn the_worker_that_can_be_spared_goes() {
    // b, b and a are served; c is overdue: one of b's workers goes, a's only worker stays.
    let demand =
        [waits("a", Lane::Bulk, 50, at(99)), waits("b", Lane::Bulk, 50, at(99)), waits("c", Lane::Bulk, 1, at(30))];
    let fleet = [serves(0, Some("a")), serves(1, Some("b")), serves(2, Some("b"))];
    assert_eq!(ask(Some("a"), &demand, &fleet).as_deref(), Some("a"));
    let fleet = [serves(0, Some("b")), serves(1, Some("b")), serves(2, Some("a"))];
    assert_eq!(ask(Some("b"), &demand, &fleet).as_deref(), Some("c"));
}

#[test]
fn an_overdue_backlog_that_is_served_takes_only_a_worker_that_leaves_another_behind() {
    let demand = [waits("a", Lane::Bulk, 10, at(99)), waits("b", Lane::Bulk, 5000, at(0))];
    let alone = [serves(0, Some("a")), serves(1, Some("b"))];
    assert_eq!(ask(Some("a"), &demand, &alone).as_deref(), Some("a"));
    let with_a_mate = [serves(0, Some("a")), serves(1, Some("b")), serves(2, Some("a"))];
    assert_eq!(ask(Some("a"), &demand, &with_a_mate).as_deref(), Some("b"));
}

#[test]
fn an_idle_worker_goes_where_nobody_serves_before_it_helps_out() {
    let demand = [waits("a", Lane::Bulk, 9000, at(0)), waits("b", Lane::Bulk, 1, at(99))];
    assert_eq!(ask(None, &demand, &[serves(1, Some("a"))]).as_deref(), Some("b"));
}

#[test]
fn an_idle_worker_prefers_its_warm_weights_until_another_is_overdue() {
    let worker = id(0);
    let asker = Asker { worker: &worker, serving: None, since: at(0), warm: Some("a"), has_waiting: false };
    let demand = [waits("a", Lane::Bulk, 1, at(99)), waits("b", Lane::Bulk, 50, at(60))];
    assert_eq!(choose(&asker, &demand, &[], at(100), &BOUNDS).as_deref(), Some("a"));
    assert_eq!(choose(&asker, &demand, &[], at(121), &BOUNDS).as_deref(), Some("b"));
}

#[test]
fn an_idle_worker_loads_no_weights_for_the_last_few_jobs_of_a_served_checkpoint() {
    let fleet = [serves(0, Some("a")), serves(1, Some("b"))];
    assert_eq!(ask(Some("a"), &[waits("b", Lane::Bulk, 8, at(99))], &fleet).as_deref(), Some("a"));
    assert_eq!(ask(Some("a"), &[waits("b", Lane::Bulk, 9, at(99))], &fleet).as_deref(), Some("b"));
}

#[test]
fn dead_and_draining_workers_serve_nobody() {
    let mut dead = serves(1, Some("b"));
    dead.alive = false;
    let mut draining = serves(2, Some("b"));
    draining.status.draining = true;
    let demand = [waits("b", Lane::Bulk, 1, at(99))];
    assert_eq!(ask(Some("a"), &demand, &[dead, draining]).as_deref(), Some("b"));
}

/// A farm in virtual seconds. Each worker renders `rate` jobs a second of what it serves; a move
/// costs `load` seconds.
struct Simulation {
    queues: BTreeMap<&'static str, VecDeque<i64>>,
    workers: Vec<Simulated>,
    load: i64,
    rate: usize,
    loads: u64,
    /// The longest that a checkpoint with work was served by nobody.
    longest_gap: BTreeMap<&'static str, i64>,
    unserved_since: BTreeMap<&'static str, i64>,
}

#[derive(Clone)]
struct Simulated {
    serving: Option<String>,
    since: i64,
    ready_at: i64,
}

impl Simulation {
    fn new(workers: usize, load: i64, rate: usize, models: &[&'static str]) -> Self {
        Self {
            queues: models.iter().map(|model| (*model, VecDeque::new())).collect(),
            workers: vec![Simulated { serving: None, since: 0, ready_at: 0 }; workers],
            load,
            rate,
            loads: 0,
            longest_gap: BTreeMap::new(),
            unserved_since: BTreeMap::new(),
        }
    }

    fn arrive(&mut self, model: &'static str, jobs: usize, now: i64) {
        self.queues.get_mut(model).unwrap().extend(std::iter::repeat_n(now, jobs));
    }

    fn tick(&mut self, now: i64) {
        for index in 0..self.workers.len() {
            self.place(index, now);
        }
        for worker in &self.workers {
            if worker.ready_at <= now
                && let Some(queue) = worker.serving.as_deref().and_then(|model| self.queues.get_mut(model))
            {
                queue.drain(..queue.len().min(self.rate));
            }
        }
        for (model, queue) in &self.queues {
            let served =
                self.workers.iter().any(|worker| worker.ready_at <= now && worker.serving.as_deref() == Some(*model));
            if served || queue.is_empty() {
                self.unserved_since.remove(model);
            } else {
                let gap = now - *self.unserved_since.entry(model).or_insert(now);
                let longest = self.longest_gap.entry(model).or_default();
                *longest = gap.max(*longest);
            }
        }
    }

    fn place(&mut self, index: usize, now: i64) {
        let demand: Vec<_> = self
            .queues
            .iter()
            .filter_map(|(model, queue)| Some(waits(model, Lane::Bulk, queue.len() as u64, at(*queue.front()?))))
            .collect();
        let fleet: Vec<_> =
            self.workers.iter().enumerate().map(|(index, worker)| serves(index, worker.serving.as_deref())).collect();
        let (worker, me) = (id(index), &mut self.workers[index]);
        let asker = Asker {
            worker: &worker,
            serving: me.serving.as_deref(),
            since: at(me.since),
            warm: me.serving.as_deref(),
            has_waiting: false,
        };
        let next = choose(&asker, &demand, &fleet, at(now), &BOUNDS);
        if next != me.serving {
            self.loads += 1;
            *me = Simulated { serving: next, since: now + self.load, ready_at: now + self.load };
        }
    }
}

#[test]
fn one_worker_serves_every_overloaded_checkpoint_in_turn() {
    let models = ["a", "b", "c", "d", "e"];
    let mut farm = Simulation::new(1, 10, 2, &models);
    for now in 0..10_000 {
        for model in models {
            farm.arrive(model, 1, now);
        }
        farm.tick(now);
    }
    // A round is five turns of 60 seconds and a load of 10 each: at least that often, each is served.
    for model in models {
        assert!(farm.longest_gap[model] <= 5 * 71, "{model} waited {} s", farm.longest_gap[model]);
    }
    assert!(farm.loads <= 10_000 / 70 + 1, "{} loads", farm.loads);
}

#[test]
fn a_trickle_is_served_within_its_bound_beside_a_flood() {
    let mut farm = Simulation::new(3, 10, 4, &["flood", "trickle"]);
    farm.arrive("flood", 1_000_000, 0);
    for now in 0..5_000 {
        if now % 200 == 100 {
            farm.arrive("trickle", 1, now);
        }
        farm.tick(now);
    }
    assert!(farm.longest_gap["trickle"] <= 60 + 11, "{} s", farm.longest_gap["trickle"]);
    assert!(!farm.longest_gap.contains_key("flood") || farm.longest_gap["flood"] <= 11);
}

#[test]
fn with_a_worker_for_each_checkpoint_each_loads_once() {
    let models = ["a", "b", "c"];
    let mut farm = Simulation::new(3, 10, 1, &models);
    for now in 0..2_000 {
        for model in models {
            farm.arrive(model, 1, now);
        }
        farm.tick(now);
    }
    assert_eq!(farm.loads, 3);
    assert!(farm.longest_gap.values().all(|gap| *gap <= 11), "{:?}", farm.longest_gap);
}

#[test]
fn two_checkpoints_on_two_workers_are_loaded_once_each_and_once_more_at_the_end() {
    let mut farm = Simulation::new(2, 10, 2, &["a", "b"]);
    farm.arrive("a", 1500, 0);
    farm.arrive("b", 500, 0);
    for now in 0..1_000 {
        farm.tick(now);
    }
    assert!(farm.queues.values().all(VecDeque::is_empty));
    assert!(farm.loads <= 3, "{} loads", farm.loads);
}
