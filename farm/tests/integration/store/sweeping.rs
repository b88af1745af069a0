//! The reaper.

use std::time::Duration;

use farm::job::{Counters, Failure, FailureKind, JobState, NewSubmission};
use farm::store::Reaped;

use super::harness::{LEASE, finished, new_submission, status, worker};
use super::on_each_store;

on_each_store! {
    async fn a_job_whose_lease_expired_goes_back_to_pending(farm: &TestFarm) {
        let (submission, leases) = farm.lease(2).await;
        farm.clock.advance(LEASE - Duration::from_micros(1));
        assert_eq!(farm.store.reap(10).await.unwrap(), Reaped::default());
        farm.store.heartbeat(&status("ann"), &leases[1..], LEASE).await.unwrap();
        farm.clock.advance(Duration::from_micros(1));
        assert_eq!(farm.store.reap(10).await.unwrap(), Reaped { retried: 1, ..Reaped::default() });
        let job = farm.job(leases[0].job_id).await;
        assert_eq!((job.state, job.attempts), (JobState::Pending, 1));
        let message = "worker `ann` went silent: its lease expired".into();
        assert_eq!(job.error, Some(Failure { kind: FailureKind::Retryable, message }));
        assert_eq!(farm.counters(&submission).await, Counters { pending: 1, leased: 1, ..Counters::default() });
        assert_eq!(farm.dispatch().await, 0, "not before its back-off");
        farm.clock.advance(Duration::from_secs(2));
        assert_eq!(farm.dispatch().await, 1);
    }

    async fn a_worker_that_went_silent_may_have_the_job_again(farm: &TestFarm) {
        let (submission, _) = farm.lease(1).await;
        farm.clock.advance(LEASE);
        farm.store.reap(10).await.unwrap();
        farm.clock.advance(Duration::from_secs(2));
        farm.store.heartbeat(&status("bob"), &[], LEASE).await.unwrap();
        assert_eq!(farm.claim("ann", &submission.jobs).await.claimed.len(), 1);
    }

    async fn a_job_whose_last_lease_expired_fails(farm: &TestFarm) {
        let (submission, _) = farm.lease_of(NewSubmission { max_attempts: 1, ..new_submission() }, 1).await;
        farm.clock.advance(LEASE);
        assert_eq!(farm.store.reap(10).await.unwrap(), Reaped { failed: 1, ..Reaped::default() });
        assert_eq!(farm.counters(&submission).await, Counters { failed: 1, ..Counters::default() });
        assert_eq!(farm.job(submission.jobs[0]).await.finished_at, Some(farm.now()));
    }

    async fn a_sweep_takes_no_more_than_its_limit(farm: &TestFarm) {
        farm.lease(5).await;
        farm.clock.advance(LEASE);
        let mut sweeps = Vec::new();
        for _ in 0..3 {
            sweeps.push(farm.store.reap(2).await.unwrap().retried);
        }
        assert_eq!(sweeps, [2, 2, 1]);
    }

    async fn reapers_at_once_take_each_lease_once(farm: &TestFarm) {
        let (submission, _) = farm.lease(40).await;
        farm.clock.advance(LEASE);
        let sweep = || async {
            let mut retried = 0;
            for _ in 0..10 {
                retried += farm.store.reap(7).await.unwrap().retried;
            }
            retried
        };
        let (one, two) = tokio::join!(sweep(), sweep());
        assert_eq!(one + two, 40);
        assert_eq!(farm.counters(&submission).await, Counters { pending: 40, ..Counters::default() });
        let attempts = farm.store.leftovers(farm.now() + LEASE, 100).await.unwrap();
        assert_eq!(attempts.len(), 40);
    }

    async fn of_the_reaper_and_a_late_delivery_one_wins(farm: &TestFarm) {
        for _ in 0..10 {
            let (submission, leases) = farm.lease(8).await;
            farm.clock.advance(LEASE - Duration::from_secs(1));
            let deliver = async {
                let mut done = Vec::new();
                for lease in &leases {
                    done.extend(farm.store.finish(&[finished(lease)]).await.unwrap());
                }
                done
            };
            let reap = async {
                farm.clock.advance(Duration::from_secs(1));
                farm.store.reap(100).await.unwrap().retried
            };
            let (done, retried) = tokio::join!(deliver, reap);
            assert_eq!(done.len() as u64 + retried, 8);
            let left = farm.store.leftovers(farm.now() + LEASE, 100).await.unwrap();
            assert!(left.iter().all(|leftover| !done.contains(&leftover.job_id)), "a winner is left over");
            assert_eq!(left.len() as u64, retried);
            farm.store.forget_leftovers(&left).await.unwrap();
            assert_eq!(farm.counters(&submission).await, farm.recount(Some(submission.id)).await);
            farm.store.cancel_submission(submission.id).await.unwrap();
        }
    }

    async fn the_dead_workers_are_nobodys_deferral(farm: &TestFarm) {
        let (submission, leases) = farm.lease(1).await;
        farm.store.heartbeat(&status("bob"), &[], LEASE).await.unwrap();
        farm.fail("ann", &leases[0], FailureKind::Poison).await;
        farm.clock.advance(LEASE);
        assert!(farm.store.workers().await.unwrap().iter().all(|view| !view.alive));
        let claim = farm.store.claim(&worker("ann"), &submission.jobs, LEASE).await.unwrap();
        assert_eq!(claim.claimed.len(), 1);
    }
}
