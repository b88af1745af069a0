//! `kiln submit`: a file of jobs becomes a submission, however often the connection breaks.

use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};
use farm::config::Config;
use futures_util::StreamExt;
use indicatif::ProgressBar;
use scheduler::SubmissionAccepted;
use tokio_util::io::ReaderStream;
use uuid::Uuid;

use crate::cli::SubmitArgs;
use crate::client::{Client, ClientError, Patience};
use crate::{progress, status, stdout};

/// Bytes read from the file at once.
const PIECE: usize = 256 * 1024;

/// Sends the file, and waits for its jobs if asked to.
pub async fn run(config: &Config, args: SubmitArgs) -> Result<ExitCode> {
    let client = Client::new(&args.api, config)?;
    let source = Source::open(&args.file).await?;
    let accepted = send(&client, &source, &args).await?;
    let id = accepted.submission_id;
    if args.json {
        stdout::line(serde_json::json!({ "submission_id": id, "jobs": accepted.jobs }))?;
    } else {
        stdout::line(format_args!("{id}"))?;
    }
    if !args.wait {
        if !args.json {
            eprintln!("kiln: {} jobs accepted; follow them with `kiln status {id} --watch`", accepted.jobs);
        }
        return Ok(ExitCode::SUCCESS);
    }
    let view = status::watch(&client, id, args.json)
        .await
        .with_context(|| format!("the submission goes on without us; look with `kiln status {id}`"))?;
    let counters = view.counters;
    if args.json {
        stdout::line(serde_json::to_string(&view)?)?;
    } else {
        eprintln!(
            "kiln: {}; get the pictures with `kiln fetch {id} --out FOLDER`",
            progress::summary(&counters, None, None)
        );
    }
    if counters.failed > 0 && !args.json {
        let failed = client.patiently(Patience::LONG, async || client.jobs(id, Some("failed"), None, 5).await).await?;
        eprint!("{}", status::failures(&failed, counters.failed));
    }
    Ok(if counters.done == counters.total() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Where the lines come from: something that can be read again when a request must be repeated.
struct Source {
    path: PathBuf,
    bytes: u64,
    /// Holds what came by standard input.
    _spool: Option<tempfile::NamedTempFile>,
}

impl Source {
    async fn open(path: &Path) -> Result<Self> {
        if path == Path::new("-") {
            return Self::spool().await;
        }
        let metadata = tokio::fs::metadata(path).await.with_context(|| {
            format!("FILE must be a file of JSON Lines or -, but `{}` cannot be read", path.display())
        })?;
        anyhow::ensure!(
            !metadata.is_dir(),
            "FILE must be a file of JSON Lines or -, but `{}` is a folder",
            path.display()
        );
        // A pipe can be read only once.
        if !metadata.is_file() {
            let mut pipe = tokio::fs::File::open(path).await?;
            return Self::spool_from(&mut pipe).await;
        }
        Ok(Self { path: path.to_owned(), bytes: metadata.len(), _spool: None })
    }

    async fn spool() -> Result<Self> {
        if std::io::stdin().is_terminal() {
            eprintln!("kiln: reading jobs from the keyboard, one JSON object a line; end with Ctrl-D");
        }
        Self::spool_from(&mut tokio::io::stdin()).await
    }

    async fn spool_from(input: &mut (impl tokio::io::AsyncRead + Unpin)) -> Result<Self> {
        let spool = tempfile::NamedTempFile::new().context("a temporary file for the jobs cannot be made")?;
        let mut file = tokio::fs::File::from_std(spool.reopen()?);
        let bytes = tokio::io::copy(input, &mut file)
            .await
            .with_context(|| format!("the jobs cannot be kept in {} meanwhile", spool.path().display()))?;
        file.sync_data().await?;
        Ok(Self { path: spool.path().to_owned(), bytes, _spool: Some(spool) })
    }

    async fn body(&self, bar: &ProgressBar) -> std::io::Result<reqwest::Body> {
        let file = tokio::fs::File::open(&self.path).await?;
        let bar = bar.clone();
        bar.set_position(0);
        let pieces = ReaderStream::with_capacity(file, PIECE)
            .inspect(move |piece| bar.inc(piece.as_ref().map_or(0, |piece| piece.len() as u64)));
        Ok(reqwest::Body::wrap_stream(pieces))
    }
}

/// Sends the source under one idempotency key, so that a repetition counts once.
async fn send(client: &Client, source: &Source, args: &SubmitArgs) -> Result<SubmissionAccepted> {
    let key = Uuid::new_v4().to_string();
    let query: Vec<(&str, &str)> = args.name.iter().map(|name| ("name", name.as_str())).collect();
    let bar = progress::bytes(source.bytes);
    bar.set_message("sent");
    let patience = Patience(Duration::from_secs(args.retry_seconds));
    let outcome = client
        .patiently(patience, async || {
            let body = source.body(&bar).await.map_err(|error| ClientError::Local(error.to_string()))?;
            client.submit(&query, &key, "application/x-ndjson", body).await
        })
        .await;
    bar.finish_and_clear();
    outcome.map_err(|error| match error {
        error @ ClientError::Refused { .. } => {
            anyhow::Error::new(error).context("nothing was submitted; mend it and submit again")
        }
        error => error.into(),
    })
}
