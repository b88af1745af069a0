//! The residual block of the U-Net and of the VAE.
//!
//! Reference: <https://github.com/huggingface/diffusers/blob/v0.36.0/src/diffusers/models/resnet.py>
//! (`ResnetBlock2D`).

use crate::Result;
use crate::ops::{Conv2d, ConvShape, GroupNorm, Linear, Seen, Tensor};
use crate::weights::Scope;

/// A block's dimensions.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ResnetShape {
    pub inputs: usize,
    pub outputs: usize,
    /// Width of the time embedding, if the block listens to it.
    pub time_width: Option<usize>,
    pub groups: usize,
    pub epsilon: f64,
}

/// Twice norm, SiLU and convolution, with the time added in between and the input at the end.
pub(crate) struct ResnetBlock {
    norm1: GroupNorm,
    conv1: Conv2d,
    time_emb_proj: Option<Linear>,
    norm2: GroupNorm,
    conv2: Conv2d,
    conv_shortcut: Option<Conv2d>,
}

impl ResnetBlock {
    pub fn load(scope: &Scope<'_>, shape: ResnetShape) -> Result<Self> {
        let ResnetShape { inputs, outputs, time_width, groups, epsilon } = shape;
        let time_emb_proj = time_width.map(|width| scope.at("time_emb_proj").linear(width, outputs)).transpose()?;
        let conv_shortcut = if inputs == outputs {
            None
        } else {
            Some(scope.at("conv_shortcut").conv2d(inputs, outputs, 1, ConvShape::same(1))?)
        };
        Ok(Self {
            norm1: scope.at("norm1").group_norm(inputs, groups, epsilon)?,
            conv1: scope.at("conv1").conv2d(inputs, outputs, 3, ConvShape::same(3))?,
            time_emb_proj,
            norm2: scope.at("norm2").group_norm(outputs, groups, epsilon)?,
            conv2: scope.at("conv2").conv2d(outputs, outputs, 3, ConvShape::same(3))?,
            conv_shortcut,
        })
    }

    /// (rows, height, width, inputs) → (rows, height, width, outputs); `time` is (rows, time width)
    /// after its SiLU.
    pub fn forward(&self, x: &Tensor, time: Option<&Tensor>) -> Result<Tensor> {
        let hidden = self.norm1.forward_silu(x)?;
        let hidden = match (&self.time_emb_proj, time) {
            (Some(project), Some(time)) => self.conv1.forward_add_per_row(&hidden, &project.forward(time)?)?,
            _ => self.conv1.forward(&hidden)?,
        };
        self.finish(&self.norm2.forward_silu(&hidden)?, x)
    }

    /// The last convolution, plus the input.
    fn finish(&self, hidden: &Tensor, x: &Tensor) -> Result<Tensor> {
        match &self.conv_shortcut {
            None => self.conv2.forward_add(hidden, x),
            Some(shortcut) => self.conv2.forward_add(hidden, &shortcut.forward(x)?),
        }
    }

    /// The first half for lines of a map that its norm has `seen`: what the second norm sees. There is no time.
    pub fn first_half(&self, x: &Tensor, seen: &Seen) -> Result<Tensor> {
        self.conv1.forward(&self.norm1.forward_silu_seen(x, seen)?)
    }

    /// The second half for the same lines of the block's input and of what the first half made, which the
    /// second norm has `seen`.
    pub fn second_half(&self, hidden: &Tensor, x: &Tensor, seen: &Seen) -> Result<Tensor> {
        self.finish(&self.norm2.forward_silu_seen(hidden, seen)?, x)
    }
}
