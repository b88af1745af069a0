//! The plain forms that the fast ones are tested against, and numbers to feed them.

use candle_core::{DType, Device};

use super::parameter::Parameter;
use super::tensor::{Place, Tensor};

/// `count` numbers around zero, the same for the same `salt`.
pub(super) fn numbers(count: usize, salt: u32) -> Vec<f32> {
    let mut state = salt.wrapping_mul(0x9e37_79b9) ^ 0x1234_5678;
    (0..count)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        })
        .collect()
}

/// The processor with pairs of `bf16`.
pub(super) fn bf16_place() -> Place {
    Place::new(&Device::Cpu, DType::BF16)
}

/// [`numbers`] as a host tensor.
pub(super) fn tensor<const N: usize>(shape: [usize; N], salt: u32) -> Tensor {
    tensor_at(shape, salt, &Place::host())
}

/// [`numbers`] as a tensor at `place`.
pub(super) fn tensor_at<const N: usize>(shape: [usize; N], salt: u32, place: &Place) -> Tensor {
    Tensor::new(&numbers(shape.iter().product(), salt), &shape, place).unwrap()
}

/// [`numbers`] as a weight.
pub(super) fn parameter<const N: usize>(shape: [usize; N], salt: u32) -> Parameter<'static> {
    Parameter::from_values(&numbers(shape.iter().product(), salt), &shape)
}

/// A tensor's values in order.
pub(super) fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.to_values().unwrap()
}

/// Row `index` alone.
pub(super) fn row(tensor: &Tensor, index: usize, place: &Place) -> Tensor {
    let mut dims = tensor.dims().to_vec();
    dims[0] = 1;
    let len: usize = dims.iter().product();
    Tensor::new(&values(tensor)[index * len..(index + 1) * len], &dims, place).unwrap()
}

/// The tensor as candle's, for the path of other devices.
pub(super) fn elsewhere(tensor: &Tensor) -> Tensor {
    Tensor::on_device(candle_core::Tensor::from_vec(values(tensor), tensor.dims(), &Device::Cpu).unwrap())
}

/// left (rows × inner) · right (inner × cols) with each sum in `f64`.
pub(super) fn product(left: &[f32], right: &[f32], rows: usize, inner: usize, cols: usize) -> Vec<f32> {
    let mut target = Vec::with_capacity(rows * cols);
    for i in 0..rows {
        for j in 0..cols {
            let sum: f64 = (0..inner).map(|k| f64::from(left[i * inner + k]) * f64::from(right[k * cols + j])).sum();
            target.push(sum as f32);
        }
    }
    target
}

/// Fails unless each pair differs by at most `tolerance` of the largest expected magnitude (or of 1).
#[track_caller]
pub(super) fn assert_close(got: &[f32], expected: &[f32], tolerance: f32) {
    assert_eq!(got.len(), expected.len(), "lengths differ");
    let scale = expected.iter().fold(1f32, |most, value| most.max(value.abs()));
    for (index, (got, expected)) in got.iter().zip(expected).enumerate() {
        assert!((got - expected).abs() <= tolerance * scale, "value {index} is {got}, expected {expected}");
    }
}

/// Fails unless row `index` of `batch` is bit for bit the only row of `alone`.
#[track_caller]
pub(super) fn assert_row_is(batch: &Tensor, index: usize, alone: &Tensor) {
    let (all, alone) = (values(batch), values(alone));
    let row = &all[index * alone.len()..(index + 1) * alone.len()];
    assert!(row.iter().zip(&alone).all(|(a, b)| a.to_bits() == b.to_bits()), "row {index} differs from the row alone");
}
