//! The running batch: rows that join and leave at step boundaries and share denoising passes.

use std::sync::Arc;

use super::calls;
use super::family::{Conditions, ModelRow, Pass};
use super::start::{self, Kept, Start};
use crate::noise::NoiseSource;
use crate::sampler::{self, Sampler};
use crate::{Checkpoint, Error, Latent, Result, RowId, RowRequest, RowStep};

/// More steps than this are a mistake: no schedule has as many noise levels.
const MOST_STEPS: usize = 1000;

/// Longer sides are a mistake too, and products of them would leave the range of sizes.
const LARGEST_SIDE: usize = 16_384;

/// Rows of one latent shape that share denoising passes and nothing else: each has its own prompts,
/// guidance, sampler, steps and noise.
pub struct RunningBatch {
    checkpoint: Arc<Checkpoint>,
    width: usize,
    height: usize,
    rows: Vec<Row>,
}

/// A row between two steps.
struct Row {
    id: RowId,
    sampler: Box<dyn Sampler>,
    noise: NoiseSource,
    /// Denoiser calls done.
    call: usize,
    /// Denoiser calls in all. Where the row ends in the middle of the way, its sampler has more.
    calls: usize,
    /// (channels, height, width) on the host: a few thousand numbers.
    latent: Vec<f32>,
    beside: Arc<[f32]>,
    kept: Option<Kept>,
    conditions: Conditions,
}

impl Row {
    /// What the denoiser sees: the latent as the sampler shows it, and what else there is.
    fn seen(&self) -> Arc<[f32]> {
        let mut sample = self.sampler.scale_model_input(self.call, &self.latent);
        sample.extend_from_slice(&self.beside);
        sample.into()
    }

    /// Goes on by what the denoiser said.
    fn advance(&mut self, output: &[f32]) {
        self.latent = self.sampler.step(self.call, &self.latent, output, &mut self.noise);
        self.call += 1;
        if let Some(kept) = &self.kept {
            let next = (self.call < self.calls).then_some(self.call);
            self.latent = kept.put_back(&self.latent, self.sampler.as_ref(), next);
        }
    }

    fn is_finite(&self) -> bool {
        self.latent.iter().all(|value| value.is_finite())
    }
}

impl RunningBatch {
    /// An empty batch for pictures of `width` × `height` pixels.
    pub fn new(checkpoint: Arc<Checkpoint>, width: usize, height: usize) -> Self {
        Self { checkpoint, width, height, rows: Vec::new() }
    }

    /// Adds a row: encodes its prompts and its init image, and draws its first noise. It takes part from the next
    /// step on.
    ///
    /// # Errors
    /// [`Error::Request`] naming the field that this checkpoint or this batch cannot serve.
    pub fn join(&mut self, id: RowId, request: &RowRequest) -> Result<()> {
        self.check(id, request)?;
        let checkpoint = &self.checkpoint;
        let (config, flow) = (checkpoint.sampler_config(), checkpoint.flow(self.latent_shape()));
        let mut sampler = sampler::build(config, request.sampler, request.schedule, request.steps, flow)?;
        if sampler.timesteps().is_empty() {
            return Err(Error::request("steps", "enough for one denoiser call", request.steps));
        }
        let conditions = checkpoint.condition(request)?;
        let mut noise = NoiseSource::new(request.seed);
        let calls = calls::choose(checkpoint, request, sampler.as_mut())?;
        let Start { latent, beside, kept } = start::start(checkpoint, request, sampler.as_ref(), &mut noise)?;
        self.rows.push(Row { id, sampler, noise, call: 0, calls, latent, beside, kept, conditions });
        Ok(())
    }

    fn check(&self, id: RowId, request: &RowRequest) -> Result<()> {
        if self.rows.iter().any(|row| row.id == id) {
            return Err(Error::request("row", "new to this batch", id));
        }
        let factor = self.checkpoint.side_multiple();
        for (field, asked, of_batch) in [("width", request.width, self.width), ("height", request.height, self.height)]
        {
            if asked == 0 || asked > LARGEST_SIDE || asked % factor != 0 {
                let limit = format!("a multiple of {factor} from {factor} to {LARGEST_SIDE}");
                return Err(Error::request(field, limit, asked));
            }
            if asked != of_batch {
                return Err(Error::request(field, format!("{of_batch} as in this batch"), asked));
            }
        }
        if !(1..=MOST_STEPS).contains(&request.steps) {
            return Err(Error::request("steps", format!("1 to {MOST_STEPS}"), request.steps));
        }
        let true_cfg_scale = request.true_cfg_scale.unwrap_or(0.0);
        for (field, scale) in [("guidance_scale", request.guidance_scale), ("true_cfg_scale", true_cfg_scale)] {
            if !(scale >= 0.0 && scale.is_finite()) {
                return Err(Error::request(field, "a finite number of at least 0", scale));
            }
        }
        if let Some(skipping) = &request.skip_layer_guidance {
            skipping.check(self.checkpoint.layers())?;
        }
        calls::check(&self.checkpoint, request)?;
        start::check(&self.checkpoint, request, self.latent_shape())
    }

