//! The operations that cost time: convolution, linear, attention, group norm (+ SiLU), layer norm and
//! what surrounds them. Models call nothing else for these, so that this module alone knows how fast
//! an operation can be on a device, and in which layout and format its values lie.
//!
//! A feature map is (rows, height, width, channels) and tokens are (rows, tokens, channels): channels
//! come last, so that a pixel is a token and a 1×1 convolution a linear layer.
//!
//! On the processor the kernels are ours (`kernel`), chosen when the program runs; activations are `f32`
//! or `bf16`, sums always `f32`. Each sum is formed in an order that depends on nothing but the shape of
//! one row, so a row's numbers are bit for bit the same in any company and on any number of threads.
//! Other devices use candle's kernels.
//!
//! Reading order: `tensor` (what is passed around), `linear`, `conv`, `upsample`, `norm`, `layer_norm`, `rms_norm`,
//! `attention`, `activation`, `layout`, `tokens`; below them `windows` (convolution on the host), `per_token`, `kernel`,
//! `buffer` (memory), `shared` (threads) and `parameter` (weights as they are stored).

mod parameter;
mod tensor;

mod activation;
mod attention;
mod conv;
mod layer_norm;
mod layout;
mod linear;
mod norm;
mod rms_norm;
mod rotation;
mod tokens;
mod upsample;

mod buffer;
mod kernel;
mod per_token;
mod shared;
mod windows;
mod winograd;

#[cfg(test)]
mod reference;

pub(crate) use activation::{multiply, silu};
pub(crate) use attention::{Mask, attention, relative_attention};
pub(crate) use buffer::release_memory;
pub(crate) use conv::{Conv2d, ConvShape};
pub(crate) use kernel::blocks::Quantisation;
pub(crate) use kernel::isa::Isa;
pub(crate) use layer_norm::LayerNorm;
pub(crate) use layout::{channels_first, concat_channels, embed, feature_map, lines, select, stack_lines};
pub(crate) use linear::{Activation, Linear};
pub(crate) use norm::{GroupNorm, Seen};
pub(crate) use parameter::{Parameter, Source, Stored};
pub(crate) use rms_norm::RmsNorm;
pub(crate) use rotation::Rotation;
pub(crate) use tensor::{Place, Tensor};
pub(crate) use tokens::{cat_tokens, split_channels, split_tokens};
pub(crate) use upsample::UpsampleConv;

/// An operation was given tensors that do not fit it; the models check what comes from outside.
fn misuse(problem: String) -> crate::Error {
    candle_core::Error::Msg(problem).into()
}
