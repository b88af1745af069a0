//! `kiln fetch`: a submission's pictures in a folder. Can be stopped and run again: what is there and
//! whole is not downloaded twice.

use std::collections::VecDeque;
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use farm::config::Config;
use farm::id::{JobId, SubmissionId};
use farm::job::JobView;
use futures_util::{Stream, StreamExt};
use indicatif::ProgressBar;
use serde::Serialize;
use sha2::{Digest, Sha256};

use crate::cli::FetchArgs;
use crate::client::{Client, Patience};
use crate::{output, progress, status, stdout};

/// Jobs asked for at once.
const PAGE: u32 = 500;

/// Failed downloads that are shown one by one.
const SHOWN: usize = 5;

/// What came of a fetch.
#[derive(Debug, Default, Serialize)]
struct Tally {
    fetched: u64,
    already_there: u64,
    failed: u64,
    #[serde(skip)]
    reasons: Vec<String>,
}

enum Outcome {
    Fetched,
    AlreadyThere,
}

/// Downloads every finished picture of the submission.
pub async fn run(config: &Config, args: FetchArgs) -> Result<ExitCode> {
    let client = Client::new(&args.api, config)?;
    let id = status::parse_id(&args.submission)?;
    let view = client.patiently(Patience::SHORT, async || client.submission(id).await).await?;
    output::prepare_folder(&args.out)?;
    let bar = progress::jobs(view.counters.done);
    let tally = fetch_all(&client, id, &args, &bar).await?;
    bar.finish_and_clear();
    let unfinished = view.counters.total() - view.counters.finished();
    if args.json {
        stdout::line(serde_json::json!({ "out": args.out, "unfinished": unfinished, "pictures": tally }))?;
    } else {
        stdout::line(args.out.display())?;
        eprintln!("kiln: {} pictures fetched, {} were there already", tally.fetched, tally.already_there);
        if unfinished > 0 {
            eprintln!("kiln: {unfinished} jobs are not finished yet; run the same command again for the rest");
        }
    }
    for reason in &tally.reasons {
        eprintln!("kiln: {reason}");
    }
    if tally.failed > 0 {
        eprintln!("kiln: {} pictures could not be fetched; run the same command again to try those", tally.failed);
        return Ok(ExitCode::FAILURE);
    }
    Ok(ExitCode::SUCCESS)
}

async fn fetch_all(client: &Client, id: SubmissionId, args: &FetchArgs, bar: &ProgressBar) -> Result<Tally> {
    let mut tally = Tally::default();
    let mut downloads = std::pin::pin!(
        done_jobs(client, id)
            .map(|job| async { fetch_one(client, &job?, &args.out).await })
            .buffer_unordered(usize::from(args.parallel))
    );
    while let Some(outcome) = downloads.next().await {
        bar.inc(1);
        match outcome {
            Ok(Outcome::Fetched) => tally.fetched += 1,
            Ok(Outcome::AlreadyThere) => tally.already_there += 1,
            Err(error) => {
                // A full or unwritable folder, or a scheduler that is gone, would fail every other one too.
                if error.downcast_ref::<std::io::Error>().is_some() || is_transient(&error) {
                    return Err(error);
                }
                tally.failed += 1;
                if tally.reasons.len() < SHOWN {
                    tally.reasons.push(format!("{error:#}"));
                }
            }
        }
    }
    Ok(tally)
}

fn is_transient(error: &anyhow::Error) -> bool {
    error.downcast_ref::<crate::client::ClientError>().is_some_and(|error| error.is_transient())
}

/// The submission's done jobs, page by page.
fn done_jobs(client: &Client, id: SubmissionId) -> impl Stream<Item = Result<JobView>> {
    let start: (VecDeque<JobView>, Option<JobId>, bool) = (VecDeque::new(), None, false);
    futures_util::stream::try_unfold(start, move |(mut page, mut after, mut last)| async move {
        if page.is_empty() && !last {
            page = client
                .patiently(Patience::LONG, async || client.jobs(id, Some("done"), after, PAGE).await)
                .await?
                .into();
            after = page.back().map(|job| job.job_id);
            last = page.len() < PAGE as usize;
        }
        Ok(page.pop_front().map(|job| (job, (page, after, last))))
    })
}

async fn fetch_one(client: &Client, job: &JobView, folder: &Path) -> Result<Outcome> {
    let about = || format!("job {} ({})", job.index, job.job_id);
    let name = format!("{:06}-{}", job.index, job.spec.seed);
    let extension = output::extension_of(job.image_key.as_deref().unwrap_or_default());
    let (picture, sidecar) = (folder.join(format!("{name}.{extension}")), folder.join(format!("{name}.json")));
    let expected = job.sha256.as_deref().with_context(about)?;
    let whole = is_whole(&picture, expected).await;
    // The sidecar comes first: a picture that is there has its sidecar.
    if !whole || !tokio::fs::try_exists(&sidecar).await.unwrap_or(false) {
        let text = client.patiently(Patience::LONG, async || client.sidecar(job.job_id).await);
        write(sidecar, text.await.with_context(about)?).await?;
    }
    if whole {
        return Ok(Outcome::AlreadyThere);
    }
    let bytes = client.patiently(Patience::LONG, async || client.image(job.job_id).await).await.with_context(about)?;
    let found = sha256(&bytes);
    ensure!(found == expected, "{}: the picture's SHA-256 must be {expected}, but is {found}", about());
    write(picture, bytes).await?;
    Ok(Outcome::Fetched)
}

async fn is_whole(path: &Path, expected: &str) -> bool {
    match tokio::fs::read(path).await {
        Ok(bytes) => sha256(&bytes) == expected,
        Err(_) => false,
    }
}

async fn write(path: PathBuf, bytes: Bytes) -> Result<()> {
    tokio::task::spawn_blocking(move || output::write_whole(&path, &bytes)).await?
}

fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().fold(String::new(), |mut text, byte| {
        let _infallible = write!(text, "{byte:02x}");
        text
    })
}