    /// Takes a row out between steps; false if it was not there.
    pub fn leave(&mut self, id: RowId) -> bool {
        let before = self.rows.len();
        self.rows.retain(|row| row.id != id);
        self.rows.len() < before
    }

    /// The rows, in the order in which they joined.
    pub fn rows(&self) -> Vec<RowId> {
        self.rows.iter().map(|row| row.id).collect()
    }

    /// How many rows there are.
    pub fn len(&self) -> usize {
        self.rows.len()
    }

    /// Whether there are no rows.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// One denoiser call for `rows`, each at its own timestep; rows not named wait. The results come in
    /// the order of `rows`; a row whose result has a latent has left the batch.
    ///
    /// # Errors
    /// [`Error::NotFinite`] naming a row that cannot go on (it stays in the batch until it is taken
    /// out), [`Error::OutOfMemory`], [`Error::Device`], or [`Error::Request`] for an id that is not in
    /// the batch or is named twice. On any error no row has advanced, so the caller may try again with
    /// fewer rows.
    pub fn step(&mut self, rows: &[RowId]) -> Result<Vec<RowStep>> {
        if rows.is_empty() {
            return Ok(Vec::new());
        }
        let places = self.places(rows)?;
        let outputs = self.denoise(&places)?;

        // Nothing can fail from here on: the rows advance.
        let shape = self.latent_shape();
        let mut steps = Vec::with_capacity(places.len());
        for (place, output) in places.into_iter().zip(outputs) {
            let row = &mut self.rows[place];
            row.advance(&output);
            // A latent that has just left the finite numbers is reported by the next step.
            let finished = row.call == row.calls && row.is_finite();
            let latent = finished.then(|| finish(row, shape));
            steps.push(RowStep { id: row.id, step: row.call, total: row.calls, latent });
        }
        self.rows.retain(|row| !steps.iter().any(|step| step.id == row.id && step.latent.is_some()));
        Ok(steps)
    }

    /// Where the rows stand; each must be here, once, and finite.
    fn places(&self, rows: &[RowId]) -> Result<Vec<usize>> {
        let mut places = Vec::with_capacity(rows.len());
        for id in rows {
            let place = self.rows.iter().position(|row| row.id == *id);
            let place = place.ok_or_else(|| Error::request("row", "in this batch", id))?;
            if places.contains(&place) {
                return Err(Error::request("row", "named once in a step", id));
            }
            if !self.rows[place].is_finite() {
                return Err(Error::NotFinite { row: *id });
            }
            places.push(place);
        }
        Ok(places)
    }

    /// One pass of the denoiser over these rows, and what guidance makes of it: one output per row.
    fn denoise(&self, places: &[usize]) -> Result<Vec<Vec<f32>>> {
        let mut model_rows = Vec::with_capacity(2 * places.len());
        for row in places.iter().map(|place| &self.rows[*place]) {
            let sample = row.seen();
            let timestep = row.sampler.timesteps()[row.call];
            for Pass { conditioning, skipped } in row.conditions.passes(row.call) {
                let (sample, conditioning) = (Arc::clone(&sample), conditioning.clone());
                model_rows.push(ModelRow { sample, timestep, conditioning, skipped });
            }
        }
        let mut predicted = self.checkpoint.denoise(&model_rows, self.latent_shape())?.into_iter();
        let mut outputs = Vec::with_capacity(places.len());
        for row in places.iter().map(|place| &self.rows[*place]) {
            let output = row.conditions.combine(row.call, predicted.by_ref());
            if output.len() != row.latent.len() || !output.iter().all(|value| value.is_finite()) {
                return Err(Error::NotFinite { row: row.id });
            }
            outputs.push(output);
        }
        Ok(outputs)
    }

    /// Channels, height and width of this batch's latents.
    fn latent_shape(&self) -> [usize; 3] {
        let factor = self.checkpoint.vae_factor();
        [self.checkpoint.latent_channels(), self.height / factor, self.width / factor]
    }
}

fn finish(row: &mut Row, [channels, height, width]: [usize; 3]) -> Latent {
    Latent { values: std::mem::take(&mut row.latent), channels, height, width, row: row.id }
}
