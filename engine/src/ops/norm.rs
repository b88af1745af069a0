//! Group norm, with SiLU in the same pass, and layer norm.

use candle_core::{D, DType, Device, Tensor};
use pulp::Arch;
use rayon::prelude::*;

use super::activation::silu_of;
use super::{host, layout, misuse};
use crate::Result;

/// Pixels or tokens that are summed together.
const BLOCK: usize = 64;

/// Blocks that are worth a task of their own, together.
fn blocks_per_task(channels: usize) -> usize {
    (32 * 1024 / (BLOCK * channels)).max(1)
}

/// What follows a group norm.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Then {
    Nothing,
    Silu,
}

/// Normalises groups of channels over a feature map's pixels.
pub(crate) struct GroupNorm {
    weight: Tensor,
    bias: Tensor,
    groups: usize,
    epsilon: f64,
}

impl GroupNorm {
    /// A norm of `groups` groups from (channels) weight and bias, placed on `device`.
    pub fn new(weight: &Tensor, bias: &Tensor, groups: usize, epsilon: f64, device: &Device) -> Result<Self> {
        let channels = weight.dims1()?;
        if groups == 0 || channels % groups != 0 {
            return Err(misuse(format!("{channels} channels cannot be cut into {groups} groups")));
        }
        Ok(Self { weight: weight.to_device(device)?, bias: bias.to_device(device)?, groups, epsilon })
    }

    /// (rows, height, width, channels), normalised.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.run(x, Then::Nothing)
    }

    /// (rows, height, width, channels), normalised, then SiLU.
    pub fn forward_silu(&self, x: &Tensor) -> Result<Tensor> {
        self.run(x, Then::Silu)
    }

    fn run(&self, x: &Tensor, then: Then) -> Result<Tensor> {
        let (_, height, width, channels) = x.dims4()?;
        if channels != self.weight.dims1()? {
            return Err(misuse(format!("a group norm of {} channels was given {:?}", self.weight.dims1()?, x.dims())));
        }
        if !x.device().is_cpu() {
            return self.run_on_device(x, then);
        }
        let (x32, weight, bias) = (host::as_f32(x)?, host::as_f32(&self.weight)?, host::as_f32(&self.bias)?);
        let (x32, weight, bias) = (host::values(&x32)?, host::values(&weight)?, host::values(&bias)?);
        let row_len = height * width * channels;
        let mut output = host::zeros(x32.len())?;
        if row_len == 0 {
            return host::tensor(output, x.dims(), x.dtype());
        }

        // mean and 1/σ of each group of each row, spread over the channels as y = x · scale + shift
        let count = (height * width * channels / self.groups) as f64;
        let sums = channel_sums(&x32, row_len, channels, |value, _| value, &vec![0.0; x32.len() / row_len * channels]);
        let means = self.per_group(&sums, channels, |sum| sum / count);
        let squares = channel_sums(&x32, row_len, channels, |value, mean| (value - mean) * (value - mean), &means);
        let scales = self.per_group(&squares, channels, |sum| 1.0 / (sum / count + self.epsilon).sqrt());

        let block = BLOCK * channels;
        let blocks = row_len.div_ceil(block);
        let tasks: Vec<(usize, &mut [f32])> = output
            .chunks_mut(row_len)
            .enumerate()
            .flat_map(|(row, chunk)| chunk.chunks_mut(block).map(move |part| (row, part)))
            .collect();
        tasks.into_par_iter().with_min_len(blocks_per_task(channels)).enumerate().for_each(|(index, (row, output))| {
            let start = row * row_len + index % blocks * block;
            let input = &x32[start..start + output.len()];
            let (means, scales) = (&means[row * channels..][..channels], &scales[row * channels..][..channels]);
            Arch::new().dispatch(|| {
                for (output, input) in output.chunks_exact_mut(channels).zip(input.chunks_exact(channels)) {
                    let affine = weight.iter().zip(&*bias).zip(means.iter().zip(scales));
                    for ((output, input), ((weight, bias), (mean, scale))) in output.iter_mut().zip(input).zip(affine) {
                        let value = (input - mean) * scale * weight + bias;
                        *output = if then == Then::Silu { silu_of(value) } else { value };
                    }
                }
            });
        });
        host::tensor(output, x.dims(), x.dtype())
    }

    /// Folds per-channel sums (rows, channels) into their groups and spreads `finish` of each group's
    /// sum over its channels again.
    fn per_group(&self, sums: &[f64], channels: usize, finish: impl Fn(f64) -> f64) -> Vec<f32> {
        let size = channels / self.groups;
        let spread = |group: &[f64]| std::iter::repeat_n(finish(group.iter().sum()) as f32, size);
        sums.chunks_exact(size).flat_map(spread).collect()
    }

    fn run_on_device(&self, x: &Tensor, then: Then) -> Result<Tensor> {
        let dtype = x.dtype();
        let first = layout::channels_first(x)?;
        let (rows, channels, height, width) = first.dims4()?;
        let grouped =
            first.reshape((rows, self.groups, channels / self.groups * height * width))?.to_dtype(DType::F32)?;
        let centred = grouped.broadcast_sub(&grouped.mean_keepdim(D::Minus1)?)?;
        let variance = centred.sqr()?.mean_keepdim(D::Minus1)?;
        let normal = centred.broadcast_div(&(variance + self.epsilon)?.sqrt()?)?.to_dtype(dtype)?;
        let last = layout::channels_last(&normal.reshape((rows, channels, height, width))?)?;
        let y = last.broadcast_mul(&self.weight)?.broadcast_add(&self.bias)?;
        Ok(if then == Then::Silu { y.silu()? } else { y })
    }
}

