//! `kiln render`: pictures here and now. A private farm lives in a temporary folder for as long as it
//! takes; what renders is the very code that renders for a big one.

use std::collections::{BTreeMap, HashMap};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use farm::catalog::{Catalog, ModelConfig};
use farm::config::Config;
use farm::id::{JobId, SubmissionId};
use farm::job::{Counters, JobView, Lane};
use farm::message::Progress;
use farm::spec::{RenderRequest, RenderSpec};
use futures_util::StreamExt;
use futures_util::stream::SelectAll;
use indicatif::ProgressBar;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;
use worker::resolve::resolve;

use crate::cli::RenderArgs;
use crate::client::Client;
use crate::embedded::Farm;
use crate::output::{Target, write_whole};
use crate::ports::Ports;
use crate::{catalog, progress, shutdown, stdout};

/// Jobs asked for at once.
const PAGE: u32 = 500;

/// Jobs whose every step moves the bar; with more, it moves picture by picture.
const WATCHED: usize = 64;

/// How often to look for finished pictures.
const LOOK: Duration = Duration::from_millis(60);
const LOOK_MAX: Duration = Duration::from_secs(2);

/// A finished picture on this machine.
struct Picture {
    path: PathBuf,
    job: JobView,
}

/// Renders, writes, prints where.
pub async fn run(mut config: Config, args: RenderArgs, stop: CancellationToken) -> Result<ExitCode> {
    config.worker.device = args.device.clone().or(config.worker.device);
    config.worker.dtype = args.dtype.clone().or(config.worker.dtype);
    config.check().context("the command line is not right")?;
    let catalog = catalog_for(&mut config, args.model.as_deref(), &stop).await?;
    let requests = requests(&args, &config, &catalog)?;
    let target = Target::prepare(&args.out, args.count)?;

    let temporary = tempfile::tempdir().context("a temporary folder cannot be made")?;
    privatise(&mut config, temporary.path());
    let ports = Ports::open(&config).await?;
    let listener = TcpListener::bind(config.api.listen).await.context("no loopback socket can be opened")?;
    let mut farm = Farm::start(&config, &ports, &Arc::new(catalog), listener)?;
    let client = Client::at(format!("http://{}", farm.address), None)?;

    let requests = with_pictures(&client, &args, requests).await?;
    let mut session = Session::submit(client, &ports, target, requests).await?;
    let outcome = tokio::select! {
        outcome = session.follow() => outcome.map(|()| false),
        error = farm.broken() => Err(error),
        () = stop.cancelled() => Ok(true),
    };
    session.bar.finish_and_clear();
    session.print(args.json)?;
    if outcome? {
        eprintln!("kiln: interrupted");
        return Ok(shutdown::interrupted());
    }
    let failed = session.report_failures().await?;
    farm.stop().await?;
    Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// The catalog, with the checkpoint that the command line names as its default. One from the hub is
/// downloaded first, so that its own files say what its defaults are.
async fn catalog_for(config: &mut Config, model: Option<&str>, stop: &CancellationToken) -> Result<Catalog> {
    let known = catalog::build(config).await?;
    let Some(model) = model else { return Ok(known) };
    if known.find(Some(model)).is_err() {
        let names: Vec<_> = known.models().map(|(name, _)| name).collect();
        let spinner = progress::spinner(&format!("looking for {model}"));
        resolve(model, &config.worker, stop).await.with_context(|| {
            format!(
                "--model must be one of {}, a folder, a file or a hub id; `{model}` was not found",
                names.join(", ")
            )
        })?;
        spinner.finish_and_clear();
        let entry = ModelConfig { source: model.to_owned(), ..ModelConfig::default() };
        config.models.insert(model.to_owned(), entry);
    }
    config.default_model = Some(model.to_owned());
    catalog::build(config).await
}

/// A request for each picture, the first of them checked (they differ in their seeds alone).
fn requests(args: &RenderArgs, config: &Config, catalog: &Catalog) -> Result<Vec<RenderRequest>> {
    // Short enough to be typed again.
    let drawn = || i64::from(Uuid::new_v4().as_fields().0);
    let first = args.seed.unwrap_or_else(drawn);
    let Some(last) = first.checked_add(i64::from(args.count) - 1) else {
        bail!("--seed must leave room for {} seeds, but is {first}", args.count);
    };
    let request = RenderRequest {
        prompt: Some(args.prompt.clone()),
        negative_prompt: args.negative.clone(),
        width: args.width,
        height: args.height,
        steps: args.steps,
        guidance_scale: args.guidance,
        sampler: args.sampler.clone(),
        schedule: args.schedule.clone(),
        seed: Some(first),
        lane: Some(Lane::Interactive.as_str().to_owned()),
        ..RenderRequest::default()
    };
    let _valid: RenderSpec = request.clone().validate(catalog, &config.limits, Lane::Interactive, || 0)?;
    Ok((first..=last).map(|seed| RenderRequest { seed: Some(seed), ..request.clone() }).collect())
}

/// The requests with the init image and the mask that the command line names, which the farm has by then.
async fn with_pictures(client: &Client, args: &RenderArgs, requests: Vec<RenderRequest>) -> Result<Vec<RenderRequest>> {
    let send = async |option: &str, path: &Path| -> Result<String> {
        let bytes = tokio::fs::read(path)
            .await
            .with_context(|| format!("{option} must be a picture, but `{}` cannot be read", path.display()))?;
        let stored = client.upload(bytes.into()).await;
        Ok(stored.with_context(|| format!("{option} `{}` was not taken", path.display()))?.key)
    };
    let Some(init) = &args.init else { return Ok(requests) };
    let init = send("--init", init).await?;
    let mask = match &args.mask {
        Some(mask) => Some(send("--mask", mask).await?),
        None => None,
    };
    let given = RenderRequest {
        init_image: Some(init),
        mask_image: mask,
        strength: args.strength,
        mask_blur: args.mask_blur,
        masked_content: args.masked_content.clone(),
        ..RenderRequest::default()
    };
    Ok(requests.into_iter().map(|request| request.or(&given)).collect())
}

/// Turns the configuration into one for a farm that nobody else can see and that leaves nothing behind.
fn privatise(config: &mut Config, folder: &Path) {
    config.store.url.0 = format!("sqlite:{}", folder.join("render.db").display());
    config.broker = Default::default();
    config.artifacts = Default::default();
    config.artifacts.url = format!("file:{}", folder.join("artifacts").display());
    config.api.listen = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    config.api.key_hashes = BTreeMap::new();
    // Somebody is waiting, and what failed here would fail here again.
    config.scheduler.max_attempts = 1;
}

/// One submission to the private farm.
struct Session {
    client: Client,
    id: SubmissionId,
    target: Target,
    pictures: BTreeMap<u64, Picture>,
    bar: ProgressBar,
    look: Duration,
    watcher: tokio::task::JoinHandle<()>,
}

impl Session {
    async fn submit(client: Client, ports: &Ports, target: Target, requests: Vec<RenderRequest>) -> Result<Self> {
        let count = requests.len();
        let body = serde_json::to_vec(&serde_json::json!({ "jobs": requests }))?;
        let key = Uuid::new_v4().to_string();
        let accepted = client.submit(&[], &key, "application/json", body.into()).await?;
        let bar = progress::steps(0);
        bar.set_message("loading the checkpoint");
        let jobs = client.jobs(accepted.submission_id, None, None, PAGE).await?;
        let watcher = tokio::spawn(move_bar(ports.clone(), jobs, count, bar.clone()));
        let look = (LOOK * u32::try_from(count.div_ceil(16)).unwrap_or(u32::MAX)).min(LOOK_MAX);
        Ok(Self { client, id: accepted.submission_id, target, pictures: BTreeMap::new(), bar, look, watcher })
    }

    /// Writes pictures as they are finished, until all are.
    async fn follow(&mut self) -> Result<()> {
        let mut seen = Counters::default();
        loop {
            let counters = self.client.submission(self.id).await?.counters;
            if counters.done != seen.done {
                self.collect().await?;
            }
            if counters.finished() == counters.total() {
                return Ok(());
            }
            seen = counters;
            tokio::time::sleep(self.look).await;
        }
    }

    async fn collect(&mut self) -> Result<()> {
        let mut after = None;
        loop {
            let jobs = self.client.jobs(self.id, Some("done"), after, PAGE).await?;
            let more = jobs.len() == PAGE as usize;
            after = jobs.last().map(|job| job.job_id);
            for job in jobs {
                if !self.pictures.contains_key(&job.index) {
                    let bytes = self.client.image(job.job_id).await?;
                    let path = self.target.path(job.index, job.spec.seed);
                    write_whole(&path, &bytes)?;
                    self.pictures.insert(job.index, Picture { path, job });
                }
            }
            if !more {
                return Ok(());
            }
        }
    }

    fn print(&self, json: bool) -> Result<()> {
        if json {
            let images: Vec<_> = self.pictures.values().map(Picture::describe).collect();
            stdout::line(serde_json::json!({ "images": images }))?;
        } else {
            for picture in self.pictures.values() {
                stdout::line(picture.path.display())?;
            }
        }
        Ok(())
    }

    /// Says what did not work out; true if anything.
    async fn report_failures(&self) -> Result<bool> {
        let failed = self.client.jobs(self.id, Some("failed"), None, PAGE).await?;
        let mut told = HashMap::new();
        for job in &failed {
            let message = job.error.as_ref().map_or("no reason was recorded", |failure| failure.message.as_str());
            *told.entry(message).or_insert(0u32) += 1;
        }
        for (message, count) in &told {
            eprintln!("kiln: {count} of {} pictures failed: {message}", failed.len() + self.pictures.len());
        }
        Ok(!failed.is_empty())
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.watcher.abort();
    }
}

impl Picture {
    fn describe(&self) -> serde_json::Value {
        let RenderSpec {
            model,
            prompt,
            negative_prompt,
            width,
            height,
            steps,
            guidance_scale,
            sampler,
            schedule,
            seed,
            init_image,
            ..
        } = &self.job.spec;
        serde_json::json!({
            "path": self.path, "model": model, "prompt": prompt, "negative_prompt": negative_prompt, "width": width,
            "height": height, "steps": steps, "guidance_scale": guidance_scale, "sampler": sampler, "schedule": schedule,
            "seed": seed, "init_image": init_image, "sha256": self.job.sha256, "render_ms": self.job.render_ms,
        })
    }
}

/// Moves the bar with the news of the jobs, step by step.
async fn move_bar(ports: Ports, jobs: Vec<JobView>, count: usize, bar: ProgressBar) {
    let mut news = SelectAll::new();
    for job in jobs.iter().take(WATCHED) {
        match ports.broker.watch(job.job_id).await {
            Ok(stream) => news.push(stream),
            Err(error) => return tracing::debug!(%error, "no news of the jobs"),
        }
    }
    let mut steps: HashMap<JobId, u64> = HashMap::new();
    while let Some(event) = news.next().await {
        if let Progress::Step { step, total } = event.progress {
            steps.insert(event.job_id, u64::from(step));
            bar.set_length(u64::from(total) * count as u64);
            bar.set_position(steps.values().sum());
            bar.set_message("");
        }
    }
}
