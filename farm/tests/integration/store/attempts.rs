//! Attempts that deliver, and leases that no longer hold.

use std::time::Duration;

use farm::id::LeaseToken;
use farm::job::{Counters, FailureKind, JobState, Lease};
use farm::store::Leftover;

use super::harness::{LEASE, TestFarm, finished};
use super::on_each_store;

on_each_store! {
    async fn a_finished_job_carries_its_result(farm: &TestFarm) {
        let (submission, leases) = farm.lease(2).await;
        farm.clock.advance(Duration::from_secs(3));
        assert!(farm.finish(&leases[0]).await);
        let job = farm.job(leases[0].job_id).await;
        let result = finished(&leases[0]);
        assert_eq!((job.state, job.finished_at, job.render_ms), (JobState::Done, Some(farm.now()), Some(1500)));
        assert_eq!((job.image_key, job.sidecar_key), (Some(result.image_key), Some(result.sidecar_key)));
        assert_eq!((job.sha256, job.error), (Some(result.sha256), None));
        assert_eq!(farm.counters(&submission).await, Counters { leased: 1, done: 1, ..Counters::default() });
        assert_eq!(farm.store.submission(submission.id).await.unwrap().unwrap().finished_at, None);
    }

    async fn the_last_job_ends_its_submission(farm: &TestFarm) {
        let (submission, leases) = farm.lease(3).await;
        let (other, other_leases) = farm.lease(1).await;
        farm.clock.advance(Duration::from_secs(3));
        let all: Vec<_> = leases.iter().chain(&other_leases).map(finished).collect();
        let done = farm.store.finish(&all).await.unwrap();
        assert_eq!(done, all.iter().map(|one| one.lease.job_id).collect::<Vec<_>>());
        for id in [submission.id, other.id] {
            let view = farm.store.submission(id).await.unwrap().unwrap();
            assert_eq!((view.finished_at, view.eta_seconds), (Some(farm.now()), None));
            assert_eq!(view.counters.done, view.counters.total());
        }
        assert_eq!(farm.store.totals().await.unwrap(), Counters { done: 4, ..Counters::default() });
    }

    async fn finishing_again_changes_nothing_and_is_still_true(farm: &TestFarm) {
        let (submission, leases) = farm.lease(1).await;
        assert!(farm.finish(&leases[0]).await);
        let before = farm.job(leases[0].job_id).await;
        farm.clock.advance(Duration::from_secs(1));
        assert!(farm.finish(&leases[0]).await, "the answer to the first may have been lost");
        assert_eq!(farm.job(leases[0].job_id).await.finished_at, before.finished_at);
        assert_eq!(farm.counters(&submission).await, Counters { done: 1, ..Counters::default() });
    }

    async fn of_a_delivery_the_lost_leases_are_left_out(farm: &TestFarm) {
        let (_, leases) = farm.lease(3).await;
        farm.fail("ann", &leases[1], FailureKind::Retryable).await;
        let done = farm.store.finish(&leases.iter().map(finished).collect::<Vec<_>>()).await.unwrap();
        assert_eq!(done, [leases[0].job_id, leases[2].job_id]);
        assert_eq!(farm.state(leases[1].job_id).await, JobState::Pending);
    }

    async fn an_expired_lease_changes_nothing(farm: &TestFarm) {
        let (_, leases) = farm.lease(1).await;
        farm.clock.advance(LEASE);
        assert_lost(farm, &leases[0]).await;
        assert_eq!(farm.state(leases[0].job_id).await, JobState::Leased, "the reaper's to take back");
    }

    async fn a_lease_with_another_token_changes_nothing(farm: &TestFarm) {
        let (_, leases) = farm.lease(1).await;
        let forged = Lease { token: LeaseToken::new(), ..leases[0].clone() };
        assert_lost(farm, &forged).await;
        assert!(farm.finish(&leases[0]).await);
    }

    async fn a_lease_from_before_the_reaper_changes_nothing(farm: &TestFarm) {
        let (submission, leases) = farm.lease(1).await;
        farm.clock.advance(LEASE);
        assert_eq!(farm.store.reap(10).await.unwrap().retried, 1);
        farm.clock.advance(Duration::from_secs(2));
        let second = farm.claim("bob", &submission.jobs).await.claimed.remove(0).lease;
        assert_lost(farm, &leases[0]).await;
        assert!(farm.finish(&second).await);
        assert_lost(farm, &leases[0]).await;
        assert_eq!(farm.job(second.job_id).await.image_key, Some(finished(&second).image_key));
    }

    async fn a_released_job_is_pending_at_once_and_its_attempt_does_not_count(farm: &TestFarm) {
        let (submission, leases) = farm.lease(3).await;
        assert_eq!(farm.store.release(&leases[..2]).await.unwrap(), 2);
        let job = farm.job(leases[0].job_id).await;
        assert_eq!((job.state, job.attempts, job.error), (JobState::Pending, 0, None));
        assert_eq!(farm.counters(&submission).await, Counters { pending: 2, leased: 1, ..Counters::default() });
        assert_eq!(farm.dispatch().await, 2);
        assert_eq!(farm.store.release(&leases).await.unwrap(), 1, "only what is still held");
    }

    async fn no_attempt_number_is_given_twice(farm: &TestFarm) {
        let (submission, leases) = farm.lease(1).await;
        farm.store.release(&leases).await.unwrap();
        let second = farm.claim("ann", &submission.jobs).await.claimed.remove(0).lease;
        farm.fail("ann", &second, FailureKind::Invalid).await;
        farm.store.retry_job(second.job_id).await.unwrap();
        let third = farm.claim("ann", &submission.jobs).await.claimed.remove(0).lease;
        assert_eq!([leases[0].attempt, second.attempt, third.attempt], [1, 2, 3]);
        assert_eq!(farm.job(third.job_id).await.attempts, 1, "attempts count what is spent");
    }

    async fn attempts_that_did_not_win_are_left_over_and_the_winner_is_not(farm: &TestFarm) {
        let (submission, leases) = farm.lease(4).await;
        let [failed, released, expired, cancelled] = [0, 1, 2, 3].map(|place: usize| leases[place].clone());
        farm.fail("ann", &failed, FailureKind::Retryable).await;
        farm.store.release(std::slice::from_ref(&released)).await.unwrap();
        farm.store.cancel_job(cancelled.job_id).await.unwrap();
        assert!(farm.store.cancelled(&cancelled).await.unwrap());
        farm.clock.advance(LEASE);
        farm.store.reap(10).await.unwrap();
        farm.clock.advance(Duration::from_secs(2));
        for job in farm.claim("bob", &submission.jobs).await.claimed {
            assert!(farm.finish(&job.lease).await);
        }
        let ended_before = farm.now() + Duration::from_secs(1);
        let left = farm.store.leftovers(ended_before, 10).await.unwrap();
        let mut jobs: Vec<_> = left.iter().map(|leftover| (leftover.job_id, leftover.attempt)).collect();
        jobs.sort();
        assert_eq!(jobs, [failed, released, expired, cancelled].map(|lease| (lease.job_id, 1)));
        assert!(left.iter().all(|leftover| leftover.submission_id == submission.id));
    }

    async fn leftovers_are_listed_once_they_are_old_enough_until_they_are_forgotten(farm: &TestFarm) {
        let (submission, leases) = farm.lease(3).await;
        farm.fail("ann", &leases[0], FailureKind::Retryable).await;
        farm.clock.advance(Duration::from_secs(5));
        farm.fail("ann", &leases[1], FailureKind::Retryable).await;
        farm.fail("ann", &leases[2], FailureKind::Retryable).await;
        assert_eq!(farm.store.leftovers(farm.now() - Duration::from_secs(5), 10).await.unwrap(), []);
        let first = Leftover { submission_id: submission.id, job_id: leases[0].job_id, attempt: 1 };
        assert_eq!(farm.store.leftovers(farm.now(), 10).await.unwrap(), std::slice::from_ref(&first));
        let later = farm.now() + Duration::from_secs(1);
        assert_eq!(farm.store.leftovers(later, 2).await.unwrap().len(), 2);
        farm.store.forget_leftovers(std::slice::from_ref(&first)).await.unwrap();
        let rest = farm.store.leftovers(later, 10).await.unwrap();
        assert!(rest.len() == 2 && !rest.contains(&first), "{rest:?}");
        farm.store.forget_leftovers(&rest).await.unwrap();
        assert_eq!(farm.store.leftovers(later, 10).await.unwrap(), []);
    }
}

/// Whatever is said under this lease is refused.
async fn assert_lost(farm: &TestFarm, lease: &Lease) {
    let before = farm.counters_of(lease.submission_id).await;
    assert!(!farm.finish(lease).await);
    assert_eq!(farm.fail("ann", lease, FailureKind::Retryable).await, None);
    assert_eq!(farm.store.release(std::slice::from_ref(lease)).await.unwrap(), 0);
    assert!(!farm.store.cancelled(lease).await.unwrap());
    let heartbeat = farm.store.heartbeat(&super::harness::status("ann"), std::slice::from_ref(lease), LEASE).await;
    assert_eq!(heartbeat.unwrap().lost, [lease.job_id]);
    assert_eq!(farm.counters_of(lease.submission_id).await, before);
}
