//! The rows on the device: lets them join, steps them, finds the culprit when a pass fails, and turns
//! finished ones into pictures. Synchronous; everything it learns goes out as events.

use std::any::Any;
use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};

use engine::{InitImage, RowId};
use farm::batch_key::BatchKey;
use farm::fleet::TextStatus;
use farm::id::JobId;
use farm::spec::RenderSpec;
use tokio::sync::mpsc;

use crate::batcher::{Batcher, Plan};
use crate::device::{Event, NewRow, Output, Rendered};
use crate::renderer::{RenderError, Renderer, RowBatch};
use crate::resolve::Located;

/// What is remembered of a row while it is on the device.
struct Track {
    spec: Arc<RenderSpec>,
    init: Option<InitImage>,
    arrived: Instant,
    joined: Instant,
    passes: u32,
    rows_in_passes: u64,
    largest_batch: u32,
}

/// A row that has made its last step.
struct Denoised<L> {
    row: RowId,
    latent: L,
    at: Instant,
}

pub(crate) struct Rows<R: Renderer> {
    renderer: R,
    batcher: Batcher,
    /// The running batch of each key.
    shared: HashMap<BatchKey, R::Batch>,
    /// Rows whose shared batch was lost to a panic, each in a batch of its own.
    alone: HashMap<RowId, R::Batch>,
    tracks: HashMap<RowId, Track>,
    /// Latents that decode at once, where more have been seen not to fit into memory.
    decodable: HashMap<BatchKey, usize>,
    /// What the renderer last said of its text encoders.
    text: TextStatus,
    events: mpsc::UnboundedSender<Event>,
}

