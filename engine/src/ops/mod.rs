//! The operations that cost time: convolution, linear, attention, group norm (+ SiLU), layer norm and
//! what surrounds them. Models call nothing else for these, so that this module alone knows how fast
//! an operation can be on a device.
//!
//! A feature map is (rows, height, width, channels) and tokens are (rows, tokens, channels): channels
//! come last, so that a pixel is a token and a 1×1 convolution a linear layer.
//!
//! On the processor each row of a batch is computed by itself, cut into tiles whose size depends on
//! the shape of one row alone; no sum's order depends on the batch or on the number of threads, so a
//! row's numbers are bit for bit the same in any company. Sums are in `f32` whatever the tensors'
//! format. Other devices use candle's own kernels.

mod attention;
mod conv;
mod linear;
mod norm;

mod activation;
mod layout;

mod host;
mod layer;
mod matmul;
#[cfg(test)]
mod reference;

pub(crate) use activation::{geglu, gelu, quick_gelu, silu};
pub(crate) use attention::{Mask, attention};
pub(crate) use conv::{Conv2d, ConvShape};
pub(crate) use layout::{channels_first, channels_last, concat_channels, upsample_nearest};
pub(crate) use linear::Linear;
pub(crate) use norm::{GroupNorm, LayerNorm};

/// An operation was given tensors that do not fit it; the models check what comes from outside.
fn misuse(problem: String) -> crate::Error {
    candle_core::Error::Msg(problem).into()
}
