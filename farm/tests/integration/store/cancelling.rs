//! Cancelling, and trying again.

use std::time::Duration;

use farm::id::{JobId, SubmissionId};
use farm::job::{Counters, FailureKind, JobState, Lane};
use farm::store::Heartbeat;

use super::harness::{LEASE, new_submission, spec, status};
use super::on_each_store;

on_each_store! {
    async fn what_waits_is_cancelled_at_once(farm: &TestFarm) {
        let submission = farm.submit(2).await;
        farm.store.dispatch(&super::harness::queue("demo", Lane::Bulk), 1, &farm.broker).await.unwrap();
        farm.clock.advance(Duration::from_secs(1));
        for job in &submission.jobs {
            assert_eq!(farm.store.cancel_job(*job).await.unwrap(), Some(JobState::Cancelled));
            assert_eq!(farm.job(*job).await.finished_at, Some(farm.now()));
        }
        assert_eq!(farm.counters(&submission).await, Counters { cancelled: 2, ..Counters::default() });
        assert_eq!(farm.dispatch().await, 0);
        assert!(farm.claim("ann", &submission.jobs).await.claimed.is_empty());
    }

    async fn a_leased_job_is_cancelled_when_its_worker_says_so(farm: &TestFarm) {
        let (submission, leases) = farm.lease(2).await;
        assert_eq!(farm.store.cancel_job(leases[0].job_id).await.unwrap(), Some(JobState::Leased));
        let heartbeat = farm.store.heartbeat(&status("ann"), &leases, LEASE).await.unwrap();
        assert_eq!(heartbeat, Heartbeat { lost: vec![], cancelled: vec![leases[0].job_id] });
        assert!(farm.store.cancelled(&leases[0]).await.unwrap());
        assert_eq!(farm.state(leases[0].job_id).await, JobState::Cancelled);
        assert_eq!(farm.counters(&submission).await, Counters { leased: 1, cancelled: 1, ..Counters::default() });
        assert!(!farm.store.cancelled(&leases[0]).await.unwrap(), "it is no longer held");
    }

    async fn a_picture_that_was_finished_before_the_worker_knew_counts(farm: &TestFarm) {
        let (_, leases) = farm.lease(1).await;
        farm.store.cancel_job(leases[0].job_id).await.unwrap();
        assert!(farm.finish(&leases[0]).await);
        assert_eq!(farm.state(leases[0].job_id).await, JobState::Done);
    }

    async fn a_cancelled_job_is_not_tried_again(farm: &TestFarm) {
        let (submission, leases) = farm.lease(3).await;
        farm.store.cancel_submission(submission.id).await.unwrap();
        assert_eq!(farm.fail("ann", &leases[0], FailureKind::Retryable).await, Some(JobState::Cancelled));
        assert_eq!(farm.store.release(&leases[1..2]).await.unwrap(), 1);
        farm.clock.advance(LEASE);
        assert_eq!(farm.store.reap(10).await.unwrap().cancelled, 1);
        assert_eq!(farm.states(&submission).await, [JobState::Cancelled; 3]);
        assert_eq!(farm.counters(&submission).await, Counters { cancelled: 3, ..Counters::default() });
    }

    async fn final_jobs_are_not_cancelled(farm: &TestFarm) {
        let (_, leases) = farm.lease(2).await;
        farm.finish(&leases[0]).await;
        farm.fail("ann", &leases[1], FailureKind::Invalid).await;
        assert_eq!(farm.store.cancel_job(leases[0].job_id).await.unwrap(), Some(JobState::Done));
        assert_eq!(farm.store.cancel_job(leases[1].job_id).await.unwrap(), Some(JobState::Failed));
        assert_eq!(farm.store.cancel_job(JobId::new()).await.unwrap(), None);
    }

    async fn a_submission_is_cancelled_but_for_what_is_final(farm: &TestFarm) {
        let submission = farm.submit(6).await;
        let untouched = farm.submit(1).await;
        farm.store.dispatch(&super::harness::queue("demo", Lane::Bulk), 4, &farm.broker).await.unwrap();
        let claimed = farm.claim("ann", &submission.jobs[..2]).await.claimed;
        farm.finish(&claimed[0].lease).await;
        let counters = farm.store.cancel_submission(submission.id).await.unwrap();
        let expected = Counters { leased: 1, done: 1, cancelled: 4, ..Counters::default() };
        assert_eq!(counters, Some(expected));
        assert_eq!(farm.recount(Some(submission.id)).await, expected);
        let heartbeat = farm.store.heartbeat(&status("ann"), &[claimed[1].lease.clone()], LEASE).await.unwrap();
        assert_eq!(heartbeat.cancelled, [claimed[1].lease.job_id]);
        assert_eq!(farm.counters(&untouched).await.pending, 1);
        assert_eq!(farm.store.cancel_submission(SubmissionId::new()).await.unwrap(), None);
    }

    async fn a_retried_job_has_its_attempts_anew(farm: &TestFarm) {
        let (submission, leases) = farm.lease(1).await;
        farm.fail("ann", &leases[0], FailureKind::Invalid).await;
        assert!(farm.store.submission(submission.id).await.unwrap().unwrap().finished_at.is_some());
        assert_eq!(farm.store.retry_job(leases[0].job_id).await.unwrap(), Some(JobState::Pending));
        let job = farm.job(leases[0].job_id).await;
        assert_eq!((job.state, job.attempts, job.error, job.finished_at), (JobState::Pending, 0, None, None));
        assert_eq!(farm.store.submission(submission.id).await.unwrap().unwrap().finished_at, None);
        assert_eq!(farm.dispatch().await, 1, "due at once");
        farm.store.heartbeat(&status("ann"), &[], LEASE).await.unwrap();
        farm.store.heartbeat(&status("bob"), &[], LEASE).await.unwrap();
        assert_eq!(farm.claim("ann", &submission.jobs).await.claimed.len(), 1, "nobody remembers the failure");
    }

    async fn only_failed_and_cancelled_jobs_are_retried(farm: &TestFarm) {
        let (_, leases) = farm.lease(2).await;
        farm.finish(&leases[0]).await;
        assert_eq!(farm.store.retry_job(leases[0].job_id).await.unwrap(), Some(JobState::Done));
        assert_eq!(farm.store.retry_job(leases[1].job_id).await.unwrap(), Some(JobState::Leased));
        assert_eq!(farm.store.retry_job(JobId::new()).await.unwrap(), None);
        assert!(farm.finish(&leases[1]).await);
    }

    async fn a_cancelled_job_can_be_retried(farm: &TestFarm) {
        let (submission, leases) = farm.lease(1).await;
        farm.store.cancel_job(leases[0].job_id).await.unwrap();
        farm.store.cancelled(&leases[0]).await.unwrap();
        assert_eq!(farm.store.retry_job(leases[0].job_id).await.unwrap(), Some(JobState::Pending));
        let lease = farm.claim("ann", &submission.jobs).await.claimed.remove(0).lease;
        let heartbeat = farm.store.heartbeat(&status("ann"), std::slice::from_ref(&lease), LEASE).await.unwrap();
        assert_eq!(heartbeat, Heartbeat::default(), "the old request to cancel is forgotten");
        assert!(farm.finish(&lease).await);
    }

    async fn a_submissions_failed_jobs_are_retried_and_the_cancelled_ones_if_asked(farm: &TestFarm) {
        let submission = farm.submit_specs(new_submission(), vec![spec("demo", Lane::Bulk); 5]).await;
        farm.dispatch().await;
        let claimed = farm.claim("ann", &submission.jobs[..3]).await.claimed;
        farm.finish(&claimed[0].lease).await;
        farm.fail("ann", &claimed[1].lease, FailureKind::Invalid).await;
        farm.fail("ann", &claimed[2].lease, FailureKind::Invalid).await;
        farm.store.cancel_submission(submission.id).await.unwrap();
        assert_eq!(farm.store.retry_submission(submission.id, false).await.unwrap(), Some(2));
        let expected = Counters { pending: 2, done: 1, cancelled: 2, ..Counters::default() };
        assert_eq!(farm.counters(&submission).await, expected);
        assert_eq!(farm.store.retry_submission(submission.id, true).await.unwrap(), Some(2));
        assert_eq!(farm.counters(&submission).await, Counters { pending: 4, done: 1, ..Counters::default() });
        assert_eq!(farm.store.retry_submission(submission.id, true).await.unwrap(), Some(0));
        assert_eq!(farm.store.retry_submission(SubmissionId::new(), true).await.unwrap(), None);
        assert_eq!(farm.recount(None).await, farm.store.totals().await.unwrap());
    }
}
