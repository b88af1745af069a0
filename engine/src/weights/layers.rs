//! Layers built from a scope's `weight` and `bias`.

use super::Scope;
use crate::ops::{Conv2d, ConvShape, GroupNorm, LayerNorm, Linear};
use crate::{Error, Result};

impl Scope<'_> {
    /// A linear layer with bias.
    pub fn linear(&self, inputs: usize, outputs: usize) -> Result<Linear> {
        let weight = self.tensor("weight", &[outputs, inputs])?;
        Linear::new(&weight, Some(&self.tensor("bias", &[outputs])?), self.device())
    }

    /// A linear layer without bias.
    pub fn linear_without_bias(&self, inputs: usize, outputs: usize) -> Result<Linear> {
        Linear::new(&self.tensor("weight", &[outputs, inputs])?, None, self.device())
    }

    /// A convolution with a square `kernel` and bias.
    pub fn conv2d(&self, inputs: usize, outputs: usize, kernel: usize, shape: ConvShape) -> Result<Conv2d> {
        let weight = self.tensor("weight", &[outputs, inputs, kernel, kernel])?;
        Conv2d::new(&weight, Some(&self.tensor("bias", &[outputs])?), shape, self.device())
    }

    /// A group norm.
    pub fn group_norm(&self, channels: usize, groups: usize, epsilon: f64) -> Result<GroupNorm> {
        if !channels.is_multiple_of(groups) {
            let problem =
                format!("`norm_num_groups` must divide the {channels} channels of {}, but is {groups}", self.prefix);
            return Err(Error::checkpoint(&self.weights.folder, problem));
        }
        let (weight, bias) = (self.tensor("weight", &[channels])?, self.tensor("bias", &[channels])?);
        GroupNorm::new(&weight, &bias, groups, epsilon, self.device())
    }

    /// A layer norm.
    pub fn layer_norm(&self, channels: usize, epsilon: f64) -> Result<LayerNorm> {
        let (weight, bias) = (self.tensor("weight", &[channels])?, self.tensor("bias", &[channels])?);
        LayerNorm::new(&weight, &bias, epsilon, self.device())
    }
}
