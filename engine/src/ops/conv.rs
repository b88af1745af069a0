//! The two-dimensional convolution.

use std::ops::Range;

use candle_core::{Device, Tensor};

use super::layer::{Addends, Input, LayerShape, layer, pack};
use super::layout::{channels_first, channels_last};
use super::{host, layout, misuse};
use crate::Result;

/// How a convolution's window walks over the map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ConvShape {
    /// Pixels between two windows.
    pub stride: usize,
    /// Zeros around the map, before (top, left) and after (bottom, right).
    pub padding: (usize, usize),
}

impl ConvShape {
    /// Stride 1 and the padding that keeps the size for an odd `kernel`.
    pub fn same(kernel: usize) -> Self {
        Self { stride: 1, padding: ((kernel - 1) / 2, (kernel - 1) / 2) }
    }
}

/// A convolution over feature maps (rows, height, width, channels).
pub(crate) struct Conv2d {
    /// On the host (kernel height · kernel width · in, out), packed once at load; on other devices
    /// (out, in, kernel height, kernel width) as in the checkpoint.
    weight: Tensor,
    bias: Option<Tensor>,
    shape: ConvShape,
    kernel: (usize, usize),
    channels: (usize, usize),
}

/// What a convolution adds to its result.
#[derive(Clone, Copy)]
enum Added<'a> {
    Nothing,
    PerRow(&'a Tensor),
    Residual(&'a Tensor),
}

impl Conv2d {
    /// A convolution from a checkpoint's (out, in, kernel height, kernel width) weight and (out) bias
    /// in host memory, placed on `device`.
    pub fn new(weight: &Tensor, bias: Option<&Tensor>, shape: ConvShape, device: &Device) -> Result<Self> {
        let (outputs, inputs, kernel_height, kernel_width) = weight.dims4()?;
        let weight = if device.is_cpu() {
            let taps = kernel_height * kernel_width;
            let packed = pack(&host::values(&host::as_f32(weight)?)?, outputs, inputs, taps)?;
            host::tensor(packed, (taps * inputs, outputs), weight.dtype())?
        } else {
            weight.to_device(device)?
        };
        let bias = bias.map(|bias| bias.to_device(device)).transpose()?;
        Ok(Self { weight, bias, shape, kernel: (kernel_height, kernel_width), channels: (inputs, outputs) })
    }

    /// (rows, height, width, in) → (rows, height', width', out).
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.run(x, Added::Nothing)
    }

    /// As [`Conv2d::forward`], plus `per_row` (rows, out) at every pixel.
    pub fn forward_add_per_row(&self, x: &Tensor, per_row: &Tensor) -> Result<Tensor> {
        self.run(x, Added::PerRow(per_row))
    }

    /// As [`Conv2d::forward`], plus `residual` of the result's shape.
    pub fn forward_add(&self, x: &Tensor, residual: &Tensor) -> Result<Tensor> {
        self.run(x, Added::Residual(residual))
    }

    fn run(&self, x: &Tensor, added: Added<'_>) -> Result<Tensor> {
        let (rows, height, width, inputs) = x.dims4()?;
        let (_, outputs) = self.channels;
        let around = self.shape.padding.0 + self.shape.padding.1;
        if inputs != self.channels.0 || height + around < self.kernel.0 || width + around < self.kernel.1 {
            return Err(misuse(format!(
                "a convolution of {:?} windows over {} channels was given {:?}",
                self.kernel,
                self.channels.0,
                x.dims()
            )));
        }
        if !x.device().is_cpu() {
            return self.run_on_device(x, added);
        }
        let out_height = (height + around - self.kernel.0) / self.shape.stride + 1;
        let out_width = (width + around - self.kernel.1) / self.shape.stride + 1;
        let positions = out_height * out_width;

        let (x32, weight) = (host::as_f32(x)?, host::as_f32(&self.weight)?);
        let bias = self.bias.as_ref().map(host::as_f32).transpose()?;
        let (per_row, residual) = match added {
            Added::Nothing => (None, None),
            Added::PerRow(values) => (Some(host::as_f32(values)?), None),
            Added::Residual(values) => (None, Some(host::as_f32(values)?)),
        };
        let bias = bias.as_ref().map(host::values).transpose()?;
        let per_row = per_row.as_ref().map(host::values).transpose()?;
        let residual = residual.as_ref().map(host::values).transpose()?;
        let addends = Addends { bias: bias.as_deref(), per_row: per_row.as_deref(), full: residual.as_deref() };
        let (x32, weight) = (host::values(&x32)?, host::values(&weight)?);
        let inner = self.kernel.0 * self.kernel.1 * inputs;
        let mut output = host::zeros(rows * positions * outputs)?;
        let map = Map { values: &x32, height, width, channels: inputs };
        let gather = |row: usize, range: Range<usize>, room: &mut [f32]| self.gather(map, row, range, out_width, room);
        let input = if self.is_pointwise() { Input::Dense(&x32) } else { Input::Gather(&gather) };
        layer(&mut output, LayerShape { rows, positions, inner, outputs }, input, &weight, addends);
        host::tensor(output, (rows, out_height, out_width, outputs), x.dtype())
    }

    fn is_pointwise(&self) -> bool {
        self.kernel == (1, 1) && self.shape == ConvShape { stride: 1, padding: (0, 0) }
    }

    /// Copies the windows of a range of output pixels into (pixels, kernel height, kernel width, in).
    fn gather(&self, map: Map<'_>, row: usize, range: Range<usize>, out_width: usize, room: &mut [f32]) {
        let channels = map.channels;
        let (kernel_height, kernel_width) = self.kernel;
        let before = self.shape.padding.0;
        for (position, window) in range.zip(room.chunks_exact_mut(kernel_height * kernel_width * channels)) {
            let top = position / out_width * self.shape.stride;
            let left = position % out_width * self.shape.stride;
            for (ky, line) in window.chunks_exact_mut(kernel_width * channels).enumerate() {
                let Some(y) = (top + ky).checked_sub(before).filter(|y| *y < map.height) else {
                    line.fill(0.0);
                    continue;
                };
                // The window's columns that lie on the map.
                let first = before.saturating_sub(left).min(kernel_width);
                let last = (map.width + before).saturating_sub(left).clamp(first, kernel_width);
                if first == last {
                    line.fill(0.0);
                    continue;
                }
                let start = ((row * map.height + y) * map.width + left + first - before) * channels;
                line[..first * channels].fill(0.0);
                line[last * channels..].fill(0.0);
                line[first * channels..last * channels]
                    .copy_from_slice(&map.values[start..start + (last - first) * channels]);
            }
        }
    }

    fn run_on_device(&self, x: &Tensor, added: Added<'_>) -> Result<Tensor> {
        let (before, after) = self.shape.padding;
        let x = channels_first(x)?;
        let x = if before == after { x } else { layout::pad(&x, before, after)? };
        let padding = if before == after { before } else { 0 };
        let y = channels_last(&x.conv2d(&self.weight, padding, self.shape.stride, 1, 1)?)?;
        let y = match &self.bias {
            Some(bias) => y.broadcast_add(bias)?,
            None => y,
        };
        match added {
            Added::Nothing => Ok(y),
            Added::PerRow(values) => Ok(y.broadcast_add(&values.unsqueeze(1)?.unsqueeze(1)?)?),
            Added::Residual(values) => Ok((y + values)?),
        }
    }
}

