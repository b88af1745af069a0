//! The networks that predict the noise (or the velocity) in a latent, one folder for each of them; all
//! take one timestep per row. Beside them is what they share.

mod embedding;
mod patches;
mod resnet;

mod flux;
mod mmdit;
mod unet;

pub(crate) use flux::{FluxInputs, FluxTransformer, SIDE as FLUX_PATCH};
pub(crate) use mmdit::{Mmdit, Prompts};
pub(crate) use resnet::{ResnetBlock, ResnetShape};
pub(crate) use unet::{Added, UNet};
