//! Layers built from a scope's `weight` and `bias`.

use super::Scope;
use crate::ops::{Activation, Conv2d, ConvShape, GroupNorm, LayerNorm, Linear, RmsNorm, UpsampleConv};
use crate::{Error, Result};

impl Scope<'_> {
    /// A linear layer with bias.
    pub fn linear(&self, inputs: usize, outputs: usize) -> Result<Linear> {
        self.linear_then(inputs, outputs, Activation::Nothing)
    }

    /// A linear layer with bias, followed by `activation`.
    pub fn linear_then(&self, inputs: usize, outputs: usize, activation: Activation) -> Result<Linear> {
        let (weight, bias) = (self.parameter("weight", &[outputs, inputs])?, self.parameter("bias", &[outputs])?);
        Linear::with_activation(&weight, Some(&bias), activation, &self.weights.place)
    }

    /// A linear layer without bias.
    pub fn linear_without_bias(&self, inputs: usize, outputs: usize) -> Result<Linear> {
        self.linear_without_bias_then(inputs, outputs, Activation::Nothing)
    }

    /// A linear layer without bias, followed by `activation`.
    pub fn linear_without_bias_then(&self, inputs: usize, outputs: usize, activation: Activation) -> Result<Linear> {
        let weight = self.parameter("weight", &[outputs, inputs])?;
        Linear::with_activation(&weight, None, activation, &self.weights.place)
    }

    /// A linear layer with bias, stored as the convolution that takes one square of `patch` × `patch` places after the
    /// other.
    pub fn patch_linear(&self, inputs: usize, outputs: usize, patch: usize) -> Result<Linear> {
        let weight = self.parameter("weight", &[outputs, inputs, patch, patch])?;
        let weight = weight.reshaped(&[outputs, inputs * patch * patch]);
        Linear::new(&weight, Some(&self.parameter("bias", &[outputs])?), &self.weights.place)
    }

    /// A convolution with a square `kernel` and bias.
    pub fn conv2d(&self, inputs: usize, outputs: usize, kernel: usize, shape: ConvShape) -> Result<Conv2d> {
        let weight = self.parameter("weight", &[outputs, inputs, kernel, kernel])?;
        Conv2d::new(&weight, Some(&self.parameter("bias", &[outputs])?), shape, &self.weights.place)
    }

    /// A 3×3 convolution with bias of an enlarged map.
    pub fn upsample_conv(&self, inputs: usize, outputs: usize) -> Result<UpsampleConv> {
        let weight = self.parameter("weight", &[outputs, inputs, 3, 3])?;
        UpsampleConv::new(&weight, &self.parameter("bias", &[outputs])?, &self.weights.place)
    }

    /// A group norm.
    pub fn group_norm(&self, channels: usize, groups: usize, epsilon: f64) -> Result<GroupNorm> {
        if !channels.is_multiple_of(groups) {
            let problem =
                format!("`norm_num_groups` must divide the {channels} channels of {}, but is {groups}", self.prefix);
            return Err(Error::checkpoint(&self.weights.folder, problem));
        }
        let (weight, bias) = (self.parameter("weight", &[channels])?, self.parameter("bias", &[channels])?);
        GroupNorm::new(&weight, &bias, groups, epsilon)
    }

    /// A layer norm.
    pub fn layer_norm(&self, channels: usize, epsilon: f64) -> Result<LayerNorm> {
        let (weight, bias) = (self.parameter("weight", &[channels])?, self.parameter("bias", &[channels])?);
        LayerNorm::new(&weight, &bias, epsilon)
    }

    /// A root mean square norm.
    pub fn rms_norm(&self, channels: usize, epsilon: f64) -> Result<RmsNorm> {
        RmsNorm::new(&self.parameter("weight", &[channels])?, epsilon)
    }
}
