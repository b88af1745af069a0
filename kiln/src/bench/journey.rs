//! Where the time of a submission's pictures went, by what the farm itself has recorded of them.

use anyhow::{Context, Result};
use chrono::{DateTime, Utc};
use farm::job::{JobView, SubmissionView};
use futures_util::{StreamExt, TryStreamExt, stream};
use serde::{Deserialize, Serialize};

use crate::client::Client;

/// Jobs of a page.
const PAGE: u32 = 1000;

/// Sidecars that are asked for at once.
const PARALLEL: usize = 8;

/// A submission's way through the farm; the times of a picture are means over all.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Journey {
    /// Seconds from acceptance until the first job was claimed.
    pub head_seconds: f64,
    /// Seconds from the last picture until its job was done: PNG, upload, commit.
    pub tail_seconds: f64,
    /// Rows of the denoiser calls that a picture was in.
    pub rows: f64,
    /// From the claim to joining the batch, in milliseconds.
    pub wait_ms: f64,
    /// From joining to the last step, in milliseconds.
    pub denoise_ms: f64,
    /// From the last step to the picture, in milliseconds.
    pub decode_ms: f64,
    /// Writing the PNG, in milliseconds, beside the device.
    pub encode_ms: f64,
    /// Storing the PNG, in milliseconds, beside the device.
    pub upload_ms: f64,
}

/// What a sidecar says of its picture, as far as it matters here.
#[derive(Clone, Copy, Debug, Deserialize)]
struct Sidecar {
    rendered_at: DateTime<Utc>,
    batch: Batch,
    timings: Timings,
}

#[derive(Clone, Copy, Debug, Deserialize)]
struct Batch {
    mean: f64,
}

#[derive(Clone, Copy, Debug, Deserialize)]
struct Timings {
    wait_ms: f64,
    denoise_ms: f64,
    decode_ms: f64,
    encode_ms: f64,
    upload_ms: f64,
}

impl Journey {
    /// Of a submission whose jobs are all done.
    pub async fn of(client: &Client, submission: &SubmissionView) -> Result<Self> {
        let jobs = jobs(client, submission).await?;
        let sidecars = stream::iter(&jobs).map(|job| async {
            let bytes = client.sidecar(job.job_id).await?;
            serde_json::from_slice::<Sidecar>(&bytes).with_context(|| format!("the sidecar of job {}", job.job_id))
        });
        let sidecars: Vec<Sidecar> = sidecars.buffer_unordered(PARALLEL).try_collect().await?;
        let claims: Vec<DateTime<Utc>> = jobs.iter().filter_map(|job| job.started_at).collect();
        Self::sum_up(submission, &claims, &sidecars).context("a finished submission lacks some of its times")
    }

    fn sum_up(submission: &SubmissionView, claims: &[DateTime<Utc>], sidecars: &[Sidecar]) -> Option<Self> {
        let first_claim = *claims.iter().min()?;
        let last_picture = sidecars.iter().map(|sidecar| sidecar.rendered_at).max()?;
        let mean = |part: fn(&Sidecar) -> f64| sidecars.iter().map(part).sum::<f64>() / sidecars.len() as f64;
        Some(Self {
            head_seconds: (first_claim - submission.created_at).as_seconds_f64(),
            tail_seconds: (submission.finished_at? - last_picture).as_seconds_f64(),
            rows: mean(|sidecar| sidecar.batch.mean),
            wait_ms: mean(|sidecar| sidecar.timings.wait_ms),
            denoise_ms: mean(|sidecar| sidecar.timings.denoise_ms),
            decode_ms: mean(|sidecar| sidecar.timings.decode_ms),
            encode_ms: mean(|sidecar| sidecar.timings.encode_ms),
            upload_ms: mean(|sidecar| sidecar.timings.upload_ms),
        })
    }
}

async fn jobs(client: &Client, submission: &SubmissionView) -> Result<Vec<JobView>> {
    let mut jobs: Vec<JobView> = Vec::new();
    loop {
        let after = jobs.last().map(|job| job.job_id);
        let page = client.jobs(submission.submission_id, None, after, PAGE).await?;
        if page.is_empty() {
            return Ok(jobs);
        }
        jobs.extend(page);
    }
}

#[cfg(test)]
mod tests {
    use farm::id::SubmissionId;
    use farm::job::Counters;

    use super::*;

    fn at(seconds: &str) -> DateTime<Utc> {
        format!("2026-03-01T10:00:{seconds}Z").parse().unwrap()
    }

    fn sidecar(rendered_at: &str, rows: f64, encode_ms: f64) -> Sidecar {
        let timings = Timings { wait_ms: 1.0, denoise_ms: 2.0, decode_ms: 3.0, encode_ms, upload_ms: 5.0 };
        Sidecar { rendered_at: at(rendered_at), batch: Batch { mean: rows }, timings }
    }

    #[test]
    fn the_way_begins_with_the_first_claim_and_ends_after_the_last_picture() {
        let submission = SubmissionView {
            submission_id: SubmissionId::new(),
            name: None,
            created_at: at("00"),
            finished_at: Some(at("20.5")),
            counters: Counters { done: 2, ..Counters::default() },
            rate: None,
            eta_seconds: None,
        };
        let sidecars = [sidecar("20", 7.0, 4.0), sidecar("10", 8.0, 6.0)];
        let journey = Journey::sum_up(&submission, &[at("03"), at("00.25")], &sidecars).unwrap();
        assert_eq!((journey.head_seconds, journey.tail_seconds), (0.25, 0.5));
        assert_eq!((journey.rows, journey.encode_ms, journey.upload_ms), (7.5, 5.0, 5.0));
        assert_eq!(Journey::sum_up(&submission, &[], &[]), None);
    }
}
