//! What rows must agree on to share a denoising pass.

use serde::{Deserialize, Serialize};

use crate::spec::RenderSpec;

/// Only what the tensors force: the checkpoint and the latent's shape. Steps, sampler, schedule,
/// guidance, seed and prompts are each row's own.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct BatchKey {
    /// The checkpoint.
    pub model: String,
    /// Picture width in pixels.
    pub width: u32,
    /// Picture height in pixels.
    pub height: u32,
}

impl BatchKey {
    /// The key of a job.
    pub fn of(spec: &RenderSpec) -> Self {
        Self { model: spec.model.clone(), width: spec.width, height: spec.height }
    }
}
