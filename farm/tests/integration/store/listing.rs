//! What clients read.

use std::time::Duration;

use farm::id::{JobId, SubmissionId};
use farm::job::{Counters, FailureKind, JobState, Lane, NewSubmission};
use farm::store::JobFilter;

use super::harness::{TestFarm, new_submission, spec};
use super::on_each_store;

on_each_store! {
    async fn what_does_not_exist_is_none(farm: &TestFarm) {
        assert!(farm.store.job(JobId::new()).await.unwrap().is_none());
        assert!(farm.store.submission(SubmissionId::new()).await.unwrap().is_none());
        assert_eq!(farm.store.submissions(None, 10).await.unwrap().len(), 0);
        assert_eq!(farm.store.jobs(&JobFilter { limit: 10, ..Default::default() }).await.unwrap().len(), 0);
        assert_eq!(farm.store.totals().await.unwrap(), Counters::default());
    }

    async fn every_filter_and_every_pair_lists_exactly_what_matches_page_by_page(farm: &TestFarm) {
        let submissions = mixed_jobs(farm).await;
        let all = JobFilter { limit: 1000, ..Default::default() };
        let every_job = farm.store.jobs(&all).await.unwrap();
        assert_eq!(every_job.len(), 24);
        for submission_id in [None, Some(submissions[0]), Some(submissions[1])] {
            for state in [None, Some(JobState::Pending), Some(JobState::Cancelled), Some(JobState::Done)] {
                for model in [None, Some("a"), Some("b")] {
                    for tag in [None, Some("even"), Some("third"), Some("none")] {
                        let model = model.map(String::from);
                        let tag = tag.map(String::from);
                        let filter = JobFilter { submission_id, state, model, tag, after: None, limit: 3 };
                        let expected: Vec<JobId> = every_job
                            .iter()
                            .filter(|job| filter.submission_id.is_none_or(|id| id == job.submission_id))
                            .filter(|job| filter.state.is_none_or(|state| state == job.state))
                            .filter(|job| filter.model.as_ref().is_none_or(|model| *model == job.spec.model))
                            .filter(|job| filter.tag.as_ref().is_none_or(|tag| job.spec.tags.contains(tag)))
                            .map(|job| job.job_id)
                            .collect();
                        assert_eq!(pages(farm, filter.clone()).await, expected, "{filter:?}");
                    }
                }
            }
        }
    }

    async fn submissions_are_listed_newest_first(farm: &TestFarm) {
        let mut ids = Vec::new();
        for jobs in 1..=5 {
            let named = NewSubmission { name: Some(format!("{jobs} jobs")), ..new_submission() };
            ids.push(farm.submit_specs(named, vec![spec("demo", Lane::Bulk); jobs]).await.id);
        }
        ids.reverse();
        let first = farm.store.submissions(None, 3).await.unwrap();
        assert_eq!(first.iter().map(|view| view.submission_id).collect::<Vec<_>>(), ids[..3]);
        assert_eq!((first[0].name.as_deref(), first[0].counters.pending), (Some("5 jobs"), 5));
        let second = farm.store.submissions(Some(ids[2]), 3).await.unwrap();
        assert_eq!(second.iter().map(|view| view.submission_id).collect::<Vec<_>>(), ids[3..]);
    }

    async fn rate_and_eta_follow_the_last_two_minutes(farm: &TestFarm) {
        let (submission, leases) = farm.lease(100).await;
        let view = async || farm.store.submission(submission.id).await.unwrap().unwrap();
        farm.clock.advance(Duration::from_secs(10));
        for lease in &leases[..20] {
            farm.finish(lease).await;
        }
        assert_eq!((view().await.rate, view().await.eta_seconds), (Some(2.0), Some(40.0)), "20 in 10 s");
        farm.clock.advance(Duration::from_secs(30));
        assert_eq!(view().await.rate, Some(2.0), "as of the last job that was done");
        assert_eq!(farm.store.release(&leases[20..]).await.unwrap(), 80);
        farm.clock.advance(Duration::from_secs(50));
        let again = farm.claim("bob", &submission.jobs[20..60]).await.claimed;
        for job in &again {
            farm.finish(&job.lease).await;
        }
        assert_eq!(view().await.rate, Some(60.0 / 90.0), "both minutes, from the submission on");
        farm.clock.advance(Duration::from_secs(3600));
        let last = farm.claim("cid", &submission.jobs[60..]).await.claimed;
        for job in &last {
            farm.finish(&job.lease).await;
        }
        assert_eq!((view().await.rate, view().await.eta_seconds), (Some(40.0 / 90.0), None));
        assert_eq!(view().await.counters.done, 100);
    }

    async fn the_view_job_status_tells_it_all(farm: &TestFarm) {
        let (submission, leases) = farm.lease(3).await;
        farm.clock.advance(Duration::from_millis(1500));
        farm.finish(&leases[0]).await;
        farm.fail("ann", &leases[1], FailureKind::Invalid).await;
        let read = async |columns: &str| {
            farm.texts(&format!("SELECT CAST({columns} AS text) FROM job_status ORDER BY job_id")).await
        };
        let some = |text: &str| Some(text.to_owned());
        assert_eq!(read("job_id").await, submission.jobs.iter().map(|job| some(&job.to_string())).collect::<Vec<_>>());
        assert_eq!(read("submission_id").await, vec![some(&submission.id.to_string()); 3]);
        assert_eq!(read("state").await, [some("done"), some("failed"), some("leased")]);
        assert_eq!(read("model").await, vec![some("demo"); 3]);
        assert_eq!(read("prompt").await, vec![some("a small red star"); 3]);
        assert_eq!(read("seed").await, vec![some("42"); 3]);
        assert_eq!(read("attempts").await, vec![some("1"); 3]);
        assert_eq!(read("image_key").await[0], Some(super::harness::finished(&leases[0]).image_key));
        assert_eq!(read("error").await, [None, some("it did not work"), None]);
        for (column, time) in [("created_at", "08:00:00"), ("queued_at", "08:00:00"), ("started_at", "08:00:00")] {
            assert!(read(column).await.iter().all(|text| text.as_ref().unwrap().contains(time)), "{column}");
        }
        let finished_at = read("finished_at").await;
        assert!(finished_at[0].as_ref().unwrap().contains("08:00:01.5"), "{finished_at:?}");
        assert_eq!(finished_at[2], None);
    }
}

