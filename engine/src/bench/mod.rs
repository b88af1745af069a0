//! What a bench needs to see of the engine that nobody else does: how fast this machine could be, and
//! each operation by itself at the shapes that models call it with.
//!
//! Reading order: `ceilings` (what the machine can do) over `peaks` (its multiply-adds), `device` (what a GPU can do), `cases` (what
//! the operations are asked for), `latent` (something to decode).
//!
//! Invariant: nothing in the engine depends on this module.

mod cases;
mod ceilings;
mod device;
mod latent;
mod peaks;

pub use cases::{Case, Prepared, cases};
pub use ceilings::{Bandwidth, Peak, Rate, bandwidth, multiply_add_peaks, threads};
pub use device::{DeviceRates, device_rates};
pub use latent::noise_latents;

/// The instructions that the kernels have chosen on this processor: `avx512-bf16`.
pub fn instructions() -> &'static str {
    crate::ops::Isa::best().as_str()
}

/// Keeps this process to the instructions called `word`, as [`instructions`] calls them: what does a lesser
/// machine do? To be called before anything is computed.
///
/// # Errors
/// [`crate::Error::Request`] for a word that stands for none, or once kernels have been chosen.
pub fn limit_instructions(word: &str) -> crate::Result<()> {
    crate::ops::Isa::limit(word)
}
