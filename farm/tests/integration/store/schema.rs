//! Opening a store, its schema, and what the schema refuses.

use std::sync::Arc;
use std::time::{Duration, Instant};

use farm::clock::SystemClock;
use farm::id::JobId;
use farm::job::{Counters, FailureKind, Lane, NewJob};
use farm::store::{self, StoreError};
use futures_util::stream;

use super::harness::{LEASE, TestFarm, new_submission, on_postgres, queue, runtime, settings, spec, status};
use super::on_each_store;

on_each_store! {
    async fn a_store_that_is_there_answers(farm: &TestFarm) {
        farm.store.ping().await.unwrap();
    }

    async fn migrations_go_up_and_down_and_up_again(farm: &TestFarm) {
        farm.submit(3).await;
        store::migrate(&farm.url).await.unwrap();
        assert_eq!(farm.counters_in_all().await.pending, 3, "migrating again changes nothing");
        store::revert(&farm.url, 0).await.unwrap();
        let error = farm.store.ping().await.unwrap_err();
        assert!(matches!(error, StoreError::Schema { found: 0, .. }), "{error:?}");
        assert!(farm.execute("SELECT 1 FROM jobs").await.is_err(), "the tables are gone");
        store::migrate(&farm.url).await.unwrap();
        farm.store.ping().await.unwrap();
        farm.submit(2).await;
        assert_eq!(farm.counters_in_all().await, Counters { pending: 2, ..Counters::default() });
    }

    async fn an_older_store_keeps_its_workers_and_jobs(farm: &TestFarm) {
        farm.submit(3).await;
        farm.store.heartbeat(&status("ann"), &[], LEASE).await.unwrap();
        store::revert(&farm.url, 1).await.unwrap();
        store::migrate(&farm.url).await.unwrap();
        assert_eq!(farm.store.workers().await.unwrap()[0].status, status("ann"));
        assert_eq!(farm.counters_in_all().await.pending, 3);
    }

    async fn a_store_newer_than_this_build_is_refused(farm: &TestFarm) {
        let newer = "INSERT INTO _sqlx_migrations (version, description, success, checksum, execution_time)
                     SELECT version + 1000, 'from the future', true, checksum, 0 FROM _sqlx_migrations
                     WHERE version = (SELECT max(version) FROM _sqlx_migrations)";
        farm.execute(newer).await.unwrap();
        let error = farm.store.ping().await.unwrap_err().to_string();
        assert!(error.starts_with("the store's schema is at version 1002, this build needs 2"), "{error}");
        let opened = store::connect(&farm.url, &settings(), Arc::new(SystemClock)).await;
        assert!(matches!(opened.err(), Some(StoreError::Schema { found: 1002, needed: 2 })));
    }

    async fn processes_that_start_at_once_migrate_once(farm: &TestFarm) {
        store::revert(&farm.url, 0).await.unwrap();
        let open = async || store::connect(&farm.url, &settings(), Arc::new(SystemClock)).await;
        let (one, two, three) = tokio::join!(open(), open(), open());
        for opened in [one, two, three] {
            opened.unwrap().ping().await.unwrap();
        }
    }

    async fn rows_that_cannot_be_are_refused(farm: &TestFarm) {
        let (_, leases) = farm.lease(4).await;
        farm.finish(&leases[0]).await;
        farm.fail("ann", &leases[1], FailureKind::Invalid).await;
        farm.store.release(&leases[2..3]).await.unwrap();
        let [done, failed, pending, leased] = [0, 1, 2, 3].map(|place: usize| leases[place].job_id);
        let impossible = [
            (pending, "state = 'waiting'"),
            (pending, "state = 'queued', queued_at = NULL"),
            (pending, "state = 'leased'"),
            (pending, "state = 'done'"),
            (pending, "state = 'failed', finished_at = created_at"),
            (pending, "state = 'cancelled'"),
            (pending, "finished_at = created_at"),
            (pending, "image_key = 'images/x.png'"),
            (pending, "attempts = -1"),
            (pending, "attempts = 4, last_attempt = 4"),
            (pending, "attempts = 2, last_attempt = 1"),
            (pending, "failed_workers = '{}'"),
            (pending, "job_index = -1"),
            (leased, "token = NULL"),
            (leased, "expires_at = NULL"),
            (leased, "worker = NULL"),
            (leased, "started_at = NULL"),
            (leased, "attempts = 0"),
            (leased, "state = 'pending'"),
            (leased, "state = 'pending', token = NULL, expires_at = NULL, cancel_requested = true"),
            (done, "image_key = NULL"),
            (done, "sidecar_key = NULL"),
            (done, "sha256 = NULL"),
            (done, "render_ms = NULL"),
            (done, "finished_at = NULL"),
            (failed, "finished_at = NULL"),
            (failed, "error_kind = NULL"),
            (failed, "error_message = NULL"),
            (failed, "error_kind = 'bad luck'"),
            (failed, "error_kind = NULL, error_message = NULL"),
        ];
        for (job, change) in impossible {
            let refused = farm.execute(&format!("UPDATE jobs SET {change} WHERE job_id = '{job}'")).await;
            let error = refused.err().unwrap_or_else(|| panic!("`{change}` was let through")).to_string();
            assert!(error.to_lowercase().contains("constraint"), "`{change}`: {error}");
        }
        let fine = farm.execute(&format!("UPDATE jobs SET attempts = 0 WHERE job_id = '{pending}'")).await;
        assert_eq!(fine.unwrap(), 1, "what is possible is let through");
        for change in ["max_attempts = 0", "failure_limit = 0", "jobs = 0", "idempotency_key = 'without a hash'"] {
            assert!(farm.execute(&format!("UPDATE submissions SET {change}")).await.is_err(), "`{change}`");
        }
    }
}