/// A feature map's values on the host.
#[derive(Clone, Copy)]
struct Map<'a> {
    values: &'a [f32],
    height: usize,
    width: usize,
    channels: usize,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::reference;

    /// The definition, pixel by pixel, with each sum in `f64`.
    fn plain(x: &Tensor, weight: &Tensor, bias: &Tensor, shape: ConvShape) -> (Vec<usize>, Vec<f32>) {
        let (rows, height, width, inputs) = x.dims4().unwrap();
        let (outputs, _, kernel_height, kernel_width) = weight.dims4().unwrap();
        let (x, weight, bias) = (reference::values(x), reference::values(weight), reference::values(bias));
        let (before, after) = shape.padding;
        let out_height = (height + before + after - kernel_height) / shape.stride + 1;
        let out_width = (width + before + after - kernel_width) / shape.stride + 1;
        let mut result = Vec::new();
        for (row, oy, ox, o) in (0..rows).flat_map(|r| {
            (0..out_height).flat_map(move |y| (0..out_width).flat_map(move |x| (0..outputs).map(move |o| (r, y, x, o))))
        }) {
            let mut sum = f64::from(bias[o]);
            for (ky, kx) in (0..kernel_height).flat_map(|y| (0..kernel_width).map(move |x| (y, x))) {
                let (y, x_at) = (oy * shape.stride + ky, ox * shape.stride + kx);
                if y < before || x_at < before || y - before >= height || x_at - before >= width {
                    continue;
                }
                for i in 0..inputs {
                    let value = x[((row * height + y - before) * width + x_at - before) * inputs + i];
                    sum += f64::from(value)
                        * f64::from(weight[((o * inputs + i) * kernel_height + ky) * kernel_width + kx]);
                }
            }
            result.push(sum as f32);
        }
        (vec![rows, out_height, out_width, outputs], result)
    }

    #[test]
    fn a_convolution_over_odd_shapes_equals_the_definition() {
        let same = ConvShape::same(3);
        let halving = ConvShape { stride: 2, padding: (1, 1) };
        let cases = [
            ([1, 1, 1, 1], [1, 1, 3, 3], same),
            ([2, 5, 3, 4], [7, 4, 3, 3], same),
            ([1, 2, 9, 3], [5, 3, 5, 5], ConvShape::same(5)),
            ([1, 7, 5, 6], [4, 6, 3, 3], halving),
            ([2, 6, 8, 2], [3, 2, 3, 3], ConvShape { stride: 2, padding: (0, 1) }),
            ([1, 4, 4, 5], [6, 5, 1, 1], ConvShape::same(1)),
            ([1, 5, 4, 5], [6, 5, 1, 1], ConvShape { stride: 2, padding: (0, 0) }),
            ([1, 17, 19, 33], [70, 33, 3, 3], same),
        ];
        for (x, weight, shape) in cases {
            let (x, weight, bias) =
                (reference::tensor(x, 1), reference::tensor(weight, 2), reference::tensor([weight[0]], 3));
            let conv = Conv2d::new(&weight, Some(&bias), shape, &Device::Cpu).unwrap();
            let got = conv.forward(&x).unwrap();
            let (dims, expected) = plain(&x, &weight, &bias, shape);
            assert_eq!(got.dims(), dims);
            reference::assert_close(&reference::values(&got), &expected, 1e-5);
        }
    }

    #[test]
    fn what_is_added_arrives_at_every_pixel() {
        let (x, weight) = (reference::tensor([2, 4, 3, 5], 1), reference::tensor([6, 5, 3, 3], 2));
        let conv = Conv2d::new(&weight, None, ConvShape::same(3), &Device::Cpu).unwrap();
        let base = conv.forward(&x).unwrap();
        let (per_row, residual) = (reference::tensor([2, 6], 3), reference::tensor([2, 4, 3, 6], 4));
        let expected = base.broadcast_add(&per_row.reshape((2, 1, 1, 6)).unwrap()).unwrap();
        let got = conv.forward_add_per_row(&x, &per_row).unwrap();
        reference::assert_close(&reference::values(&got), &reference::values(&expected), 1e-6);
        let expected = (&base + &residual).unwrap();
        let got = conv.forward_add(&x, &residual).unwrap();
        reference::assert_close(&reference::values(&got), &reference::values(&expected), 1e-6);
    }

    #[test]
    fn a_row_of_a_batch_equals_the_row_alone() {
        for (side, channels) in [(3, 5), (4, 96), (16, 64)] {
            let weight = reference::tensor([96, channels, 3, 3], 1);
            let conv = Conv2d::new(&weight, None, ConvShape::same(3), &Device::Cpu).unwrap();
            let x = reference::tensor([4, side, side + 1, channels], 2);
            let batch = conv.forward(&x).unwrap();
            for row in 0..4 {
                reference::assert_row_is(&batch, row, &conv.forward(&x.narrow(0, row, 1).unwrap()).unwrap());
            }
        }
    }

    #[test]
    fn the_path_for_other_devices_agrees() {
        for shape in [ConvShape::same(3), ConvShape { stride: 2, padding: (0, 1) }] {
            let (weight, bias) = (reference::tensor([6, 5, 3, 3], 1), reference::tensor([6], 2));
            let here = Conv2d::new(&weight, Some(&bias), shape, &Device::Cpu).unwrap();
            let there = Conv2d::new(&weight, Some(&bias), shape, &Device::Cpu).unwrap();
            let there = Conv2d { weight, ..there };
            let (x, per_row) = (reference::tensor([2, 6, 8, 5], 3), reference::tensor([2, 6], 4));
            let expected = reference::values(&here.forward_add_per_row(&x, &per_row).unwrap());
            let got = there.run_on_device(&x, Added::PerRow(&per_row)).unwrap();
            reference::assert_close(&reference::values(&got), &expected, 1e-5);
        }
    }

    #[test]
    fn a_map_smaller_than_the_window_is_an_error_and_not_a_panic() {
        let shape = ConvShape { stride: 1, padding: (0, 0) };
        let conv = Conv2d::new(&reference::tensor([1, 1, 3, 3], 1), None, shape, &Device::Cpu).unwrap();
        assert!(conv.forward(&reference::tensor([1, 2, 5, 1], 2)).is_err());
    }
}
