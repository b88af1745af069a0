//! The network that predicts the noise in a latent: `UNet2DConditionModel` of Stable Diffusion 1.x and
//! 2.x, with one timestep per row.

mod blocks;
mod config;
mod resnet;
mod timestep;
mod transformer;
mod unet;

pub(crate) use resnet::{ResnetBlock, ResnetShape};
pub(crate) use unet::UNet;
