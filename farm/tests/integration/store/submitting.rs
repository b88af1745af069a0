//! Storing submissions.

use farm::id::{JobId, SubmissionId};
use farm::job::{Counters, Idempotency, JobState, Lane, NewJob, NewSubmission};
use farm::store::{JobFilter, StoreError, Submitted};
use futures_util::{StreamExt, future, stream};

use super::harness::{new_submission, spec};
use super::on_each_store;

fn keyed(key: &str, request_hash: &str) -> NewSubmission {
    let idempotency = Some(Idempotency { key: key.into(), request_hash: request_hash.into() });
    NewSubmission { idempotency, ..new_submission() }
}

on_each_store! {
    async fn a_submission_is_stored_whole_with_its_jobs_pending(farm: &TestFarm) {
        let mut wanted = spec("demo", Lane::Interactive);
        wanted.tags = vec!["night".into(), "stars".into()];
        wanted.metadata = serde_json::json!({"sku": 17, "nested": {"list": [1.5, null, "x"]}}).as_object().unwrap().clone();
        wanted.seed = i64::MAX as u64;
        let named = NewSubmission { name: Some("catalogue".into()), ..new_submission() };
        let submission = farm.submit_specs(named, vec![wanted.clone(), spec("other", Lane::Bulk)]).await;

        let job = farm.job(submission.jobs[0]).await;
        assert_eq!((job.submission_id, job.index, job.state), (submission.id, 0, JobState::Pending));
        assert_eq!((job.attempts, job.worker, job.image_key, job.error), (0, None, None, None));
        assert_eq!((job.created_at, job.queued_at, job.finished_at), (farm.now(), None, None));
        assert_eq!(job.spec, wanted);
        assert_eq!(farm.job(submission.jobs[1]).await.index, 1);

        let view = farm.store.submission(submission.id).await.unwrap().unwrap();
        assert_eq!((view.name.as_deref(), view.created_at), (Some("catalogue"), farm.now()));
        assert_eq!((view.finished_at, view.rate, view.eta_seconds), (None, None, None));
        assert_eq!(view.counters, Counters { pending: 2, ..Counters::default() });
        assert_eq!(farm.store.totals().await.unwrap(), view.counters);
    }

    async fn texts_come_back_as_they_were_sent(farm: &TestFarm) {
        let mut odd = spec("demo", Lane::Bulk);
        odd.prompt = "it's \"quoted\", \\u0000 spelt out, 二つ 🌟\n\ttab \u{1}\u{7f}\u{2028} $1 ?1 {} [,]".into();
        odd.negative_prompt = "'; DROP TABLE jobs; --".into();
        odd.tags = vec!["a,b".into(), "\"".into(), "ü".into(), "a,b".into()];
        let submission = farm.submit_specs(new_submission(), vec![odd.clone()]).await;
        assert_eq!(farm.job(submission.jobs[0]).await.spec, odd);
        let tagged = JobFilter { tag: Some("a,b".into()), limit: 10, ..Default::default() };
        assert_eq!(farm.store.jobs(&tagged).await.unwrap().len(), 1);
    }

    async fn a_submission_of_several_chunks_keeps_its_order(farm: &TestFarm) {
        let mut specs = vec![spec("demo", Lane::Bulk); 4500];
        for (place, spec) in specs.iter_mut().enumerate() {
            spec.seed = place as u64;
        }
        let submission = farm.submit_specs(new_submission(), specs).await;
        for place in [0, 1999, 2000, 4499] {
            let job = farm.job(submission.jobs[place]).await;
            assert_eq!((job.index, job.spec.seed), (place as u64, place as u64));
        }
        assert_eq!(farm.counters(&submission).await.pending, 4500);
        assert_eq!(farm.texts("SELECT CAST(jobs AS text) FROM submissions").await, [Some("4500".into())]);
    }

    async fn long_prompts_are_stored_too(farm: &TestFarm) {
        let mut long = spec("demo", Lane::Bulk);
        long.prompt = "word ".repeat(2000);
        let submission = farm.submit_specs(new_submission(), vec![long.clone(); 700]).await;
        assert_eq!(farm.job(submission.jobs[699]).await.spec, long);
        assert_eq!(farm.counters(&submission).await.pending, 700);
    }

    async fn a_stream_that_breaks_at_job_48213_leaves_nothing(farm: &TestFarm) {
        let submission = new_submission();
        let jobs = stream::iter(1..).map(|line| match line {
            48_213 => Err("line 48213: expected a comma".into()),
            _ => Ok(NewJob { id: JobId::new(), spec: spec("demo", Lane::Bulk) }),
        });
        let error = farm.store.submit(&submission, Box::pin(jobs)).await.unwrap_err();
        assert!(matches!(error, StoreError::Source(_)), "{error:?}");
        assert_eq!(error.to_string(), "the submission was not stored: line 48213: expected a comma");
        assert!(farm.store.submission(submission.id).await.unwrap().is_none());
        assert_eq!(farm.recount(None).await, Counters::default());
        assert_eq!(farm.store.totals().await.unwrap(), Counters::default());
    }

    async fn a_submission_without_jobs_is_refused(farm: &TestFarm) {
        let error = farm.store.submit(&new_submission(), Box::pin(stream::empty())).await.unwrap_err();
        assert_eq!(error.to_string(), "the submission was not stored: a submission must have at least 1 job, but has 0");
    }

    async fn a_request_that_comes_again_stores_nothing_new(farm: &TestFarm) {
        let first = farm.submit_specs(keyed("key", "hash"), vec![spec("demo", Lane::Bulk); 3]).await;
        let again = farm.store.submit(&keyed("key", "hash"), one_job()).await.unwrap();
        assert_eq!(again, Submitted::Existing { submission_id: first.id, first_job: first.jobs[0] });
        assert_eq!(farm.recount(None).await.total(), 3);
        assert_eq!(farm.store.totals().await.unwrap().total(), 3);
    }

    async fn a_key_with_another_request_is_a_conflict(farm: &TestFarm) {
        farm.submit_specs(keyed("key", "hash"), vec![spec("demo", Lane::Bulk)]).await;
        assert_eq!(farm.store.submit(&keyed("key", "other"), one_job()).await.unwrap(), Submitted::Conflict);
        assert_eq!(farm.recount(None).await.total(), 1);
    }

    async fn an_earlier_request_can_be_asked_for(farm: &TestFarm) {
        let ask = |hash: &str| Idempotency { key: "key".into(), request_hash: hash.into() };
        assert_eq!(farm.store.find_idempotent(&ask("hash")).await.unwrap(), None);
        let first = farm.submit_specs(keyed("key", "hash"), vec![spec("demo", Lane::Bulk)]).await;
        let existing = Submitted::Existing { submission_id: first.id, first_job: first.jobs[0] };
        assert_eq!(farm.store.find_idempotent(&ask("hash")).await.unwrap(), Some(existing));
        assert_eq!(farm.store.find_idempotent(&ask("other")).await.unwrap(), Some(Submitted::Conflict));
    }

    async fn of_identical_requests_at_once_one_is_created(farm: &TestFarm) {
        let submissions: Vec<NewSubmission> = (0..6).map(|_| keyed("key", "hash")).collect();
        let outcomes = future::join_all(submissions.iter().map(|one| farm.store.submit(one, one_job()))).await;
        let mut created: Vec<SubmissionId> = Vec::new();
        let mut existing: Vec<SubmissionId> = Vec::new();
        for (submission, outcome) in submissions.iter().zip(outcomes) {
            match outcome.unwrap() {
                Submitted::Created { jobs: 1 } => created.push(submission.id),
                Submitted::Existing { submission_id, .. } => existing.push(submission_id),
                other => panic!("{other:?}"),
            }
        }
        assert_eq!(created.len(), 1);
        assert_eq!(existing, vec![created[0]; 5]);
        assert_eq!(farm.recount(None).await.total(), 1);
    }
}

fn one_job() -> farm::store::JobStream<'static> {
    Box::pin(stream::iter([Ok(NewJob { id: JobId::new(), spec: spec("demo", Lane::Bulk) })]))
}