/// Sums `term(value, offset of its row and channel)` over each row's pixels: (rows, channels). Each
/// block of pixels is summed in `f32`, the blocks in `f64` and in order.
fn channel_sums(
    x: &[f32],
    row_len: usize,
    channels: usize,
    term: impl Fn(f32, f32) -> f32 + Sync,
    offsets: &[f32],
) -> Vec<f64> {
    let block = BLOCK * channels;
    let blocks = row_len.div_ceil(block);
    let rows = x.len() / row_len;
    let mut partial = vec![0f32; rows * blocks * channels];
    partial.par_chunks_mut(channels).with_min_len(blocks_per_task(channels)).enumerate().for_each(|(index, sums)| {
        let (row, first) = (index / blocks, index % blocks * block);
        let input = &x[row * row_len + first..row * row_len + row_len.min(first + block)];
        let offsets = &offsets[row * channels..][..channels];
        Arch::new().dispatch(|| {
            for pixel in input.chunks_exact(channels) {
                for ((sum, value), offset) in sums.iter_mut().zip(pixel).zip(offsets) {
                    *sum += term(*value, *offset);
                }
            }
        });
    });
    let mut totals = vec![0f64; rows * channels];
    for (row, blocks) in totals.chunks_exact_mut(channels).zip(partial.chunks_exact(blocks * channels)) {
        for block in blocks.chunks_exact(channels) {
            for (total, sum) in row.iter_mut().zip(block) {
                *total += f64::from(*sum);
            }
        }
    }
    totals
}

/// Normalises each token over its channels.
pub(crate) struct LayerNorm {
    weight: Tensor,
    bias: Tensor,
    epsilon: f64,
}

impl LayerNorm {
    /// A norm from (channels) weight and bias, placed on `device`.
    pub fn new(weight: &Tensor, bias: &Tensor, epsilon: f64, device: &Device) -> Result<Self> {
        Ok(Self { weight: weight.to_device(device)?, bias: bias.to_device(device)?, epsilon })
    }

    /// (rows, …, channels), normalised.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        if !x.device().is_cpu() {
            return Ok(candle_nn::ops::layer_norm(&x.contiguous()?, &self.weight, &self.bias, self.epsilon as f32)?);
        }
        let channels = self.weight.dims1()?;
        if x.dim(D::Minus1)? != channels {
            return Err(misuse(format!("a layer norm of {channels} channels was given {:?}", x.dims())));
        }
        let (x32, weight, bias) = (host::as_f32(x)?, host::as_f32(&self.weight)?, host::as_f32(&self.bias)?);
        let (x32, weight, bias) = (host::values(&x32)?, host::values(&weight)?, host::values(&bias)?);
        let mut output = host::zeros(x32.len())?;
        let (count, epsilon) = (channels as f32, self.epsilon as f32);
        let blocks = output.par_chunks_mut(BLOCK * channels).zip(x32.par_chunks(BLOCK * channels));
        blocks.with_min_len(blocks_per_task(channels)).for_each(|(output, input)| {
            Arch::new().dispatch(|| {
                for (output, input) in output.chunks_exact_mut(channels).zip(input.chunks_exact(channels)) {
                    let mean = lane_sum(input, |value| value) / count;
                    let variance = lane_sum(input, |value| (value - mean) * (value - mean)) / count;
                    let scale = 1.0 / (variance + epsilon).sqrt();
                    let affine = weight.iter().zip(&*bias);
                    for ((output, value), (weight, bias)) in output.iter_mut().zip(input).zip(affine) {
                        *output = (value - mean) * scale * weight + bias;
                    }
                }
            });
        });
        host::tensor(output, x.dims(), x.dtype())
    }
}

