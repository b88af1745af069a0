//! Failures: back-off, the end of attempts, and a submission's failure limit.

use std::time::Duration;

use farm::job::{Counters, FailureKind, JobState, Lane, NewSubmission};
use farm::store::Leftover;

use super::harness::{LEASE, failure, finished, new_submission, spec, status, worker};
use super::on_each_store;

on_each_store! {
    async fn a_failed_attempt_goes_back_to_pending_with_its_error(farm: &TestFarm) {
        let (submission, leases) = farm.lease(1).await;
        assert_eq!(farm.fail("ann", &leases[0], FailureKind::OutOfMemory).await, Some(JobState::Pending));
        let job = farm.job(leases[0].job_id).await;
        assert_eq!((job.state, job.attempts, job.finished_at), (JobState::Pending, 1, None));
        assert_eq!(job.error, Some(failure(FailureKind::OutOfMemory)));
        assert_eq!(job.worker, Some(worker("ann")), "who held it last");
        assert_eq!(farm.counters(&submission).await, Counters { pending: 1, ..Counters::default() });
    }

    async fn the_back_off_doubles_up_to_its_bound(farm: &TestFarm) {
        let patient = NewSubmission { max_attempts: 6, ..new_submission() };
        let (submission, mut leases) = farm.lease_of(patient, 1).await;
        for wait in [2, 4, 8, 10, 10] {
            farm.fail("ann", &leases[0], FailureKind::Retryable).await;
            farm.clock.advance(Duration::from_secs(wait) - Duration::from_micros(1));
            assert!(farm.claim("ann", &submission.jobs).await.claimed.is_empty(), "before {wait} s");
            farm.clock.advance(Duration::from_micros(1));
            leases = farm.claim("ann", &submission.jobs).await.claimed.into_iter().map(|job| job.lease).collect();
        }
        assert_eq!(farm.fail("ann", &leases[0], FailureKind::Retryable).await, Some(JobState::Failed));
    }

    async fn a_job_fails_when_its_attempts_are_spent(farm: &TestFarm) {
        let (submission, leases) = farm.lease_of(NewSubmission { max_attempts: 1, ..new_submission() }, 2).await;
        farm.clock.advance(Duration::from_secs(1));
        assert_eq!(farm.fail("ann", &leases[0], FailureKind::Retryable).await, Some(JobState::Failed));
        let job = farm.job(leases[0].job_id).await;
        assert_eq!((job.state, job.finished_at), (JobState::Failed, Some(farm.now())));
        assert_eq!(farm.counters(&submission).await, Counters { leased: 1, failed: 1, ..Counters::default() });
        assert!(farm.finish(&leases[1]).await);
        assert_eq!(farm.store.submission(submission.id).await.unwrap().unwrap().finished_at, Some(farm.now()));
    }

    async fn an_invalid_job_fails_at_once(farm: &TestFarm) {
        let (_, leases) = farm.lease(1).await;
        assert_eq!(farm.fail("ann", &leases[0], FailureKind::Invalid).await, Some(JobState::Failed));
        assert_eq!(farm.job(leases[0].job_id).await.attempts, 1);
    }

    async fn a_job_done_at_the_second_attempt_keeps_the_first_ones_error(farm: &TestFarm) {
        let (submission, leases) = farm.lease(1).await;
        farm.fail("ann", &leases[0], FailureKind::Retryable).await;
        farm.clock.advance(Duration::from_secs(2));
        let second = farm.claim("bob", &submission.jobs).await.claimed.remove(0).lease;
        assert!(farm.finish(&second).await);
        let job = farm.job(second.job_id).await;
        assert_eq!((job.state, job.attempts), (JobState::Done, 2));
        assert_eq!(job.error, Some(failure(FailureKind::Retryable)));
    }

    async fn a_message_may_hold_anything(farm: &TestFarm) {
        let (_, leases) = farm.lease(1).await;
        let odd = farm::job::Failure { kind: FailureKind::Poison, message: "nul \0 and \"quote\" \u{1}".into() };
        farm.store.fail(&worker("ann"), &leases[0], &odd).await.unwrap();
        assert_eq!(farm.job(leases[0].job_id).await.error.unwrap().message, "nul \u{fffd} and \"quote\" \u{1}");
    }

    async fn when_too_many_jobs_have_failed_the_rest_is_cancelled(farm: &TestFarm) {
        let strict = NewSubmission { max_attempts: 1, failure_limit: Some(2), ..new_submission() };
        let submission = farm.submit_specs(strict, vec![spec("demo", Lane::Bulk); 8]).await;
        farm.store.dispatch(&super::harness::queue("demo", Lane::Bulk), 6, &farm.broker).await.unwrap();
        let leases: Vec<_> =
            farm.claim("ann", &submission.jobs[..4]).await.claimed.into_iter().map(|job| job.lease).collect();
        assert!(farm.finish(&leases[0]).await);
        farm.fail("ann", &leases[1], FailureKind::Retryable).await;
        let before = Counters { pending: 2, queued: 2, leased: 2, done: 1, failed: 1, cancelled: 0 };
        assert_eq!(farm.counters(&submission).await, before);

        farm.fail("ann", &leases[2], FailureKind::Retryable).await;
        let after = Counters { leased: 1, done: 1, failed: 2, cancelled: 4, ..Counters::default() };
        assert_eq!(farm.counters(&submission).await, after);
        assert_eq!(farm.recount(Some(submission.id)).await, after);
        let heartbeat = farm.store.heartbeat(&status("ann"), &leases[3..], LEASE).await.unwrap();
        assert_eq!((heartbeat.cancelled, heartbeat.lost), (vec![leases[3].job_id], vec![]));
        assert!(farm.store.cancelled(&leases[3]).await.unwrap());
        let view = farm.store.submission(submission.id).await.unwrap().unwrap();
        assert_eq!((view.counters.cancelled, view.finished_at), (5, Some(farm.now())));
    }

    async fn two_failures_at_once_reach_the_limit_together(farm: &TestFarm) {
        for _ in 0..5 {
            let strict = NewSubmission { max_attempts: 1, failure_limit: Some(2), ..new_submission() };
            let (submission, leases) = farm.lease_of(strict, 3).await;
            let fail = |place: usize| farm.fail("ann", &leases[place], FailureKind::Retryable);
            let (one, two) = tokio::join!(fail(0), fail(1));
            assert_eq!((one, two), (Some(JobState::Failed), Some(JobState::Failed)));
            let heartbeat = farm.store.heartbeat(&status("ann"), &leases[2..], LEASE).await.unwrap();
            assert_eq!(heartbeat.cancelled, [leases[2].job_id]);
            assert_eq!(farm.counters(&submission).await, farm.recount(Some(submission.id)).await);
        }
    }

    async fn leases_that_expire_count_for_the_limit(farm: &TestFarm) {
        let strict = NewSubmission { max_attempts: 1, failure_limit: Some(2), ..new_submission() };
        let submission = farm.submit_specs(strict, vec![spec("demo", Lane::Bulk); 4]).await;
        farm.claim("ann", &submission.jobs[..2]).await;
        farm.clock.advance(LEASE);
        assert_eq!(farm.store.reap(10).await.unwrap().failed, 2);
        let expected = Counters { failed: 2, cancelled: 2, ..Counters::default() };
        assert_eq!(farm.counters(&submission).await, expected);
    }

    async fn below_its_limit_a_submission_goes_on(farm: &TestFarm) {
        let lenient = NewSubmission { max_attempts: 1, failure_limit: Some(3), ..new_submission() };
        let (submission, leases) = farm.lease_of(lenient, 4).await;
        farm.fail("ann", &leases[0], FailureKind::Invalid).await;
        farm.fail("ann", &leases[1], FailureKind::Invalid).await;
        assert_eq!(farm.store.finish(&[finished(&leases[2])]).await.unwrap().len(), 1);
        assert_eq!(farm.counters(&submission).await, Counters { leased: 1, done: 1, failed: 2, ..Counters::default() });
        let left: Vec<Leftover> = farm.store.leftovers(farm.now() + LEASE, 10).await.unwrap();
        assert_eq!(left.len(), 2);
    }
}
