//! How long a look at jobs takes when a million of them are done, against a store with next to none.

use std::future::Future;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use farm::artifact::ArtifactKey;
use farm::catalog::DEMO;
use farm::id::{JobId, SubmissionId, WorkerId};
use farm::job::{Failure, FailureKind, Finished, Lane, NewJob, NewSubmission};
use farm::spec::{Limits, RenderSpec};
use farm::store::{JobFilter, SharedStore, Submitted};
use futures_util::stream;
use serde::Serialize;
use serde::de::IgnoredAny;

use super::site::Site;
use super::stats::percentile;
use super::table::Table;
use super::{jobs, rig::Rig};
use crate::client::Client;

/// Jobs of the almost empty store.
const FEW: u64 = 100;

/// Jobs that are claimed and finished at once.
const WINDOW: usize = 1000;

/// Of so many jobs, one is made to fail.
const FAILURE_EVERY: usize = 10_000;

/// Entries of a page.
const PAGE: u32 = 100;

/// A lease that outlasts the filling.
const LEASE: Duration = Duration::from_secs(3600);

/// What was measured.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Polls {
    /// Both stores, the almost empty one first.
    pub stores: Vec<Polled>,
}

/// One store.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Polled {
    /// Finished jobs in it, all of one submission.
    pub jobs: u64,
    /// Seconds it took to submit, claim and finish them.
    pub fill_seconds: f64,
    /// Each way to look.
    pub ways: Vec<Way>,
}

/// One way to look.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Way {
    /// What is asked for.
    pub what: &'static str,
    /// How long each answer took, in milliseconds.
    pub milliseconds: Vec<f64>,
}

/// The ways to look, as a client or the store sees them.
const WAYS: [&str; 4] = [
    "GET /v1/submissions/{id}",
    "GET /v1/jobs/{id}",
    "GET /v1/jobs?submission_id=…&state=failed&limit=100",
    "store: a page of 100 jobs of the submission",
];

/// Measures `polls` looks of each kind at a store with few finished jobs and at one with `jobs`.
pub async fn measure(site: &Site, jobs: u64, polls: u32) -> Result<Polls> {
    let mut stores = Vec::new();
    for jobs in [jobs.min(FEW), jobs] {
        eprintln!("kiln: status polls, {jobs} finished jobs");
        stores.push(poll_store(site, jobs, polls).await?);
    }
    Ok(Polls { stores })
}

async fn poll_store(site: &Site, jobs: u64, polls: u32) -> Result<Polled> {
    let mut rig: Rig = site.rig().await?;
    let store = rig.ports.store.clone();
    let start = Instant::now();
    let filled = fill(&store, spec(site)?, jobs).await.context("the store cannot be filled")?;
    let fill_seconds = start.elapsed().as_secs_f64();
    let client = rig.serve().await?;
    let polling = poll(&client, &store, &filled, polls);
    let ways = rig.watch_over(polling).await?;
    rig.stop().await?;
    Ok(Polled { jobs, fill_seconds, ways })
}

fn spec(site: &Site) -> Result<RenderSpec> {
    let request = jobs::request(0, DEMO);
    Ok(request.validate(&site.catalog, &Limits::default(), Lane::Bulk, || 0)?)
}

struct Filled {
    submission: SubmissionId,
    jobs: Vec<JobId>,
}

/// Stores a submission and takes every job to its end, without rendering any.
async fn fill(store: &SharedStore, spec: RenderSpec, count: u64) -> Result<Filled> {
    let filled = Filled { submission: SubmissionId::new(), jobs: (0..count).map(|_| JobId::new()).collect() };
    let submission = NewSubmission {
        id: filled.submission,
        idempotency: None,
        name: Some("bench".into()),
        max_attempts: 1,
        failure_limit: None,
    };
    let jobs = filled.jobs.iter().zip(0..).map(|(&id, index)| {
        Ok(NewJob { id, spec: RenderSpec { prompt: jobs::prompt(index), seed: index, ..spec.clone() } })
    });
    let submitted = store.submit(&submission, Box::pin(stream::iter(jobs))).await?;
    ensure!(submitted == Submitted::Created { jobs: count }, "the store says {submitted:?}");
    let worker = WorkerId("bench".into());
    for (number, window) in filled.jobs.chunks(WINDOW).enumerate() {
        finish(store, &worker, window, number * WINDOW).await?;
    }
    let view = store.submission(filled.submission).await?.context("the submission is gone")?;
    ensure!(view.counters.finished() == count, "{} jobs are finished, not {count}", view.counters.finished());
    Ok(filled)
}

