//! The plain forms that the fast ones are tested against, and numbers to feed them.

use candle_core::{Device, Tensor};

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

/// [`numbers`] as a host tensor.
pub(super) fn tensor<const N: usize>(shape: [usize; N], salt: u32) -> Tensor {
    Tensor::from_vec(numbers(shape.iter().product(), salt), shape.to_vec(), &Device::Cpu).unwrap()
}

/// A tensor's values in order.
pub(super) fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.to_dtype(candle_core::DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
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
    let row = values(&batch.narrow(0, index, 1).unwrap());
    let alone = values(alone);
    assert_eq!(row.len(), alone.len());
    assert!(row.iter().zip(&alone).all(|(a, b)| a.to_bits() == b.to_bits()), "row {index} differs from the row alone");
}
