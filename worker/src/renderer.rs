//! The seam between the device thread and what renders: the engine, or a double in tests.

use std::fmt;
use std::sync::Arc;

use anyhow::Context as _;
use engine::{
    Checkpoint, Device, DeviceChoice, InitImage, LoadOptions, Precision, RowId, RowRequest, RunningBatch, TextEncoders,
};
use farm::config::WorkerConfig;
use farm::fleet::TextStatus;
use farm::job::{Failure, FailureKind};
use farm::latent::LatentFile;
use farm::spec::RenderSpec;
use image::RgbImage;

use crate::resolve::Located;

/// Why a render call failed, as far as the device thread branches on it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RenderError {
    /// The checkpoint or the row's parameters are refused: trying again does not help.
    Invalid(String),
    /// Memory did not suffice; fewer rows may fit.
    OutOfMemory(String),
    /// This worker cannot any more what it could before; another may.
    Unavailable(String),
    /// The call failed otherwise.
    Broken(String),
    /// The call panicked: what it worked on is not to be trusted any more.
    Panicked(String),
}

impl fmt::Display for RenderError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Invalid(message)
            | Self::OutOfMemory(message)
            | Self::Unavailable(message)
            | Self::Broken(message) => f.write_str(message),
            Self::Panicked(message) => write!(f, "the renderer panicked: {message}"),
        }
    }
}

impl From<engine::Error> for RenderError {
    fn from(error: engine::Error) -> Self {
        let message = error.to_string();
        match error {
            engine::Error::Checkpoint { .. } | engine::Error::Request { .. } => Self::Invalid(message),
            engine::Error::OutOfMemory(_) => Self::OutOfMemory(message),
            engine::Error::Changed { .. } => Self::Unavailable(message),
            engine::Error::NotFinite { .. } => Self::Broken("the picture left the range of finite numbers".into()),
            engine::Error::Device(_) => Self::Broken(message),
        }
    }
}

impl From<RenderError> for Failure {
    /// The failure of a row that was alone when this happened.
    fn from(error: RenderError) -> Self {
        let kind = match error {
            RenderError::Invalid(_) => FailureKind::Invalid,
            RenderError::OutOfMemory(_) => FailureKind::OutOfMemory,
            RenderError::Unavailable(_) => FailureKind::Retryable,
            RenderError::Broken(_) | RenderError::Panicked(_) => FailureKind::Poison,
        };
        Failure { kind, message: error.to_string() }
    }
}

/// A row's step, done.
#[derive(Debug)]
pub struct Stepped<L> {
    /// The row.
    pub row: RowId,
    /// Denoiser calls so far.
    pub step: u32,
    /// Denoiser calls in all.
    pub total: u32,
    /// The final latent: the row has left the batch.
    pub latent: Option<L>,
}

/// Holds one checkpoint and renders with it. Lives on the device thread.
pub trait Renderer: Send + 'static {
    /// A finished row before it is decoded.
    type Latent;
    /// Rows of one picture size.
    type Batch: RowBatch<Latent = Self::Latent>;

    /// Loads a checkpoint; the one before is dropped first, so that two never share the memory.
    fn load(&mut self, located: &Located) -> Result<(), RenderError>;

    /// An empty batch for pictures of `width` × `height` pixels. Called with a checkpoint loaded.
    fn batch(&self, width: u32, height: u32) -> Self::Batch;

    /// Told before rows join: makes ready what the `joining` ones need and, where that is costly to begin with, what
    /// the `waiting` ones will need later. What goes wrong shows when the row joins.
    fn prepare(&self, joining: &[&RenderSpec], waiting: &[&RenderSpec]);

    /// What text encoders did and take, over all checkpoints so far.
    fn text(&self) -> TextStatus;

    /// Turns latents into pictures, in order.
    fn decode(&self, latents: &[Self::Latent]) -> Result<Vec<RgbImage>, RenderError>;

    /// A latent as it is stored, for another job to go on from.
    fn hand_over(&self, latent: &Self::Latent) -> LatentFile;

    /// The device, for people (`cpu (2 threads)`).
    fn device(&self) -> String;

    /// The number format it computes in (`f32`).
    fn dtype(&self) -> String;
}

