//! From the store to the broker, and back when the broker has lost something.

use std::time::Duration;

use farm::broker::BrokerError;
use farm::job::{Counters, FailureKind, JobState, Lane};
use farm::store::{DEMAND_BOUND, Demand, StoreError};

use super::harness::{LEASE, RecordingBroker, new_submission, queue, spec, worker};
use super::on_each_store;

on_each_store! {
    async fn due_jobs_are_published_oldest_first_and_become_queued(farm: &TestFarm) {
        let older = farm.submit(3).await;
        farm.clock.advance(Duration::from_secs(1));
        let newer = farm.submit(3).await;
        let demo = queue("demo", Lane::Bulk);
        assert_eq!(farm.store.dispatch(&demo, 4, &farm.broker).await.unwrap(), 4);
        let published = farm.broker.take();
        let ids: Vec<_> = published.iter().map(|message| message.job_id).collect();
        assert_eq!(ids, [older.jobs.as_slice(), &newer.jobs[..1]].concat());
        assert_eq!((published[0].attempts, published[0].batch_key.width), (0, 128));
        assert_eq!(published[0].spec, spec("demo", Lane::Bulk));

        let job = farm.job(older.jobs[0]).await;
        assert_eq!((job.state, job.queued_at), (JobState::Queued, Some(farm.now())));
        assert_eq!(farm.counters(&newer).await, Counters { pending: 2, queued: 1, ..Counters::default() });
        assert_eq!(farm.dispatch().await, 2);
        assert_eq!(farm.broker.take_ids(), newer.jobs[1..]);
        assert_eq!(farm.dispatch().await, 0);
    }

    async fn a_queue_is_dispatched_for_itself(farm: &TestFarm) {
        let specs = vec![spec("demo", Lane::Interactive), spec("demo", Lane::Bulk), spec("other", Lane::Bulk)];
        let submission = farm.submit_specs(new_submission(), specs).await;
        assert_eq!(farm.dispatch().await, 1);
        assert_eq!(farm.broker.take_ids(), submission.jobs[1..2]);
    }

    async fn what_the_broker_does_not_confirm_stays_pending(farm: &TestFarm) {
        let submission = farm.submit(4).await;
        let refused = submission.jobs[2];
        let broker = RecordingBroker::that_says(move |message| Ok(message.job_id != refused));
        assert_eq!(farm.store.dispatch(&queue("demo", Lane::Bulk), 10, &broker).await.unwrap(), 3);
        assert_eq!(farm.state(refused).await, JobState::Pending);
        assert_eq!(farm.counters(&submission).await, Counters { pending: 1, queued: 3, ..Counters::default() });
    }

    async fn a_broker_that_is_down_leaves_all_pending(farm: &TestFarm) {
        let submission = farm.submit(2).await;
        let broker = RecordingBroker::that_says(|_| Err(BrokerError::Unavailable("nobody answers".into())));
        let error = farm.store.dispatch(&queue("demo", Lane::Bulk), 10, &broker).await.unwrap_err();
        assert!(matches!(error, StoreError::Unavailable(_)), "{error:?}");
        assert_eq!(farm.states(&submission).await, [JobState::Pending; 2]);
        assert_eq!(farm.dispatch().await, 2);
    }

    async fn dispatchers_at_once_publish_each_job_once(farm: &TestFarm) {
        let submission = farm.submit(200).await;
        let demo = queue("demo", Lane::Bulk);
        let dispatch = async || {
            let mut marked = 0;
            loop {
                // Another dispatcher may hold all that is left without having marked it yet.
                match farm.store.dispatch(&demo, 15, &farm.broker).await.unwrap() {
                    0 => return marked,
                    jobs => marked += jobs,
                }
            }
        };
        let (one, two, three) = tokio::join!(dispatch(), dispatch(), dispatch());
        assert_eq!(one + two + three, 200);
        let mut published = farm.broker.take_ids();
        published.sort();
        assert_eq!(published, submission.jobs);
        assert_eq!(farm.counters(&submission).await.queued, 200);
    }

    async fn a_failed_job_is_not_published_before_its_back_off_ends(farm: &TestFarm) {
        let (_, leases) = farm.lease(1).await;
        farm.fail("ann", &leases[0], FailureKind::Retryable).await;
        farm.broker.take();
        farm.clock.advance(Duration::from_millis(1999));
        assert_eq!(farm.dispatch().await, 0);
        assert_eq!(farm.store.demand().await.unwrap(), []);
        farm.clock.advance(Duration::from_millis(1));
        assert_eq!(farm.dispatch().await, 1);
        assert_eq!(farm.broker.take()[0].attempts, 1);
    }

    async fn demand_tells_what_waits_by_checkpoint_and_lane(farm: &TestFarm) {
        assert_eq!(farm.store.demand().await.unwrap(), []);
        let first = farm.now();
        let older = vec![spec("b", Lane::Bulk), spec("b", Lane::Bulk), spec("a", Lane::Bulk), spec("c", Lane::Bulk)];
        let older = farm.submit_specs(new_submission(), older).await;
        farm.clock.advance(Duration::from_secs(5));
        let newer = vec![spec("b", Lane::Interactive), spec("b", Lane::Bulk), spec("a", Lane::Bulk)];
        farm.submit_specs(new_submission(), newer).await;
        farm.store.dispatch(&queue("b", Lane::Bulk), 1, &farm.broker).await.unwrap();
        // The only job of `c` is leased: nothing waits.
        farm.store.claim(&worker("ann"), &older.jobs[3..], LEASE).await.unwrap();

        let waits = |model: &str, lane, waiting, queued, oldest| Demand { queue: queue(model, lane), waiting, queued, oldest };
        let expected = [
            waits("a", Lane::Bulk, 2, 0, first),
            waits("b", Lane::Interactive, 1, 0, farm.now()),
            waits("b", Lane::Bulk, 3, 1, first),
        ];
        assert_eq!(farm.store.demand().await.unwrap(), expected);
    }

    async fn demand_counts_up_to_its_bound(farm: &TestFarm) {
        farm.submit(DEMAND_BOUND as usize + 5).await;
        farm.store.dispatch(&queue("demo", Lane::Bulk), 3, &farm.broker).await.unwrap();
        let demand = farm.store.demand().await.unwrap();
        assert_eq!((demand[0].waiting, demand[0].queued), (DEMAND_BOUND, 3));
    }

    async fn what_the_broker_has_lost_goes_back_to_pending(farm: &TestFarm) {
        let lost = farm.submit(3).await;
        farm.dispatch().await;
        farm.clock.advance(Duration::from_secs(10));
        let fresh = farm.submit(2).await;
        farm.dispatch().await;
        let (demo, before) = (queue("demo", Lane::Bulk), farm.now());
        assert_eq!(farm.store.queued_since(&demo, before).await.unwrap(), 3);
        assert_eq!(farm.store.queued_since(&queue("demo", Lane::Interactive), before).await.unwrap(), 0);
        assert_eq!(farm.store.requeue(&demo, before).await.unwrap(), 3);
        assert_eq!(farm.states(&lost).await, [JobState::Pending; 3]);
        assert_eq!(farm.states(&fresh).await, [JobState::Queued; 2]);
        assert_eq!(farm.counters(&lost).await, Counters { pending: 3, ..Counters::default() });
        assert_eq!(farm.store.requeue(&demo, before).await.unwrap(), 0);
        farm.broker.take();
        assert_eq!(farm.dispatch().await, 3);
        assert_eq!(farm.broker.take_ids(), lost.jobs);
    }
}
