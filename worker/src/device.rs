//! The device thread: owns the renderer, holds the running batches, and waits for nothing but rows.
//!
//! Between two steps it takes commands, lets rows join and leave, and hands finished pictures over.
//! Pictures are encoded and delivered elsewhere. A step that fails is tried again with halves and
//! then with single rows, so that only the culprit fails; after a panic, rows start anew, each in a
//! batch of its own.

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use engine::InitImage;
use farm::fleet::TextStatus;
use farm::id::JobId;
use farm::job::Failure;
use farm::latent::LatentFile;
use farm::spec::RenderSpec;
use image::RgbImage;
use tokio::sync::{mpsc, oneshot};

use crate::renderer::{RenderError, Renderer};
use crate::resolve::Located;
use crate::rows::Rows;

/// A job on its way to the device.
#[derive(Clone, Debug)]
pub(crate) struct NewRow {
    pub(crate) job_id: JobId,
    pub(crate) spec: Arc<RenderSpec>,
    /// What it starts from, at its size.
    pub(crate) init: Option<InitImage>,
}

/// News from the device.
#[derive(Debug)]
pub(crate) enum Event {
    /// The row has joined a batch.
    Joined(JobId),
    /// The row has made a step.
    Stepped { job_id: JobId, step: u32, total: u32 },
    /// The row is a picture, or the latent that it was to become.
    Rendered(Box<Rendered>),
    /// The row failed alone.
    Failed(JobId, Failure),
    /// What text encoders did and take has changed.
    Text(TextStatus),
}

/// What a row has become.
#[derive(Debug)]
pub(crate) enum Output {
    Picture(RgbImage),
    /// Its job ends in the middle of the way from noise.
    Latent(LatentFile),
}

/// A picture (or a latent) and how it came about.
#[derive(Debug)]
pub(crate) struct Rendered {
    pub(crate) job_id: JobId,
    pub(crate) output: Output,
    /// From arriving at the device to joining a batch.
    pub(crate) wait: Duration,
    /// From joining to the last step.
    pub(crate) denoise: Duration,
    /// From the last step to the picture.
    pub(crate) decode: Duration,
    /// Rows of the largest pass it was in.
    pub(crate) largest_batch: u32,
    /// Rows of its passes on average.
    pub(crate) mean_batch: f64,
}

pub(crate) enum Command {
    Load { located: Located, reply: oneshot::Sender<Result<Duration, RenderError>> },
    Add(Vec<NewRow>),
    Drop { jobs: Vec<JobId>, reply: oneshot::Sender<Vec<JobId>> },
    TakeWaiting(oneshot::Sender<Vec<JobId>>),
    WhenIdle(oneshot::Sender<()>),
}

/// A handle on the device thread. The thread ends at its next step boundary once this is dropped.
#[derive(Debug)]
pub(crate) struct Device {
    commands: mpsc::Sender<Command>,
}

/// The device thread has died, which only a bug makes it do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the device thread has died")]
pub(crate) struct DeviceGone;

impl Device {
    /// Starts the thread. Events are not bounded in number: there are only so many rows, and the device
    /// must not wait for their readers.
    pub(crate) fn start<R: Renderer>(
        renderer: R,
        max_batch: usize,
        patience: Duration,
    ) -> std::io::Result<(Self, mpsc::UnboundedReceiver<Event>, JoinHandle<()>)> {
        let (commands, inbox) = mpsc::channel(64);
        let (events, news) = mpsc::unbounded_channel();
        let thread = std::thread::Builder::new()
            .name("device".into())
            .spawn(move || run(inbox, Rows::new(renderer, max_batch, patience, events)))?;
        Ok((Self { commands }, news, thread))
    }

    async fn ask<T>(&self, command: impl FnOnce(oneshot::Sender<T>) -> Command) -> Result<T, DeviceGone> {
        let (reply, answer) = oneshot::channel();
        self.commands.send(command(reply)).await.map_err(|_| DeviceGone)?;
        answer.await.map_err(|_| DeviceGone)
    }

    /// Loads a checkpoint in place of the one before; how long it took. To be called while no rows are
    /// on the device.
    pub(crate) async fn load(&self, located: Located) -> Result<Result<Duration, RenderError>, DeviceGone> {
        self.ask(|reply| Command::Load { located, reply }).await
    }

    /// Adds rows, which join a batch as soon as there is room.
    pub(crate) async fn add(&self, rows: Vec<NewRow>) -> Result<(), DeviceGone> {
        self.commands.send(Command::Add(rows)).await.map_err(|_| DeviceGone)
    }

    /// Drops rows at the next step boundary. Which of them were there; the others have been reported
    /// by an event already.
    pub(crate) async fn drop_rows(&self, jobs: Vec<JobId>) -> Result<Vec<JobId>, DeviceGone> {
        self.ask(|reply| Command::Drop { jobs, reply }).await
    }

    /// Takes the rows back that have not joined a batch.
    pub(crate) async fn take_waiting(&self) -> Result<Vec<JobId>, DeviceGone> {
        self.ask(Command::TakeWaiting).await
    }

    /// Returns once no rows are left. By then, an event has been sent for each.
    pub(crate) async fn when_idle(&self) -> Result<(), DeviceGone> {
        self.ask(Command::WhenIdle).await
    }
}

fn run<R: Renderer>(mut inbox: mpsc::Receiver<Command>, mut rows: Rows<R>) {
    let mut idle = Vec::new();
    loop {
        if rows.is_empty() {
            for reply in idle.drain(..) {
                let _asker_has_gone: Result<(), ()> = oneshot::Sender::send(reply, ());
            }
            match inbox.blocking_recv() {
                Some(command) => obey(command, &mut rows, &mut idle),
                None => return,
            }
        }
        loop {
            match inbox.try_recv() {
                Ok(command) => obey(command, &mut rows, &mut idle),
                Err(mpsc::error::TryRecvError::Empty) => break,
                Err(mpsc::error::TryRecvError::Disconnected) => return,
            }
        }
        rows.step();
    }
}

/// Who asked may have gone; that is fine.
fn obey<R: Renderer>(command: Command, rows: &mut Rows<R>, idle: &mut Vec<oneshot::Sender<()>>) {
    match command {
        Command::Load { located, reply } => {
            let started = Instant::now();
            let loaded = rows.load(&located).map(|()| started.elapsed());
            drop(reply.send(loaded));
        }
        Command::Add(new) => new.into_iter().for_each(|row| rows.add(row)),
        Command::Drop { jobs, reply } => {
            let dropped = jobs.into_iter().filter(|job| rows.remove_job(*job)).collect();
            drop(reply.send(dropped));
        }
        Command::TakeWaiting(reply) => drop(reply.send(rows.take_waiting())),
        Command::WhenIdle(reply) => idle.push(reply),
    }
}
