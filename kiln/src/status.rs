//! `kiln status`: how submissions are doing.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};
use farm::config::Config;
use farm::id::SubmissionId;
use farm::job::{JobView, SubmissionView};

use crate::cli::StatusArgs;
use crate::client::{Client, Patience};
use crate::{progress, stdout};

/// How often `--watch` looks.
const WATCH_INTERVAL: Duration = Duration::from_secs(1);

/// Submissions in the listing.
const LATEST: u32 = 20;

/// Failed jobs to show.
const FAILURES: u32 = 5;

/// Shows the latest submissions, or one.
pub async fn run(config: &Config, args: StatusArgs) -> Result<ExitCode> {
    let client = Client::new(&args.api, config)?;
    match &args.submission {
        None => latest(&client, &args).await,
        Some(id) => one(&client, parse_id(id)?, &args).await,
    }
}

/// Reads a submission's id.
pub fn parse_id(text: &str) -> Result<SubmissionId> {
    text.parse().ok().with_context(|| {
        format!("SUBMISSION must be an id as `kiln submit` and `kiln status` print it, but is `{text}`")
    })
}

fn patience(args: &StatusArgs) -> Patience {
    if args.watch { Patience::LONG } else { Patience::SHORT }
}

async fn latest(client: &Client, args: &StatusArgs) -> Result<ExitCode> {
    loop {
        let submissions = client.patiently(patience(args), async || client.submissions(LATEST).await).await?;
        if args.json {
            stdout::line(serde_json::to_string(&submissions)?)?;
        } else {
            stdout::text(table(&submissions))?;
        }
        if !args.watch {
            return Ok(ExitCode::SUCCESS);
        }
        tokio::time::sleep(WATCH_INTERVAL).await;
        if !args.json {
            stdout::line("")?;
        }
    }
}

async fn one(client: &Client, id: SubmissionId, args: &StatusArgs) -> Result<ExitCode> {
    if args.watch {
        watch(client, id, args.json).await?;
    }
    let view = client.patiently(patience(args), async || client.submission(id).await).await?;
    if args.json {
        stdout::line(serde_json::to_string(&view)?)?;
        return Ok(ExitCode::SUCCESS);
    }
    stdout::text(details(&view))?;
    if view.counters.failed > 0 {
        let failed =
            client.patiently(patience(args), async || client.jobs(id, Some("failed"), None, FAILURES).await).await?;
        stdout::text(failures(&failed, view.counters.failed))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Follows a submission until it is finished: a bar for people, a line of JSON for each change.
pub async fn watch(client: &Client, id: SubmissionId, json: bool) -> Result<SubmissionView> {
    let bar = progress::jobs(0);
    let mut last = None;
    loop {
        let view = client.patiently(Patience::LONG, async || client.submission(id).await).await?;
        progress::show(&bar, &view.counters, view.rate, view.eta_seconds);
        if view.counters.finished() == view.counters.total() {
            bar.finish_and_clear();
            return Ok(view);
        }
        if json && last != Some(view.counters) {
            stdout::line(serde_json::to_string(&view)?)?;
            last = Some(view.counters);
        }
        tokio::time::sleep(WATCH_INTERVAL).await;
    }
}

fn table(submissions: &[SubmissionView]) -> String {
    if submissions.is_empty() {
        return "no submissions yet; send some with `kiln submit FILE.jsonl`\n".into();
    }
    let mut text = format!("{:<36}  {:<19}  {:>9}  {}\n", "submission", "accepted (UTC)", "jobs", "state");
    for view in submissions {
        let name = view.name.as_deref().map(|name| format!("  ({name})")).unwrap_or_default();
        text.push_str(&format!(
            "{:<36}  {:<19}  {:>9}  {}{name}\n",
            view.submission_id.to_string(),
            view.created_at.format("%Y-%m-%d %H:%M:%S").to_string(),
            view.counters.total(),
            progress::summary(&view.counters, view.rate, view.eta_seconds),
        ));
    }
    text
}

fn details(view: &SubmissionView) -> String {
    let counters = &view.counters;
    let mut lines = vec![("submission", view.submission_id.to_string())];
    lines.extend(view.name.clone().map(|name| ("name", name)));
    lines.push(("accepted", view.created_at.format("%Y-%m-%d %H:%M:%S UTC").to_string()));
    lines.extend(view.finished_at.map(|at| ("finished", at.format("%Y-%m-%d %H:%M:%S UTC").to_string())));
    lines.push(("jobs", counters.total().to_string()));
    lines.push(("state", progress::summary(counters, view.rate, view.eta_seconds)));
    lines.iter().map(|(label, value)| format!("{label:<11} {value}\n")).collect()
}

/// The first failed jobs and what to do about them.
pub fn failures(failed: &[JobView], in_all: u64) -> String {
    let mut text = String::new();
    for job in failed {
        let message = job.error.as_ref().map_or("no reason was recorded", |failure| failure.message.as_str());
        text.push_str(&format!("failed      job {} ({}): {message}\n", job.index, job.job_id));
    }
    if in_all > failed.len() as u64 {
        text.push_str(&format!("            and {} more\n", in_all - failed.len() as u64));
    }
    text
}

#[cfg(test)]
mod tests {
    use farm::job::Counters;

    use super::*;

    fn view() -> SubmissionView {
        SubmissionView {
            submission_id: SubmissionId::new(),
            name: Some("spring".into()),
            created_at: "2026-03-01T10:00:00Z".parse().unwrap(),
            finished_at: None,
            counters: Counters { done: 3, failed: 1, ..Counters::default() },
            rate: None,
            eta_seconds: None,
        }
    }

    #[test]
    fn the_listing_has_a_line_for_each_submission() {
        let text = table(&[view(), view()]);
        assert_eq!(text.lines().count(), 3);
        assert!(text.contains("2026-03-01 10:00:00") && text.contains("3 done, 1 failed  (spring)"), "{text}");
    }

    #[test]
    fn an_empty_listing_says_how_to_begin() {
        assert!(table(&[]).contains("kiln submit"));
    }

    #[test]
    fn one_submission_is_shown_field_by_field() {
        let text = details(&view());
        assert!(text.contains("name        spring\n") && text.contains("jobs        4\n"), "{text}");
    }

    #[test]
    fn an_id_that_is_none_is_shown() {
        assert!(parse_id("latest").unwrap_err().to_string().contains("`latest`"));
    }
}