/// Rows that share denoising passes and nothing else.
pub trait RowBatch {
    /// See [`Renderer::Latent`].
    type Latent;

    /// Adds a row, which starts from `init` if there is one.
    fn join(&mut self, row: RowId, spec: &RenderSpec, init: Option<&InitImage>) -> Result<(), RenderError>;

    /// Takes a row out, if it is there.
    fn leave(&mut self, row: RowId);

    /// One denoiser call for `rows`. On an error, no row has advanced.
    fn step(&mut self, rows: &[RowId]) -> Result<Vec<Stepped<Self::Latent>>, RenderError>;
}

/// Opens the configured device, else the best there is, with the number format to render in.
///
/// # Errors
/// If there is no such device or format, or this build cannot use it.
pub fn open_device(config: &WorkerConfig) -> anyhow::Result<(Device, Precision)> {
    let choice = match &config.device {
        Some(word) => word.parse().context("worker.device")?,
        None => DeviceChoice::best(),
    };
    let device = Device::open(choice).with_context(|| format!("opening device {choice}"))?;
    let precision = match &config.dtype {
        Some(word) => word.parse().context("worker.dtype")?,
        None => Precision::default_for(&device),
    };
    Ok((device, precision))
}

/// The engine on one device.
pub struct EngineRenderer {
    device: Device,
    precision: Precision,
    vae_bytes: Option<usize>,
    text_encoders: TextEncoders,
    embedding_bytes: usize,
    checkpoint: Option<Arc<Checkpoint>>,
    /// What the text encoders of earlier checkpoints did.
    before: TextStatus,
}

impl EngineRenderer {
    /// Opens the configured device.
    ///
    /// # Errors
    /// If there is no such device or this build cannot use it.
    pub fn open(config: &WorkerConfig) -> anyhow::Result<Self> {
        let (device, precision) = open_device(config)?;
        let bytes = |bytes: u64| usize::try_from(bytes).unwrap_or(usize::MAX);
        Ok(Self {
            device,
            precision,
            vae_bytes: config.vae_bytes.map(bytes),
            text_encoders: config.text_encoders.parse().context("worker.text_encoders")?,
            embedding_bytes: bytes(config.embedding_bytes),
            checkpoint: None,
            before: TextStatus::default(),
        })
    }

    fn loaded(&self) -> &Arc<Checkpoint> {
        self.checkpoint.as_ref().expect("rows come only after a checkpoint is loaded")
    }
}

impl Renderer for EngineRenderer {
    type Latent = engine::Latent;
    type Batch = EngineBatch;

    fn load(&mut self, Located { path, parts, family }: &Located) -> Result<(), RenderError> {
        self.before = TextStatus { embedding_bytes: 0, encoder_bytes: 0, ..self.text() };
        self.checkpoint = None;
        let options = LoadOptions {
            beside: parts.as_deref(),
            family: family.as_deref().map(str::parse).transpose()?,
            text_encoders: self.text_encoders,
            embedding_bytes: Some(self.embedding_bytes),
        };
        let checkpoint = Checkpoint::load_with(path, &self.device, self.precision, options)?;
        let checkpoint = checkpoint.with_vae_bytes(self.vae_bytes);
        self.checkpoint = Some(Arc::new(checkpoint));
        Ok(())
    }

    fn batch(&self, width: u32, height: u32) -> EngineBatch {
        EngineBatch(RunningBatch::new(Arc::clone(self.loaded()), width as usize, height as usize))
    }

    fn prepare(&self, joining: &[&RenderSpec], waiting: &[&RenderSpec]) {
        let requests = |specs: &[&RenderSpec]| -> Vec<RowRequest> {
            specs.iter().filter_map(|spec| row_request(spec).ok()).collect()
        };
        self.loaded().prepare(&requests(joining), &requests(waiting));
    }