async fn finish(store: &SharedStore, worker: &WorkerId, window: &[JobId], first: usize) -> Result<()> {
    let claim = store.claim(worker, window, LEASE).await?;
    ensure!(claim.claimed.len() == window.len(), "{} jobs were claimed, not {}", claim.claimed.len(), window.len());
    let leases = claim.claimed.into_iter().map(|job| job.lease);
    let (failing, finished): (Vec<_>, Vec<_>) = leases.zip(first..).partition(|(_, index)| index % FAILURE_EVERY == 0);
    let finished: Vec<Finished> = finished
        .into_iter()
        .map(|(lease, _)| {
            let (submission_id, job_id, attempt) = (lease.submission_id, lease.job_id, lease.attempt);
            Finished {
                image_key: ArtifactKey::Image { submission_id, job_id, attempt }.path(),
                sidecar_key: ArtifactKey::Sidecar { submission_id, job_id, attempt }.path(),
                sha256: "0".repeat(64),
                render_time: Duration::from_millis(1),
                lease,
            }
        })
        .collect();
    store.finish(&finished).await?;
    let failure = Failure { kind: FailureKind::Invalid, message: "made to fail by the bench".into() };
    for (lease, _) in failing {
        store.fail(worker, &lease, &failure).await?;
    }
    Ok(())
}

async fn poll(client: &Client, store: &SharedStore, filled: &Filled, polls: u32) -> Result<Vec<Way>> {
    let mut ways = WAYS.map(|what| Way { what, milliseconds: Vec::with_capacity(polls as usize) });
    // The first look at anything warms caches and connections up; a client that polls has looked before.
    for look in 0..=polls as usize {
        // Steps through the whole submission, never the same place twice in a row.
        let job = filled.jobs[(look * 7_919) % filled.jobs.len()];
        let submission = filled.submission;
        let page = JobFilter { submission_id: Some(submission), after: Some(job), limit: PAGE, ..JobFilter::default() };
        let times = [
            timed(client.get::<IgnoredAny>(&format!("/v1/submissions/{submission}"))).await?,
            timed(client.get::<IgnoredAny>(&format!("/v1/jobs/{job}"))).await?,
            timed(client.get::<IgnoredAny>(&format!("/v1/jobs?submission_id={submission}&state=failed&limit={PAGE}")))
                .await?,
            timed(store.jobs(&page)).await?,
        ];
        if look > 0 {
            ways.iter_mut().zip(times).for_each(|(way, time)| way.milliseconds.push(time));
        }
    }
    Ok(ways.into())
}

/// Milliseconds until the whole answer is there.
async fn timed<T, E: Into<anyhow::Error>>(answer: impl Future<Output = Result<T, E>>) -> Result<f64> {
    let start = Instant::now();
    answer.await.map_err(Into::into)?;
    Ok(start.elapsed().as_secs_f64() * 1e3)
}

impl Polls {
    /// The figures for people.
    pub fn table(&self) -> Table {
        let mut table = Table::new("Status polls, one after the other", ["what", "finished jobs", "p50 ms", "p99 ms"]);
        for what in WAYS {
            for store in &self.stores {
                for way in store.ways.iter().filter(|way| way.what == what) {
                    let at = |share| {
                        percentile(&way.milliseconds, share).map_or_else(|| "?".into(), |time| format!("{time:.2}"))
                    };
                    table.row([what.to_owned(), store.jobs.to_string(), at(0.5), at(0.99)]);
                }
            }
        }
        if let Some(full) = self.stores.last() {
            let rate = full.jobs as f64 / full.fill_seconds;
            table.note(format!("The store took {rate:.0} jobs/s from submission to the end, in windows of {WINDOW}."));
        }
        table
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_way_to_look_is_shown_for_both_stores() {
        let way = |time: f64| Way { what: WAYS[1], milliseconds: vec![time, time + 1.0] };
        let store = |jobs, time| Polled { jobs, fill_seconds: 2.0, ways: vec![way(time)] };
        let text = Polls { stores: vec![store(100, 1.0), store(5000, 3.0)] }.table().to_string();
        let rows: Vec<_> = text.lines().filter(|line| line.contains("GET /v1/jobs/{id}")).collect();
        assert_eq!(rows.len(), 2, "{text}");
        assert!(rows[0].ends_with("100    1.00    2.00") && rows[1].ends_with("5000    3.00    4.00"), "{text}");
        assert!(text.contains("2500 jobs/s"), "{text}");
    }
}
