//! Workers: heartbeats, who is alive, who serves what.

use std::time::Duration;

use farm::job::{Lane, Lease};
use farm::store::{Demand, Heartbeat, TextStatus, WorkerStatus, WorkerView};
use futures_util::future;

use super::harness::{LEASE, new_submission, spec, status, worker};
use super::on_each_store;

on_each_store! {
    async fn a_heartbeat_renews_the_leases_that_hold_and_names_the_others(farm: &TestFarm) {
        let (_, leases) = farm.lease(3).await;
        farm.clock.advance(LEASE / 2);
        farm.store.release(&leases[..1]).await.unwrap();
        farm.store.cancel_job(leases[2].job_id).await.unwrap();
        let heartbeat = farm.store.heartbeat(&status("ann"), &leases, LEASE).await.unwrap();
        let expected = Heartbeat { lost: vec![leases[0].job_id], cancelled: vec![leases[2].job_id] };
        assert_eq!(heartbeat, expected);
        farm.clock.advance(LEASE - Duration::from_micros(1));
        assert!(farm.finish(&leases[1]).await, "renewed");
    }

    async fn a_heartbeat_without_leases_still_counts(farm: &TestFarm) {
        assert_eq!(farm.store.heartbeat(&status("ann"), &[], LEASE).await.unwrap(), Heartbeat::default());
        assert_eq!(farm.store.workers().await.unwrap().len(), 1);
    }

    async fn a_renewal_revives_no_lease_that_expired(farm: &TestFarm) {
        let (_, leases) = farm.lease(1).await;
        farm.clock.advance(LEASE);
        let heartbeat = farm.store.heartbeat(&status("ann"), &leases, LEASE).await.unwrap();
        assert_eq!(heartbeat.lost, [leases[0].job_id]);
    }

    async fn renewing_and_finishing_at_once_get_along(farm: &TestFarm) {
        let (submission, leases) = farm.lease(64).await;
        let mut backwards: Vec<Lease> = leases.clone();
        backwards.reverse();
        let renew = async {
            for _ in 0..10 {
                farm.store.heartbeat(&status("ann"), &leases, LEASE).await.unwrap();
            }
        };
        let finish = async {
            for window in backwards.chunks(8) {
                let results: Vec<_> = window.iter().map(super::harness::finished).collect();
                assert_eq!(farm.store.finish(&results).await.unwrap().len(), 8);
            }
        };
        tokio::join!(renew, finish);
        assert_eq!(farm.counters(&submission).await.done, 64);
    }

    async fn a_worker_is_known_by_what_it_last_said(farm: &TestFarm) {
        let born = farm.now();
        farm.store.heartbeat(&status("ann"), &[], LEASE).await.unwrap();
        farm.clock.advance(Duration::from_secs(3));
        let busy = WorkerStatus {
            device: "cuda:0 NVIDIA H200".into(),
            serving: Some("sdxl".into()),
            warm: Some("sdxl".into()),
            rows: 8,
            done: 100,
            failed: 2,
            loads: 3,
            draining: true,
            text: TextStatus {
                embedding_hits: 190,
                embedding_misses: 10,
                embedding_bytes: 1 << 28,
                encoder_reads: 2,
                encoder_bytes: 9 << 30,
            },
            ..status("ann")
        };
        farm.store.heartbeat(&busy, &[], LEASE).await.unwrap();
        let view = WorkerView { status: busy, started_at: born, last_seen: farm.now(), alive: true };
        assert_eq!(farm.store.workers().await.unwrap(), [view]);
    }

    async fn a_worker_is_alive_until_it_is_silent_for_too_long(farm: &TestFarm) {
        farm.store.heartbeat(&status("zoe"), &[], LEASE).await.unwrap();
        farm.clock.advance(Duration::from_secs(30));
        farm.store.heartbeat(&status("ann"), &[], LEASE).await.unwrap();
        let alive = async || -> Vec<(String, bool)> {
            let views = farm.store.workers().await.unwrap();
            views.into_iter().map(|view| (view.status.worker_id.0, view.alive)).collect()
        };
        assert_eq!(alive().await, [("ann".into(), true), ("zoe".into(), true)]);
        farm.clock.advance(Duration::from_micros(1));
        farm.store.heartbeat(&status("bob"), &[], LEASE).await.unwrap();
        assert_eq!(alive().await, [("ann".into(), true), ("bob".into(), true), ("zoe".into(), false)]);
        farm.clock.advance(Duration::from_secs(24 * 3600));
        assert_eq!(alive().await, [], "not listed after a day");
        farm.store.goodbye(&worker("any")).await.unwrap();
        assert_eq!(farm.execute("DELETE FROM workers").await.unwrap(), 1, "and swept away by the next goodbye");
    }

    async fn after_its_goodbye_a_worker_stays_away(farm: &TestFarm) {
        farm.store.heartbeat(&status("ann"), &[], LEASE).await.unwrap();
        farm.store.goodbye(&worker("ann")).await.unwrap();
        farm.store.goodbye(&worker("nobody")).await.unwrap();
        farm.store.heartbeat(&status("ann"), &[], LEASE).await.unwrap();
        assert!(!farm.store.workers().await.unwrap()[0].alive, "a heartbeat that was on its way revives nobody");
    }

    async fn a_placement_sees_demand_and_fleet_and_is_recorded(farm: &TestFarm) {
        farm.submit_specs(new_submission(), vec![spec("sdxl", Lane::Bulk); 2]).await;
        farm.store.heartbeat(&status("ann"), &[], LEASE).await.unwrap();
        let now = farm.now();
        let decide = |demand: &[Demand], fleet: &[WorkerView], at: chrono::DateTime<chrono::Utc>| {
            assert_eq!((demand.len(), demand[0].waiting, fleet.len(), at), (1, 2, 1, now));
            Some(demand[0].queue.model.clone())
        };
        assert_eq!(farm.store.place(&worker("ann"), &decide).await.unwrap().as_deref(), Some("sdxl"));
        let ann = farm.store.workers().await.unwrap().remove(0);
        assert_eq!(ann.status.serving.as_deref(), Some("sdxl"));
        assert_eq!(ann.status.device, "cpu");
        assert_eq!(farm.store.place(&worker("ann"), &|_, _, _| None).await.unwrap(), None);
        assert_eq!(farm.store.workers().await.unwrap()[0].status.serving, None);
    }

    async fn placements_at_once_are_decided_one_after_the_other(farm: &TestFarm) {
        let models = ["a", "b", "c", "d", "e"];
        farm.submit_specs(new_submission(), models.map(|model| spec(model, Lane::Bulk)).to_vec()).await;
        let unserved = |demand: &[Demand], fleet: &[WorkerView], _| {
            let is_served = |model: &str| fleet.iter().any(|view| view.status.serving.as_deref() == Some(model));
            demand.iter().map(|one| one.queue.model.clone()).find(|model| !is_served(model))
        };
        let names = ["1", "2", "3", "4", "5"].map(worker);
        let placed = future::join_all(names.iter().map(|name| farm.store.place(name, &unserved))).await;
        let mut placed: Vec<String> = placed.into_iter().map(|place| place.unwrap().unwrap()).collect();
        placed.sort();
        assert_eq!(placed, models);
    }
}