impl<R: Renderer> Rows<R> {
    pub(crate) fn new(renderer: R, max_batch: usize, patience: Duration, events: mpsc::UnboundedSender<Event>) -> Self {
        Self {
            renderer,
            batcher: Batcher::new(max_batch, patience),
            shared: HashMap::new(),
            alone: HashMap::new(),
            tracks: HashMap::new(),
            decodable: HashMap::new(),
            text: TextStatus::default(),
            events,
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.batcher.is_empty()
    }

    pub(crate) fn load(&mut self, located: &Located) -> Result<(), RenderError> {
        if !self.is_empty() {
            return Err(RenderError::Broken("rows of another checkpoint are still running".into()));
        }
        self.shared.clear();
        let loaded = guarded(|| self.renderer.load(located));
        self.tell_text();
        loaded
    }

    pub(crate) fn add(&mut self, NewRow { job_id, spec, init }: NewRow) {
        let now = Instant::now();
        let row = self.batcher.add(job_id, BatchKey::of(&spec), spec.lane, now);
        let track = Track { spec, init, arrived: now, joined: now, passes: 0, rows_in_passes: 0, largest_batch: 0 };
        self.tracks.insert(row, track);
    }

    /// Takes a job's row out; false if it is not here.
    pub(crate) fn remove_job(&mut self, job: JobId) -> bool {
        self.batcher.row_of(job).is_some_and(|row| self.remove(row).is_some())
    }

    /// Takes all rows out that have not joined a batch.
    pub(crate) fn take_waiting(&mut self) -> Vec<JobId> {
        let taken = self.batcher.take_waiting();
        taken.iter().for_each(|(row, _)| drop(self.tracks.remove(row)));
        taken.into_iter().map(|(_, row)| row.job_id).collect()
    }

    /// One step boundary: rows join, those of one key make a step, finished ones become pictures.
    pub(crate) fn step(&mut self) {
        let Some(Plan { key, join }) = self.batcher.plan(Instant::now()) else { return };
        self.prepare(&join);
        join.into_iter().for_each(|row| self.join(&key, row));
        let mut finished = Vec::new();
        let (alone, together): (Vec<_>, Vec<_>) =
            self.batcher.running(&key).into_iter().partition(|row| self.alone.contains_key(row));
        for rows in together.chunks(self.batcher.limit(&key)) {
            self.pass(&key, rows, &mut finished);
        }
        for row in alone {
            self.pass(&key, &[row], &mut finished);
        }
        let finished = self.hand_over(finished);
        self.decode(&key, finished);
        self.shared.retain(|key, _| !self.batcher.running(key).is_empty());
        self.tell_text();
    }

    /// Has the renderer get ready for the rows that join, and for all that wait.
    fn prepare(&mut self, join: &[RowId]) {
        if join.is_empty() {
            return;
        }
        let spec = |row: &RowId| self.tracks.get(row).map(|track| track.spec.as_ref());
        let joining: Vec<&RenderSpec> = join.iter().filter_map(spec).collect();
        let waiting: Vec<&RenderSpec> = self.batcher.waiting().iter().filter_map(spec).collect();
        let prepared = guarded(|| {
            self.renderer.prepare(&joining, &waiting);
            Ok(())
        });
        if let Err(error) = prepared {
            tracing::warn!(%error, rows = joining.len(), "rows join unprepared");
        }
    }

    fn join(&mut self, key: &BatchKey, row: RowId) {
        let Some(track) = self.tracks.get_mut(&row) else { return };
        let batch = self.shared.entry(key.clone()).or_insert_with(|| self.renderer.batch(key.width, key.height));
        match guarded(|| batch.join(row, &track.spec, track.init.as_ref())) {
            Ok(()) => {
                track.joined = Instant::now();
                self.tell_joined(row);
            }
            Err(RenderError::OutOfMemory(_)) if self.batcher.running(key).len() > 1 => {
                self.batcher.put_back(row);
                let fitting = self.batcher.running(key).len();
                tracing::warn!(?key, rows = fitting, "out of memory: no more rows join");
                self.batcher.learn_limit(key, fitting);
            }
            Err(error @ RenderError::Panicked(_)) => {
                self.fail(row, error);
                self.start_anew(key);
            }
            Err(error) => self.fail(row, error),
        }
    }

    /// One denoiser call for `rows`; where it fails, one for each half, and so on down to the culprit.
    fn pass(&mut self, key: &BatchKey, rows: &[RowId], finished: &mut Vec<Denoised<R::Latent>>) {
        // A panic in a call before may have taken rows out of the shared batch.
        let rows: Vec<_> =
            rows.iter().copied().filter(|row| self.batcher.row(*row).is_some_and(|row| row.running)).collect();
        let Some(first) = rows.first() else { return };
        let batch = match self.alone.get_mut(first) {
            Some(batch) if rows.len() == 1 => batch,
            Some(_) => return,
            None => match self.shared.get_mut(key) {
                Some(batch) => batch,
                None => return,
            },
        };
        match guarded(|| batch.step(&rows)) {
            Ok(steps) => {
                for step in steps {
                    self.note_step(step.row, rows.len(), step.step, step.total);
                    if let Some(latent) = step.latent {
                        finished.push(Denoised { row: step.row, latent, at: Instant::now() });
                    }
                }
            }
            Err(error) if rows.len() == 1 => {
                let panicked = matches!(error, RenderError::Panicked(_));
                let was_alone = self.alone.contains_key(&rows[0]);
                self.fail(rows[0], error);
                if panicked && !was_alone {
                    self.start_anew(key);
                }
            }
            Err(RenderError::Panicked(message)) => {
                tracing::error!(?key, rows = rows.len(), message, "the renderer panicked: its rows start anew, alone");
                self.start_anew(key);
            }
            Err(error) => {
                let half = rows.len().div_ceil(2);
                tracing::warn!(?key, rows = rows.len(), %error, "a pass failed: trying its halves");
                if matches!(error, RenderError::OutOfMemory(_)) {
                    self.batcher.learn_limit(key, rows.len() / 2);
                }
                self.pass(key, &rows[..half], finished);
                self.pass(key, &rows[half..], finished);
            }
        }
    }

    /// The shared batch of a key is not to be trusted any more: its rows begin again, each alone. Their
    /// pictures are the same: a row is a function of its job.
    fn start_anew(&mut self, key: &BatchKey) {
        self.shared.remove(key);
        for row in self.batcher.running(key) {
            if self.alone.contains_key(&row) {
                continue;
            }
            let Some(track) = self.tracks.get(&row) else { continue };
            let mut batch = self.renderer.batch(key.width, key.height);
            match guarded(|| batch.join(row, &track.spec, track.init.as_ref())) {
                Ok(()) => drop(self.alone.insert(row, batch)),
                Err(error) => self.fail(row, error),
            }
        }
    }

    /// Lets the rows go that end in latents; the others are to be decoded.
    fn hand_over(&mut self, finished: Vec<Denoised<R::Latent>>) -> Vec<Denoised<R::Latent>> {
        let ends_early = |row| self.tracks.get(&row).is_some_and(|track| track.spec.options.denoising_end.is_some());
        let (latents, pictures): (Vec<_>, Vec<_>) = finished.into_iter().partition(|denoised| ends_early(denoised.row));
        for Denoised { row, latent, at } in latents {
            match guarded(|| Ok(self.renderer.hand_over(&latent))) {
                Ok(file) => self.tell_rendered(row, at, Output::Latent(file)),
                Err(error) => self.fail(row, error),
            }
        }
        pictures
    }

    fn decode(&mut self, key: &BatchKey, mut finished: Vec<Denoised<R::Latent>>) {
        while !finished.is_empty() {
            let most = self.decodable.get(key).copied().unwrap_or(usize::MAX).min(finished.len());
            let rest = finished.split_off(most);
            let (rows, latents): (Vec<_>, Vec<_>) =
                finished.into_iter().map(|denoised| ((denoised.row, denoised.at), denoised.latent)).unzip();
            self.decode_part(key, &rows, &latents);
            finished = rest;
        }
    }

    fn decode_part(&mut self, key: &BatchKey, rows: &[(RowId, Instant)], latents: &[R::Latent]) {
        match guarded(|| self.renderer.decode(latents)) {
            Ok(images) if images.len() == rows.len() => {
                for ((row, denoised_at), image) in rows.iter().zip(images) {
                    self.tell_rendered(*row, *denoised_at, Output::Picture(image));
                }
            }
            Ok(images) => {
                let message = format!("{} latents became {} pictures", rows.len(), images.len());
                rows.iter().for_each(|(row, _)| self.fail(*row, RenderError::Broken(message.clone())));
            }
            Err(error) if rows.len() == 1 => self.fail(rows[0].0, error),
            Err(error) => {
                let half = rows.len().div_ceil(2);
                tracing::warn!(?key, rows = rows.len(), %error, "decoding failed: trying halves");
                if matches!(error, RenderError::OutOfMemory(_)) {
                    self.decodable.insert(key.clone(), rows.len() / 2);
                }
                self.decode_part(key, &rows[..half], &latents[..half]);
                self.decode_part(key, &rows[half..], &latents[half..]);
            }
        }
    }

    fn fail(&mut self, row: RowId, error: RenderError) {
        if let Some((job_id, _)) = self.remove(row) {
            self.tell(Event::Failed(job_id, error.into()));
        }
    }

    fn remove(&mut self, row: RowId) -> Option<(JobId, Track)> {
        let removed = self.batcher.remove(row)?;
        if self.alone.remove(&row).is_none()
            && let Some(batch) = self.shared.get_mut(&removed.key)
        {
            batch.leave(row);
        }
        Some((removed.job_id, self.tracks.remove(&row)?))
    }

    fn note_step(&mut self, row: RowId, rows: usize, step: u32, total: u32) {
        let (Some(track), Some(seat)) = (self.tracks.get_mut(&row), self.batcher.row(row)) else { return };
        track.passes += 1;
        track.rows_in_passes += rows as u64;
        track.largest_batch = track.largest_batch.max(rows as u32);
        self.tell(Event::Stepped { job_id: seat.job_id, step, total });
    }

    fn tell_joined(&self, row: RowId) {
        if let Some(seat) = self.batcher.row(row) {
            self.tell(Event::Joined(seat.job_id));
        }
    }

    fn tell_rendered(&mut self, row: RowId, denoised_at: Instant, output: Output) {
        let Some((job_id, track)) = self.remove(row) else { return };
        self.tell(Event::Rendered(Box::new(Rendered {
            job_id,
            output,
            wait: track.joined - track.arrived,
            denoise: denoised_at - track.joined,
            decode: denoised_at.elapsed(),
            largest_batch: track.largest_batch,
            mean_batch: track.rows_in_passes as f64 / f64::from(track.passes.max(1)),
        })));
    }

    fn tell_text(&mut self) {
        let text = self.renderer.text();
        if text != self.text {
            self.text = text;
            self.tell(Event::Text(text));
        }
    }

    /// Nobody listens any more once the worker stops.
    fn tell(&self, event: Event) {
        let _nobody_listens = self.events.send(event);
    }
}

/// Calls the renderer; a panic becomes an error.
fn guarded<T>(call: impl FnOnce() -> Result<T, RenderError>) -> Result<T, RenderError> {
    catch_unwind(AssertUnwindSafe(call)).unwrap_or_else(|panic| Err(RenderError::Panicked(message_of(&*panic))))
}

fn message_of(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "without a message".into())
}