/// 24 jobs in two submissions: two checkpoints, tags, and every state in between.
async fn mixed_jobs(farm: &TestFarm) -> [SubmissionId; 2] {
    let mut ids = Vec::new();
    for _ in 0..2 {
        let mut specs = Vec::new();
        for number in 0..12 {
            let mut spec = spec(if number < 5 { "a" } else { "b" }, Lane::Bulk);
            spec.tags.extend((number % 2 == 0).then(|| "even".to_owned()));
            spec.tags.extend((number % 3 == 0).then(|| "third".to_owned()));
            specs.push(spec);
        }
        let submission = farm.submit_specs(new_submission(), specs).await;
        for place in [0, 3, 6] {
            farm.store.cancel_job(submission.jobs[place]).await.unwrap();
        }
        for job in farm.claim("ann", &[2, 4, 8, 10].map(|place: usize| submission.jobs[place])).await.claimed {
            assert!(farm.finish(&job.lease).await);
        }
        ids.push(submission.id);
    }
    [ids[0], ids[1]]
}

/// All that a filter lists, read page by page.
async fn pages(farm: &TestFarm, mut filter: JobFilter) -> Vec<JobId> {
    let mut all = Vec::new();
    loop {
        let page = farm.store.jobs(&filter).await.unwrap();
        all.extend(page.iter().map(|job| job.job_id));
        if page.len() < filter.limit as usize {
            return all;
        }
        filter.after = all.last().copied();
    }
}
