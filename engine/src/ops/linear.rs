//! The linear layer.

use candle_core::{Device, Tensor};

use super::layer::{Addends, Input, LayerShape, layer, pack};
use super::{host, misuse};
use crate::Result;

/// `y = x · W (+ bias)`.
pub(crate) struct Linear {
    /// (in, out): the checkpoint's (out, in) transposed once, at load.
    weight: Tensor,
    bias: Option<Tensor>,
}

impl Linear {
    /// A layer from a checkpoint's (out, in) weight and (out) bias in host memory, placed on `device`.
    pub fn new(weight: &Tensor, bias: Option<&Tensor>, device: &Device) -> Result<Self> {
        let (outputs, inputs) = weight.dims2()?;
        let packed = pack(&host::values(&host::as_f32(weight)?)?, outputs, inputs, 1)?;
        let weight = host::tensor(packed, (inputs, outputs), weight.dtype())?.to_device(device)?;
        Ok(Self { weight, bias: bias.map(|bias| bias.to_device(device)).transpose()? })
    }

    /// (rows, …, in) → (rows, …, out).
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.run(x, None)
    }

    /// (rows, …, in) → (rows, …, out), plus `residual` of that shape.
    pub fn forward_add(&self, x: &Tensor, residual: &Tensor) -> Result<Tensor> {
        self.run(x, Some(residual))
    }

    fn run(&self, x: &Tensor, residual: Option<&Tensor>) -> Result<Tensor> {
        if !x.device().is_cpu() {
            return self.run_on_device(x, residual);
        }
        let (inner, outputs) = self.weight.dims2()?;
        let mut dims = x.dims().to_vec();
        let width = dims.pop().unwrap_or(0);
        if width != inner {
            return Err(misuse(format!("a linear layer of width {inner} was given {:?}", x.dims())));
        }
        let rows = dims.first().copied().unwrap_or(1);
        let positions = dims.iter().skip(1).product();
        dims.push(outputs);

        let (x32, weight) = (host::as_f32(x)?, host::as_f32(&self.weight)?);
        let bias = self.bias.as_ref().map(host::as_f32).transpose()?;
        let residual = residual.map(host::as_f32).transpose()?;
        let bias = bias.as_ref().map(host::values).transpose()?;
        let residual = residual.as_ref().map(host::values).transpose()?;
        let shape = LayerShape { rows, positions, inner, outputs };
        let mut output = host::zeros(rows * positions * outputs)?;
        let addends = Addends { bias: bias.as_deref(), per_row: None, full: residual.as_deref() };
        let (x32, weight) = (host::values(&x32)?, host::values(&weight)?);
        layer(&mut output, shape, Input::Dense(&x32), &weight, addends);
        host::tensor(output, dims, x.dtype())
    }

    fn run_on_device(&self, x: &Tensor, residual: Option<&Tensor>) -> Result<Tensor> {
        let mut y = x.broadcast_matmul(&self.weight)?;
        if let Some(bias) = &self.bias {
            y = y.broadcast_add(bias)?;
        }
        if let Some(residual) = residual {
            y = (y + residual)?;
        }
        Ok(y)
    }
}

#[cfg(test)]
mod tests {
    use candle_core::DType;

    use super::*;
    use crate::ops::reference;

    #[test]
    fn a_linear_layer_over_odd_shapes_equals_the_plain_one() {
        for (rows, tokens, inner, outputs) in
            [(1, 1, 1, 1), (2, 7, 5, 3), (1, 77, 96, 33), (3, 1, 64, 256), (1, 300, 40, 130)]
        {
            let (x, weight) = (reference::tensor([rows, tokens, inner], 1), reference::tensor([outputs, inner], 2));
            let (bias, residual) = (reference::tensor([outputs], 3), reference::tensor([rows, tokens, outputs], 4));
            let layer = Linear::new(&weight, Some(&bias), &Device::Cpu).unwrap();
            let got = layer.forward_add(&x, &residual).unwrap();
            assert_eq!(got.dims(), [rows, tokens, outputs]);

            let transposed = reference::values(&weight.t().unwrap().contiguous().unwrap());
            let mut plain = reference::product(&reference::values(&x), &transposed, rows * tokens, inner, outputs);
            let (bias, residual) = (reference::values(&bias), reference::values(&residual));
            for (index, value) in plain.iter_mut().enumerate() {
                *value += bias[index % outputs] + residual[index];
            }
            reference::assert_close(&reference::values(&got), &plain, 1e-5);
        }
    }

    #[test]
    fn a_row_of_a_batch_equals_the_row_alone() {
        for tokens in [1, 9, 77, 256] {
            let layer =
                Linear::new(&reference::tensor([192, 100], 1), Some(&reference::tensor([192], 2)), &Device::Cpu)
                    .unwrap();
            let x = reference::tensor([5, tokens, 100], 3);
            let batch = layer.forward(&x).unwrap();
            for row in 0..5 {
                let alone = layer.forward(&x.narrow(0, row, 1).unwrap()).unwrap();
                reference::assert_row_is(&batch, row, &alone);
            }
        }
    }

    #[test]
    fn the_path_for_other_devices_agrees() {
        let (weight, bias) = (reference::tensor([8, 5], 1), reference::tensor([8], 2));
        let layer = Linear::new(&weight, Some(&bias), &Device::Cpu).unwrap();
        let (x, residual) = (reference::tensor([2, 7, 5], 3), reference::tensor([2, 7, 8], 4));
        let (here, there) = (layer.forward_add(&x, &residual), layer.run_on_device(&x, Some(&residual)));
        reference::assert_close(&reference::values(&there.unwrap()), &reference::values(&here.unwrap()), 1e-6);
    }

    #[test]
    fn half_precision_stays_half_and_close() {
        let (x, weight) = (reference::tensor([2, 5, 16], 1), reference::tensor([8, 16], 2));
        let exact = Linear::new(&weight, None, &Device::Cpu).unwrap().forward(&x).unwrap();
        for (dtype, tolerance) in [(DType::F16, 2e-3), (DType::BF16, 2e-2)] {
            let layer = Linear::new(&weight.to_dtype(dtype).unwrap(), None, &Device::Cpu).unwrap();
            let half = layer.forward(&x.to_dtype(dtype).unwrap()).unwrap();
            assert_eq!(half.dtype(), dtype);
            reference::assert_close(&reference::values(&half), &reference::values(&exact), tolerance);
        }
    }

    #[test]
    fn a_wrong_width_is_an_error_and_not_a_panic() {
        let layer = Linear::new(&reference::tensor([4, 3], 1), None, &Device::Cpu).unwrap();
        let error = layer.forward(&reference::tensor([1, 2, 5], 2)).unwrap_err().to_string();
        assert!(error.contains("width 3"), "{error}");
    }
}
