//! Counters are what a recount of the rows would say, whatever happens.

use std::time::Duration;

use farm::id::{JobId, SubmissionId};
use farm::job::{FailureKind, Lane, Lease, NewSubmission};
use rand::rngs::StdRng;
use rand::seq::{IndexedRandom, SliceRandom};
use rand::{RngExt, SeedableRng};

use super::harness::{LEASE, Submission, TestFarm, failure, finished, new_submission, queue, spec, status, worker};
use super::on_each_store;

const OPERATIONS: usize = 1500;
const WORKERS: [&str; 3] = ["ann", "bob", "cid"];

/// What a random run knows of the farm.
struct Run<'a> {
    farm: &'a TestFarm,
    random: StdRng,
    submissions: Vec<Submission>,
    leases: Vec<(&'static str, Lease)>,
}

impl Run<'_> {
    fn any_job(&mut self) -> Option<JobId> {
        let submission = self.submissions.choose(&mut self.random)?;
        submission.jobs.choose(&mut self.random).copied()
    }

    fn any_submission(&mut self) -> Option<SubmissionId> {
        self.submissions.choose(&mut self.random).map(|submission| submission.id)
    }

    /// Takes up to four leases, held or long lost.
    fn some_leases(&mut self) -> Vec<(&'static str, Lease)> {
        self.leases.shuffle(&mut self.random);
        let keep = self.leases.len().saturating_sub(self.random.random_range(1..=4));
        self.leases.split_off(keep)
    }

    async fn submit(&mut self) {
        let submission = NewSubmission {
            max_attempts: self.random.random_range(1..=3),
            failure_limit: self.random.random_bool(0.3).then_some(4),
            ..new_submission()
        };
        let jobs = self.random.random_range(1..=12);
        let model = *["a", "b"].choose(&mut self.random).expect("one of two");
        let lane = *Lane::ALL.choose(&mut self.random).expect("one of two");
        self.submissions.push(self.farm.submit_specs(submission, vec![spec(model, lane); jobs]).await);
    }

    async fn claim(&mut self) {
        let name = *WORKERS.choose(&mut self.random).expect("one of three");
        let window: Vec<JobId> = (0..4).filter_map(|_| self.any_job()).collect();
        let claim = self.farm.claim(name, &window).await;
        self.leases.extend(claim.claimed.into_iter().map(|job| (name, job.lease)));
    }

    async fn fail(&mut self) {
        let kind = *FailureKind::ALL.choose(&mut self.random).expect("one of four");
        for (name, lease) in self.some_leases() {
            self.farm.store.fail(&worker(name), &lease, &failure(kind)).await.unwrap();
        }
    }

    async fn step(&mut self) {
        let store = self.farm.store.clone();
        let demo = queue(if self.random.random_bool(0.5) { "a" } else { "b" }, Lane::Bulk);
        match self.random.random_range(0..24) {
            0..3 => self.submit().await,
            3..6 => {
                let limit = self.random.random_range(1..20);
                store.dispatch(&demo, limit, &self.farm.broker).await.unwrap();
            }
            6..11 => self.claim().await,
            11..14 => {
                let results: Vec<_> = self.some_leases().iter().map(|(_, lease)| finished(lease)).collect();
                store.finish(&results).await.unwrap();
            }
            14..16 => self.fail().await,
            16 => {
                let leases: Vec<Lease> = self.some_leases().into_iter().map(|(_, lease)| lease).collect();
                store.release(&leases).await.unwrap();
            }
            17 => {
                for (name, lease) in self.some_leases() {
                    store.heartbeat(&status(name), std::slice::from_ref(&lease), LEASE).await.unwrap();
                    store.cancelled(&lease).await.unwrap();
                }
            }
            18 => {
                if let Some(job) = self.any_job() {
                    store.cancel_job(job).await.unwrap();
                }
            }
            19 => {
                if let Some(job) = self.any_job() {
                    store.retry_job(job).await.unwrap();
                }
            }
            20 => {
                if let Some(submission) = self.any_submission().filter(|_| self.random.random_bool(0.2)) {
                    store.cancel_submission(submission).await.unwrap();
                }
            }
            21 => {
                if let Some(submission) = self.any_submission() {
                    let cancelled = self.random.random_bool(0.5);
                    store.retry_submission(submission, cancelled).await.unwrap();
                }
            }
            22 => {
                store.requeue(&demo, self.farm.now()).await.unwrap();
                store.reap(5).await.unwrap();
            }
            _ => self.farm.clock.advance(Duration::from_secs(self.random.random_range(1..40))),
        }
    }
}

/// Runs the operations of one seed.
async fn run(farm: &TestFarm, seed: u64, operations: usize) -> Vec<Submission> {
    let random = StdRng::seed_from_u64(seed);
    let mut run = Run { farm, random, submissions: Vec::new(), leases: Vec::new() };
    for _ in 0..operations {
        run.step().await;
    }
    run.submissions
}

async fn assert_counted(farm: &TestFarm, submissions: &[Submission]) {
    for submission in submissions {
        let counters = farm.counters(submission).await;
        assert_eq!(counters, farm.recount(Some(submission.id)).await, "{}", submission.id);
        assert_eq!(counters.total(), submission.jobs.len() as u64);
        let view = farm.store.submission(submission.id).await.unwrap().unwrap();
        assert_eq!(view.finished_at.is_some(), counters.finished() == counters.total());
    }
    assert_eq!(farm.store.totals().await.unwrap(), farm.recount(None).await);
}

on_each_store! {
    async fn counters_equal_a_recount_after_random_operations(farm: &TestFarm) {
        let submissions = run(farm, 20261121, OPERATIONS).await;
        assert!(submissions.len() > 100, "{}", submissions.len());
        assert_counted(farm, &submissions).await;
    }

    async fn counters_equal_a_recount_after_random_operations_at_once(farm: &TestFarm) {
        let each = OPERATIONS / 4;
        let (one, two, three, four) =
            tokio::join!(run(farm, 1, each), run(farm, 2, each), run(farm, 3, each), run(farm, 4, each));
        assert_counted(farm, &[one, two, three, four].concat()).await;
    }

    async fn leftovers_never_name_a_winner(farm: &TestFarm) {
        run(farm, 7, OPERATIONS / 2).await;
        let wins = farm.texts("SELECT image_key FROM jobs WHERE state = 'done'").await;
        assert!(!wins.is_empty());
        let left = farm.store.leftovers(farm.now() + LEASE, 1_000_000).await.unwrap();
        assert!(!left.is_empty());
        for leftover in left {
            let key = format!("images/{}/{}.png", leftover.job_id, leftover.attempt);
            assert!(!wins.contains(&Some(key.clone())), "{key}");
        }
    }
}
