//! The engine: tensors in, images out. It turns a folder of weights into a [`Checkpoint`], and rows of
//! prompts into latents, one denoising step of a whole [`RunningBatch`] at a time, and latents into
//! pictures. Diffusers is the reference: the same seed gives the same picture.
//!
//! Reading order: `pipeline` tells the story; `text`, `denoiser` and `vae` are the three networks;
//! `sampler`, `noise` and `guidance` are the numbers around them; `family` and `facts` say what a
//! checkpoint is, `source` where its parts lie; `weights` reads files; `ops` is the only place that
//! knows how fast an operation can be, and `bench` measures that.
//!
//! Invariant: nothing in here knows of jobs, queues, databases or networks; there is no async code, no
//! random number that does not come from a row's seed, and no row whose picture depends on its batch.

mod error;
mod pipeline;

mod denoiser;
mod guidance;
mod text;
mod vae;

mod noise;
mod sampler;

mod facts;
mod family;
mod inspect;
mod source;

mod config;
mod device;
mod ops;
mod weights;

pub mod bench;

#[cfg(test)]
mod goldens;
#[cfg(test)]
#[path = "../tests/integration/recipe.rs"]
mod recipe;

pub use device::{Device, DeviceChoice, Precision};
pub use error::{Error, Result};
pub use facts::{CheckpointFacts, facts};
pub use family::{FAMILIES, FamilyFacts, FamilyKind, PredictionKind};
pub use inspect::{InspectedFile, InspectedPart, InspectedTensor, Inspection, inspect};
pub use pipeline::{
    Checkpoint, EncoderCounts, InitContent, InitImage, Latent, LoadOptions, Mask, MaskedContent, MicroConditioning,
    RowId, RowRequest, RowStep, RunningBatch, SkipLayerGuidance, TextEncoders, denoise, gray, render, resized,
};
pub use sampler::{SamplerKind, ScheduleKind};
pub use text::CacheCounts;