/// The sum of `term` over `values` in sixteen interleaved lanes: an order that vectorises and depends
/// on the length alone.
#[inline(always)]
pub(super) fn lane_sum(values: &[f32], term: impl Fn(f32) -> f32) -> f32 {
    const LANES: usize = 16;
    let mut lanes = [0f32; LANES];
    let chunks = values.chunks_exact(LANES);
    let rest = chunks.remainder();
    for chunk in chunks {
        for (lane, value) in lanes.iter_mut().zip(chunk) {
            *lane += term(*value);
        }
    }
    for (lane, value) in lanes.iter_mut().zip(rest) {
        *lane += term(*value);
    }
    lanes.iter().sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::reference;

    fn group_norm(channels: usize, groups: usize) -> GroupNorm {
        let (weight, bias) = (reference::tensor([channels], 8), reference::tensor([channels], 9));
        GroupNorm::new(&weight, &bias, groups, 1e-5, &Device::Cpu).unwrap()
    }

    #[test]
    fn a_group_norm_over_odd_shapes_equals_the_definition() {
        for (rows, height, width, channels, groups) in
            [(1, 1, 1, 2, 1), (2, 3, 5, 6, 3), (1, 17, 9, 8, 8), (3, 4, 4, 12, 1), (1, 20, 21, 32, 16)]
        {
            let x = ((reference::tensor([rows, height, width, channels], 1) * 3.0).unwrap() + 20.0).unwrap();
            let norm = group_norm(channels, groups);
            let (values, weight, bias) =
                (reference::values(&x), reference::values(&norm.weight), reference::values(&norm.bias));
            let size = channels / groups;
            let mut expected = vec![0f32; values.len()];
            for (row, group) in (0..rows).flat_map(|row| (0..groups).map(move |group| (row, group))) {
                let members: Vec<usize> = (0..height * width)
                    .flat_map(|pixel| {
                        (0..size).map(move |c| (row * height * width + pixel) * channels + group * size + c)
                    })
                    .collect();
                let count = members.len() as f64;
                let mean = members.iter().map(|at| f64::from(values[*at])).sum::<f64>() / count;
                let variance = members.iter().map(|at| (f64::from(values[*at]) - mean).powi(2)).sum::<f64>() / count;
                for at in members {
                    let normal = (f64::from(values[at]) - mean) / (variance + 1e-5).sqrt();
                    expected[at] = normal as f32 * weight[at % channels] + bias[at % channels];
                }
            }
            reference::assert_close(&reference::values(&norm.forward(&x).unwrap()), &expected, 2e-5);
            let silu: Vec<f32> = expected.iter().map(|value| value / (1.0 + (-value).exp())).collect();
            reference::assert_close(&reference::values(&norm.forward_silu(&x).unwrap()), &silu, 2e-5);
        }
    }

    #[test]
    fn a_layer_norm_over_odd_widths_equals_the_definition() {
        for channels in [1, 2, 15, 16, 17, 96, 321] {
            let x = ((reference::tensor([2, 67, channels], 1) * 2.0).unwrap() - 5.0).unwrap();
            let (weight, bias) = (reference::tensor([channels], 2), reference::tensor([channels], 3));
            let norm = LayerNorm::new(&weight, &bias, 1e-5, &Device::Cpu).unwrap();
            let (weight, bias) = (reference::values(&weight), reference::values(&bias));
            let mut expected = Vec::new();
            for token in reference::values(&x).chunks(channels) {
                let mean = token.iter().map(|v| f64::from(*v)).sum::<f64>() / channels as f64;
                let variance = token.iter().map(|v| (f64::from(*v) - mean).powi(2)).sum::<f64>() / channels as f64;
                for (index, value) in token.iter().enumerate() {
                    let normal = (f64::from(*value) - mean) / (variance + 1e-5).sqrt();
                    expected.push(normal as f32 * weight[index] + bias[index]);
                }
            }
            reference::assert_close(&reference::values(&norm.forward(&x).unwrap()), &expected, 2e-5);
        }
    }

    #[test]
    fn a_row_of_a_batch_equals_the_row_alone() {
        let (group_norm, x) = (group_norm(32, 4), reference::tensor([3, 13, 11, 32], 1));
        let (weight, bias) = (reference::tensor([32], 8), reference::tensor([32], 9));
        let layer_norm = LayerNorm::new(&weight, &bias, 1e-5, &Device::Cpu).unwrap();
        let (silu, layer) = (group_norm.forward_silu(&x).unwrap(), layer_norm.forward(&x).unwrap());
        for row in 0..3 {
            let alone = x.narrow(0, row, 1).unwrap();
            reference::assert_row_is(&silu, row, &group_norm.forward_silu(&alone).unwrap());
            reference::assert_row_is(&layer, row, &layer_norm.forward(&alone).unwrap());
        }
    }

    #[test]
    fn the_path_for_other_devices_agrees() {
        let (norm, x) = (group_norm(12, 3), reference::tensor([2, 5, 4, 12], 1));
        for then in [Then::Nothing, Then::Silu] {
            let (here, there) = (norm.run(&x, then).unwrap(), norm.run_on_device(&x, then).unwrap());
            reference::assert_close(&reference::values(&there), &reference::values(&here), 1e-5);
        }
    }

    #[test]
    fn channels_that_do_not_divide_into_groups_are_refused() {
        let ones = Tensor::ones(6, DType::F32, &Device::Cpu).unwrap();
        let error = GroupNorm::new(&ones, &ones, 4, 1e-5, &Device::Cpu).err().unwrap().to_string();
        assert!(error.contains("6 channels cannot be cut into 4 groups"), "{error}");
    }
}