    fn text(&self) -> TextStatus {
        let Some(checkpoint) = &self.checkpoint else { return self.before };
        let (embeddings, encoders) = (checkpoint.embedding_counts(), checkpoint.encoder_counts());
        TextStatus {
            embedding_hits: self.before.embedding_hits + embeddings.hits,
            embedding_misses: self.before.embedding_misses + embeddings.misses,
            embedding_bytes: embeddings.bytes as u64,
            encoder_reads: self.before.encoder_reads + encoders.reads,
            encoder_bytes: encoders.held_bytes as u64,
        }
    }

    fn decode(&self, latents: &[engine::Latent]) -> Result<Vec<RgbImage>, RenderError> {
        Ok(self.loaded().decode(latents)?)
    }

    fn hand_over(&self, latent: &engine::Latent) -> LatentFile {
        let [channels, height, width] = latent.shape().map(|side| side as u32);
        LatentFile { channels, height, width, values: latent.values().to_vec() }
    }

    fn device(&self) -> String {
        self.device.describe()
    }

    fn dtype(&self) -> String {
        self.precision.as_str().to_owned()
    }
}

/// The engine's running batch.
pub struct EngineBatch(RunningBatch);

impl RowBatch for EngineBatch {
    type Latent = engine::Latent;

    fn join(&mut self, row: RowId, spec: &RenderSpec, init: Option<&InitImage>) -> Result<(), RenderError> {
        Ok(self.0.join(row, &RowRequest { init_image: init.cloned(), ..row_request(spec)? })?)
    }

    fn leave(&mut self, row: RowId) {
        self.0.leave(row);
    }

    fn step(&mut self, rows: &[RowId]) -> Result<Vec<Stepped<engine::Latent>>, RenderError> {
        let steps = self.0.step(rows)?.into_iter().map(|step| Stepped {
            row: step.id,
            step: step.step as u32,
            total: step.total as u32,
            latent: step.latent,
        });
        Ok(steps.collect())
    }
}

/// A job in the engine's words, but for what it starts from.
pub fn row_request(spec: &RenderSpec) -> Result<RowRequest, RenderError> {
    let options = &spec.options;
    Ok(RowRequest {
        prompt: spec.prompt.clone(),
        negative_prompt: spec.negative_prompt.clone(),
        width: spec.width as usize,
        height: spec.height as usize,
        steps: spec.steps as usize,
        guidance_scale: spec.guidance_scale,
        sampler: spec.sampler.map(|sampler| sampler.as_str().parse()).transpose()?,
        schedule: spec.schedule.map(|schedule| schedule.as_str().parse()).transpose()?,
        seed: spec.seed,
        micro_conditioning: options.micro_conditioning.as_ref().map(micro_conditioning).unwrap_or_default(),
        max_sequence_length: options.max_sequence_length.map(|tokens| tokens as usize),
        true_cfg_scale: options.true_cfg_scale,
        skip_layer_guidance: options.skip_layer_guidance.as_ref().map(|guidance| engine::SkipLayerGuidance {
            layers: guidance.layers.iter().map(|layer| *layer as usize).collect(),
            scale: guidance.scale,
            start: guidance.start,
            stop: guidance.stop,
        }),
        init_image: None,
        denoising_start: options.denoising_start,
        denoising_end: options.denoising_end,
    })
}

fn micro_conditioning(asked: &farm::spec::MicroConditioning) -> engine::MicroConditioning {
    let pair = |(a, b): (u32, u32)| (a as usize, b as usize);
    engine::MicroConditioning {
        original_size: asked.original_size.map(pair),
        crop: pair(asked.crop),
        target_size: asked.target_size.map(pair),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_job_that_needs_files_which_have_changed_is_left_to_other_workers() {
        let problem = "it is gone".to_owned();
        let error = RenderError::from(engine::Error::Changed { path: "/weights/t5.safetensors".into(), problem });
        let failure = Failure::from(error);
        assert_eq!(failure.kind, FailureKind::Retryable);
        assert!(failure.message.starts_with("/weights/t5.safetensors: it is gone"), "{}", failure.message);
    }
}
