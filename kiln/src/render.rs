//! `kiln render`: pictures here and now. A private farm lives in a temporary folder for as long as it
//! takes; what renders is the very code that renders for a big one.

use std::collections::{BTreeMap, HashMap};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use farm::catalog::{Catalog, ModelConfig};
use farm::config::Config;
use farm::id::{JobId, SubmissionId};
use farm::job::{Counters, JobView};
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
use crate::output::{LATENT, PICTURE, Target, write_whole};
use crate::ports::Ports;
use crate::requests::{refined, requests, with_pictures};
use crate::{catalog, progress, shutdown, stdout};

/// Jobs asked for at once.
const PAGE: u32 = 500;

/// Jobs whose every step moves the bar; with more, it moves picture by picture.
const WATCHED: usize = 64;

/// How often to look for finished pictures.
const LOOK: Duration = Duration::from_millis(60);
const LOOK_MAX: Duration = Duration::from_secs(2);

/// Renders, writes, prints where.
pub async fn run(mut config: Config, args: RenderArgs, stop: CancellationToken) -> Result<ExitCode> {
    config.worker.device = args.device.clone().or(config.worker.device);
    config.worker.dtype = args.dtype.clone().or(config.worker.dtype);
    config.check().context("the command line is not right")?;
    let catalog = catalog_for(&mut config, &args, &stop).await?;
    let requests = requests(&args, &config, &catalog)?;
    let extension = if args.denoising_end.is_some() { LATENT } else { PICTURE };
    let target = Target::prepare(&args.out, args.count, extension)?;

    let temporary = tempfile::tempdir().context("a temporary folder cannot be made")?;
    privatise(&mut config, temporary.path());
    let ports = Ports::open(&config).await?;
    let listener = TcpListener::bind(config.api.listen).await.context("no loopback socket can be opened")?;
    let mut farm = Farm::start(&config, &ports, &Arc::new(catalog), listener)?;
    let client = Client::at(format!("http://{}", farm.address), None)?;

    let requests = with_pictures(&client, &args, requests).await?;
    let (mut requests, mut failed) = (requests, false);
    if let Some(model) = &args.refiner {
        let mut base = Session::submit(client.clone(), &ports, None, requests).await?;
        if base.run(&mut farm, &stop).await? == Ended::Interrupted {
            return Ok(shutdown::interrupted());
        }
        failed = base.report_failures().await?;
        requests = base.done.values().map(|job| refined(&args, model, job)).collect();
    }
    if !requests.is_empty() {
        let mut session = Session::submit(client, &ports, Some(target), requests).await?;
        let ended = session.run(&mut farm, &stop).await;
        session.print(args.json)?;
        if ended? == Ended::Interrupted {
            return Ok(shutdown::interrupted());
        }
        failed |= session.report_failures().await?;
    }
    farm.stop().await?;
    Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// The catalog, with the checkpoints that the command line names, the first of them as its default. Those from the hub
/// are downloaded first, so that their own files say what their defaults are.
async fn catalog_for(config: &mut Config, args: &RenderArgs, stop: &CancellationToken) -> Result<Catalog> {
    for (option, model) in [("--model", &args.model), ("--refiner", &args.refiner)] {
        let Some(model) = model else { continue };
        let known = catalog::build(config).await?;
        if known.find(Some(model)).is_ok() {
            continue;
        }
        let names: Vec<_> = known.models().map(|(name, _)| name).collect();
        let spinner = progress::spinner(&format!("looking for {model}"));
        resolve(model, &config.worker, stop).await.with_context(|| {
            format!(
                "{option} must be one of {}, a folder, a file or a hub id; `{model}` was not found",
                names.join(", ")
            )
        })?;
        spinner.finish_and_clear();
        let entry = ModelConfig { source: model.clone(), ..ModelConfig::default() };
        config.models.insert(model.clone(), entry);
    }
    config.default_model = args.model.clone().or(config.default_model.take());
    catalog::build(config).await
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

/// How a session ended.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Ended {
    Finished,
    Interrupted,
}

/// One submission to the private farm.
struct Session {
    client: Client,
    id: SubmissionId,
    /// Where its pictures go; `None`: they stay in the farm, for others to go on from.
    target: Option<Target>,
    /// Jobs that are done, by their place, and fetched.
    done: BTreeMap<u64, JobView>,
    bar: ProgressBar,
    look: Duration,
    watcher: tokio::task::JoinHandle<()>,
}

impl Session {
    async fn submit(
        client: Client,
        ports: &Ports,
        target: Option<Target>,
        requests: Vec<RenderRequest>,
    ) -> Result<Self> {
        let count = requests.len();
        let body = serde_json::to_vec(&serde_json::json!({ "jobs": requests }))?;
        let key = Uuid::new_v4().to_string();
        let accepted = client.submit(&[], &key, "application/json", body.into()).await?;
        let bar = progress::steps(0);
        bar.set_message("loading the checkpoint");
        let jobs = client.jobs(accepted.submission_id, None, None, PAGE).await?;
        let watcher = tokio::spawn(move_bar(ports.clone(), jobs, count, bar.clone()));
        let look = (LOOK * u32::try_from(count.div_ceil(16)).unwrap_or(u32::MAX)).min(LOOK_MAX);
        Ok(Self { client, id: accepted.submission_id, target, done: BTreeMap::new(), bar, look, watcher })
    }

    /// Follows the jobs to their end, unless somebody interrupts.
    async fn run(&mut self, farm: &mut Farm, stop: &CancellationToken) -> Result<Ended> {
        let outcome = tokio::select! {
            outcome = self.follow() => outcome.map(|()| Ended::Finished),
            error = farm.broken() => Err(error),
            () = stop.cancelled() => Ok(Ended::Interrupted),
        };
        self.bar.finish_and_clear();
        if let Ok(Ended::Interrupted) = outcome {
            eprintln!("kiln: interrupted");
        }
        outcome
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
                if self.done.contains_key(&job.index) {
                    continue;
                }
                if let Some(target) = &self.target {
                    let bytes = self.client.image(job.job_id).await?;
                    write_whole(&target.path(job.index, job.spec.seed), &bytes)?;
                }
                self.done.insert(job.index, job);
            }
            if !more {
                return Ok(());
            }
        }
    }

    fn print(&self, json: bool) -> Result<()> {
        let Some(target) = &self.target else { return Ok(()) };
        let written = self.done.values().map(|job| (target.path(job.index, job.spec.seed), job));
        if json {
            let images: Vec<_> = written.map(|(path, job)| describe(&path, job)).collect();
            return stdout::line(serde_json::json!({ "images": images }));
        }
        for (path, _) in written {
            stdout::line(path.display())?;
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
            eprintln!("kiln: {count} of {} pictures failed: {message}", failed.len() + self.done.len());
        }
        Ok(!failed.is_empty())
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.watcher.abort();
    }
}

/// A picture on this machine, in JSON.
fn describe(path: &Path, job: &JobView) -> serde_json::Value {
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
        options,
        ..
    } = &job.spec;
    let mut picture = serde_json::json!({
        "path": path, "model": model, "prompt": prompt, "negative_prompt": negative_prompt, "width": width,
        "height": height, "steps": steps, "guidance_scale": guidance_scale, "sampler": sampler, "schedule": schedule,
        "seed": seed, "init_image": init_image, "sha256": job.sha256, "render_ms": job.render_ms,
    });
    for (name, share) in [("denoising_start", options.denoising_start), ("denoising_end", options.denoising_end)] {
        if let Some(share) = share {
            picture[name] = share.into();
        }
    }
    picture
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
