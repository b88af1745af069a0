//! Claiming deliveries.

use std::collections::HashSet;
use std::time::Duration;

use farm::id::{JobId, LeaseToken};
use farm::job::{Counters, FailureKind, JobState, Lane, Lease};
use farm::store::WorkerStatus;
use futures_util::future;

use super::harness::{Gate, LEASE, RecordingBroker, TestFarm, queue, status, worker};
use super::on_each_store;

on_each_store! {
    async fn a_window_is_leased_in_the_order_asked_for(farm: &TestFarm) {
        let submission = farm.submit(5).await;
        farm.dispatch().await;
        farm.clock.advance(Duration::from_secs(1));
        let asked = [3, 0, 4, 1].map(|place| submission.jobs[place]);
        let claim = farm.claim("ann", &asked).await;
        assert_eq!(claim.deferred, []);
        assert_eq!(claim.claimed.iter().map(|job| job.lease.job_id).collect::<Vec<_>>(), asked);
        let tokens: HashSet<LeaseToken> = claim.claimed.iter().map(|job| job.lease.token).collect();
        assert_eq!(tokens.len(), 4);
        let lease = &claim.claimed[0].lease;
        assert_eq!((lease.submission_id, lease.attempt, lease.expires_at), (submission.id, 1, farm.now() + LEASE));

        let job = farm.job(asked[0]).await;
        assert_eq!(claim.claimed[0].spec, job.spec);
        assert_eq!((job.state, job.attempts, job.started_at), (JobState::Leased, 1, Some(farm.now())));
        assert_eq!(job.worker, Some(worker("ann")));
        assert_eq!(farm.counters(&submission).await, Counters { queued: 1, leased: 4, ..Counters::default() });
    }

    async fn a_claim_steals_nothing(farm: &TestFarm) {
        let submission = farm.submit(4).await;
        farm.dispatch().await;
        let [leased, done, cancelled, unknown] =
            [submission.jobs[0], submission.jobs[1], submission.jobs[2], JobId::new()];
        let leases = farm.claim("ann", &[leased, done]).await.claimed;
        assert!(farm.finish(&leases[1].lease).await);
        farm.store.cancel_job(cancelled).await.unwrap();
        let before = farm.counters(&submission).await;
        let claim = farm.claim("bob", &[leased, done, cancelled, unknown]).await;
        assert!(claim.claimed.is_empty() && claim.deferred.is_empty(), "{claim:?}");
        assert_eq!(farm.counters(&submission).await, before);
        assert_eq!(farm.job(leased).await.worker, Some(worker("ann")));
    }

    async fn a_job_asked_for_twice_is_leased_once(farm: &TestFarm) {
        let submission = farm.submit(1).await;
        let twice = [submission.jobs[0], submission.jobs[0]];
        assert_eq!(farm.claim("ann", &twice).await.claimed.len(), 1);
        assert_eq!(farm.job(twice[0]).await.attempts, 1);
    }

    async fn an_empty_window_is_no_claim(farm: &TestFarm) {
        assert!(farm.claim("ann", &[]).await.claimed.is_empty());
    }

    async fn a_delivery_may_overtake_the_dispatchers_commit(farm: &TestFarm) {
        let submission = farm.submit(3).await;
        let gate = Gate::default();
        let broker = RecordingBroker::behind(&gate);
        let demo = queue("demo", Lane::Bulk);
        let dispatch = farm.store.dispatch(&demo, 10, &broker);
        let claim = async {
            gate.arrived.notified().await;
            let claim = farm.claim("ann", &submission.jobs);
            tokio::pin!(claim);
            // It waits for the rows (or the writer) that the dispatcher holds, however long it is given.
            assert!(tokio::time::timeout(Duration::from_millis(100), &mut claim).await.is_err());
            gate.open.notify_one();
            claim.await
        };
        let (dispatched, claim) = tokio::join!(dispatch, claim);
        assert_eq!((dispatched.unwrap(), claim.claimed.len()), (3, 3));
        assert_eq!(farm.counters(&submission).await, Counters { leased: 3, ..Counters::default() });
    }

    async fn a_job_whose_dispatcher_died_after_publishing_can_be_claimed(farm: &TestFarm) {
        let submission = farm.submit(1).await;
        assert_eq!(farm.claim("ann", &submission.jobs).await.claimed.len(), 1);
        assert_eq!(farm.counters(&submission).await, Counters { leased: 1, ..Counters::default() });
    }

    async fn a_job_in_back_off_is_not_claimed_by_a_stale_delivery(farm: &TestFarm) {
        let (submission, leases) = farm.lease(1).await;
        farm.fail("ann", &leases[0], FailureKind::Retryable).await;
        assert!(farm.claim("bob", &submission.jobs).await.claimed.is_empty());
        farm.clock.advance(Duration::from_secs(2));
        assert_eq!(farm.claim("bob", &submission.jobs).await.claimed.len(), 1);
    }

    async fn each_claim_has_its_own_token_and_attempt(farm: &TestFarm) {
        let (submission, leases) = farm.lease(1).await;
        farm.fail("ann", &leases[0], FailureKind::Retryable).await;
        farm.clock.advance(Duration::from_secs(2));
        let second = farm.claim("bob", &submission.jobs).await.claimed.remove(0).lease;
        assert_eq!((leases[0].attempt, second.attempt), (1, 2));
        assert_ne!(leases[0].token, second.token);
    }

    async fn of_eight_claims_of_a_window_at_once_each_job_goes_to_one(farm: &TestFarm) {
        let submission = farm.submit(64).await;
        farm.dispatch().await;
        let names: Vec<String> = (0..8).map(|number| format!("worker-{number}")).collect();
        let claims = future::join_all(names.iter().enumerate().map(|(turn, name)| {
            let mut window = submission.jobs.clone();
            window.rotate_left(turn * 8);
            async move { farm.claim(name, &window).await }
        }))
        .await;
        let mut claimed: Vec<JobId> =
            claims.iter().flat_map(|claim| claim.claimed.iter().map(|job| job.lease.job_id)).collect();
        claimed.sort();
        assert_eq!(claimed, submission.jobs);
        assert_eq!(farm.counters(&submission).await, Counters { leased: 64, ..Counters::default() });
    }

    async fn a_job_is_deferred_while_another_worker_could_take_it(farm: &TestFarm) {
        let (submission, lease) = failed_by_ann(farm).await;
        beat(farm, status("ann")).await;
        beat(farm, status("bob")).await;
        farm.dispatch().await;
        let claim = farm.claim("ann", &submission.jobs).await;
        assert_eq!((claim.claimed.len(), claim.deferred), (0, submission.jobs.clone()));
        assert_eq!(farm.counters(&submission).await, Counters { pending: 1, ..Counters::default() });
        assert_eq!(farm.job(lease.job_id).await.attempts, 1, "a deferral is no attempt");
        assert_eq!(farm.dispatch().await, 0, "it waits a moment, so that the other can come first");
        farm.clock.advance(Duration::from_secs(2));
        assert_eq!(farm.dispatch().await, 1);
        assert_eq!(farm.claim("bob", &submission.jobs).await.claimed.len(), 1);
    }

    async fn a_job_is_not_deferred_for_workers_that_are_gone_or_draining(farm: &TestFarm) {
        let (submission, _) = failed_by_ann(farm).await;
        beat(farm, status("silent")).await;
        farm.clock.advance(Duration::from_secs(31));
        beat(farm, status("left")).await;
        farm.store.goodbye(&worker("left")).await.unwrap();
        beat(farm, WorkerStatus { draining: true, ..status("draining") }).await;
        beat(farm, status("ann")).await;
        assert_eq!(farm.claim("ann", &submission.jobs).await.claimed.len(), 1);
    }

    async fn a_job_that_all_live_workers_have_failed_goes_to_any(farm: &TestFarm) {
        let (submission, _) = failed_by_ann(farm).await;
        let lease = farm.claim("bob", &submission.jobs).await.claimed.remove(0).lease;
        farm.fail("bob", &lease, FailureKind::Retryable).await;
        farm.clock.advance(Duration::from_secs(4));
        beat(farm, status("ann")).await;
        beat(farm, status("bob")).await;
        assert_eq!(farm.claim("ann", &submission.jobs).await.claimed.len(), 1);
    }
}

/// A job that `ann` has failed, due again.
async fn failed_by_ann(farm: &TestFarm) -> (super::harness::Submission, Lease) {
    let (submission, leases) = farm.lease(1).await;
    assert_eq!(farm.fail("ann", &leases[0], FailureKind::Retryable).await, Some(JobState::Pending));
    farm.clock.advance(Duration::from_secs(2));
    (submission, leases[0].clone())
}

async fn beat(farm: &TestFarm, status: WorkerStatus) {
    farm.store.heartbeat(&status, &[], LEASE).await.unwrap();
}