impl TestFarm {
    async fn counters_in_all(&self) -> Counters {
        self.store.totals().await.unwrap()
    }
}

#[test]
fn a_dead_server_is_unavailable_within_seconds() {
    runtime().block_on(async {
        // A port that was free a moment ago: nobody listens there.
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        drop(listener);
        let begun = Instant::now();
        let url = format!("postgres://farm@127.0.0.1:{port}/kiln");
        let error = store::connect(&url, &settings(), Arc::new(SystemClock)).await.err().unwrap();
        assert!(matches!(error, StoreError::Unavailable(_)), "{error:?}");
        assert!(begun.elapsed() < Duration::from_secs(15), "{:?}", begun.elapsed());
    });
}

#[test]
fn a_server_that_never_answers_is_unavailable_within_seconds() {
    runtime().block_on(async {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let begun = Instant::now();
        let url = format!("postgres://farm@{}/kiln", listener.local_addr().unwrap());
        let error = store::connect(&url, &settings(), Arc::new(SystemClock)).await.err().unwrap();
        assert!(matches!(error, StoreError::Unavailable(_)), "{error:?}");
        assert!(begun.elapsed() < Duration::from_secs(15), "{:?}", begun.elapsed());
    });
}

#[test]
fn an_address_of_another_kind_is_refused_without_showing_its_password() {
    runtime().block_on(async {
        let url = "mysql://ann:hunter2@db/kiln";
        let error = store::connect(url, &settings(), Arc::new(SystemClock)).await.err().unwrap().to_string();
        assert!(error.contains("must begin with `postgres://`") && error.contains("`mysql`"), "{error}");
        assert!(!error.contains("hunter2"), "{error}");
    });
}

#[test]
fn a_store_in_memory_works() {
    runtime().block_on(async {
        let clock = farm::clock::MockClock::new(chrono::Utc::now());
        let store = store::connect("sqlite::memory:", &settings(), Arc::new(clock.clone())).await.unwrap();
        let farm = TestFarm { store, clock, broker: Default::default(), url: "sqlite::memory:".into() };
        let (submission, leases) = farm.lease(3).await;
        let all = futures_util::future::join_all(leases.iter().map(|lease| farm.finish(lease))).await;
        assert_eq!(all, [true; 3]);
        assert_eq!(farm.counters(&submission).await.done, 3);
        assert_eq!(farm.store.dispatch(&queue("demo", Lane::Bulk), 10, &farm.broker).await.unwrap(), 0);
    });
}

#[test]
fn on_postgres_a_full_disk_and_a_deadlock_are_told_apart() {
    on_postgres(async |farm| {
        farm.execute(
            "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$
             BEGIN RAISE EXCEPTION USING ERRCODE = TG_ARGV[0]; END $$",
        )
        .await
        .unwrap();
        let refuse = async |code: &str| {
            let trigger = format!(
                "CREATE OR REPLACE TRIGGER refuse BEFORE INSERT ON submissions EXECUTE FUNCTION refuse('{code}')"
            );
            farm.execute(&trigger).await.unwrap();
            let job = NewJob { id: JobId::new(), spec: spec("demo", Lane::Bulk) };
            farm.store.submit(&new_submission(), Box::pin(stream::iter([Ok(job)]))).await.unwrap_err()
        };
        assert!(matches!(refuse("53100").await, StoreError::Full(_)));
        for code in ["40P01", "40001", "57P01", "08006", "53300", "55P03", "25006"] {
            assert!(matches!(refuse(code).await, StoreError::Unavailable(_)), "{code}");
        }
        assert!(matches!(refuse("23505").await, StoreError::Internal(_)));
    });
}

#[test]
fn on_postgres_a_restarted_server_costs_at_most_some_unavailable_answers() {
    on_postgres(async |farm| {
        let (_, leases) = farm.lease(1).await;
        let kill = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity
                    WHERE datname = current_database() AND pid <> pg_backend_pid()";
        farm.execute(kill).await.unwrap();
        let mut tries = 0;
        while let Err(error) = farm.store.job(leases[0].job_id).await {
            assert!(matches!(error, StoreError::Unavailable(_)), "{error:?}");
            tries += 1;
            assert!(tries <= 20);
        }
        assert!(farm.finish(&leases[0]).await);
    });
}

#[test]
fn migrating_makes_a_file_and_its_folder() {
    runtime().block_on(async {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("new").join("kiln.db");
        store::migrate(&format!("sqlite:{}", file.display())).await.unwrap();
        assert!(file.exists());
        let blocked = format!("sqlite:{}", file.join("below-a-file").join("kiln.db").display());
        let error = store::migrate(&blocked).await.unwrap_err().to_string();
        assert!(error.contains("cannot create") && error.contains("below-a-file"), "{error}");
    });
}
