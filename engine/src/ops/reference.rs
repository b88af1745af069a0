//! The plain forms that the fast ones are tested against, and numbers to feed them.

use candle_core::{DType, Device};
use half::{bf16, f16};

use super::buffer::Format;
use super::conv::ConvShape;
use super::kernel::blocks::Quantisation;
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

/// The processor in each of its formats.
pub(super) fn places() -> [Place; 2] {
    [Place::host(), bf16_place()]
}

/// How far a result at `place` may be from the definition, as a share of the largest magnitude.
pub(super) fn tolerance(place: &Place) -> f32 {
    if place.on_host() == Some(Format::Bf16) { 1e-2 } else { 2e-5 }
}

/// A weight's values as the kernels at `place` see them.
pub(super) fn weight_values(weight: &Parameter<'_>, place: &Place) -> Vec<f32> {
    let rounded = place.on_host() == Some(Format::Bf16);
    let seen = |value: f32| if rounded { bf16::from_f32(value).to_f32() } else { value };
    weight.values().unwrap().into_iter().map(seen).collect()
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

/// `count` values of lively blocks: any quants, and scales of about the size that weights have.
pub(super) fn quantised(format: Quantisation, count: usize, salt: u32) -> Vec<u8> {
    let blocks = count / format.values();
    let noise = numbers(blocks * format.bytes(), salt);
    let mut bytes: Vec<u8> = noise.iter().map(|value| (value * 1000.0) as i32 as u8).collect();
    // Where a block has numbers in half precision.
    let halves: &[usize] = match format {
        Quantisation::Q4_0 | Quantisation::Q5_0 | Quantisation::Q8_0 => &[0],
        Quantisation::Q4_1 | Quantisation::Q5_1 | Quantisation::Q4K | Quantisation::Q5K => &[0, 2],
        Quantisation::Q6K => &[208],
    };
    for (block, bytes) in bytes.chunks_exact_mut(format.bytes()).enumerate() {
        for at in halves {
            let value = f16::from_f32(noise[block * format.bytes() + at] * 0.01);
            bytes[*at..at + 2].copy_from_slice(&value.to_le_bytes());
        }
    }
    bytes
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

/// Fails unless both have the same shape and the same bits.
#[track_caller]
pub(super) fn assert_same(got: &Tensor, expected: &Tensor) {
    assert_eq!(got.dims(), expected.dims());
    let bits = |tensor| values(tensor).into_iter().map(f32::to_bits);
    assert!(bits(got).eq(bits(expected)), "the bits differ");
}

/// Fails unless each row of `x` gives the same bits alone and in company.
#[track_caller]
pub(super) fn assert_rows_stand_alone(x: &Tensor, place: &Place, run: impl Fn(&Tensor) -> Tensor) {
    let batch = run(x);
    for index in 0..x.dims()[0] {
        assert_row_is(&batch, index, &run(&row(x, index, place)));
    }
}

/// Fails unless `run` gives the same bits on one, two and three threads.
#[track_caller]
pub(super) fn assert_threads_do_not_show(run: impl Fn() -> Tensor + Send + Sync) {
    let on = |threads| rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(&run);
    let one = on(1);
    assert_same(&on(2), &one);
    assert_same(&on(3), &one);
}

/// Fails unless a number of `x`'s second row that is none (NaN, infinity) shows in that row's result and
/// leaves the bits of every other row as they were.
#[track_caller]
pub(super) fn assert_damage_stays_in_its_row(x: &Tensor, place: &Place, run: impl Fn(&Tensor) -> Tensor) {
    let (clean, len) = (values(&run(x)), x.elements() / x.dims()[0]);
    for damage in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut damaged = values(x);
        damaged[len + len / 2] = damage;
        let got = values(&run(&Tensor::new(&damaged, x.dims(), place).unwrap()));
        let each = got.len() / x.dims()[0];
        for (index, (got, clean)) in got.chunks(each).zip(clean.chunks(each)).enumerate() {
            let same = got.iter().zip(clean).all(|(got, clean)| got.to_bits() == clean.to_bits());
            assert!(same == (index != 1), "row {index} after {damage} in row 1");
            assert_eq!(got.iter().all(|value| value.is_finite()), index != 1, "row {index} after {damage} in row 1");
        }
    }
}

/// Φ by Simpson's rule: slow and beyond doubt.
fn phi(x: f64) -> f64 {
    let intervals = 400;
    let width = x / f64::from(intervals);
    let density = |at: f64| (-at * at / 2.0).exp() / (2.0 * std::f64::consts::PI).sqrt();
    let sum: f64 = (0..=intervals)
        .map(|index| {
            let weight = if index == 0 || index == intervals { 1.0 } else { 2.0 + 2.0 * f64::from(index % 2) };
            weight * density(f64::from(index) * width)
        })
        .sum();
    0.5 + sum * width / 3.0
}

/// x · Φ(x).
pub(super) fn gelu(x: f64) -> f64 {
    x * phi(x)
}

/// x · σ(x).
pub(super) fn silu(x: f64) -> f64 {
    x / (1.0 + (-x).exp())
}

/// x · σ(1.702 x).
pub(super) fn quick_gelu(x: f64) -> f64 {
    x / (1.0 + (-1.702 * x).exp())
}

/// x/2 · (1 + tanh(√(2/π) · (x + 0.044715 x³))).
pub(super) fn gelu_tanh(x: f64) -> f64 {
    // Not by tanh itself, of which nothing is left far below zero.
    let u = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044_715 * x.powi(3));
    x / (1.0 + (-2.0 * u).exp())
}

/// A convolution by its definition: its dimensions and values. `weight` is (out, in, height, width).
pub(super) fn convolution(
    x: &Tensor,
    (weight, dims): (&[f32], [usize; 4]),
    bias: &[f32],
    shape: ConvShape,
) -> (Vec<usize>, Vec<f32>) {
    let (rows, height, width, inputs) = x.dims4().unwrap();
    let [outputs, _, kernel_height, kernel_width] = dims;
    let (before, after) = shape.padding;
    let down = (height + before + after - kernel_height) / shape.stride + 1;
    let across = (width + before + after - kernel_width) / shape.stride + 1;
    let x = values(x);
    let mut result = Vec::with_capacity(rows * down * across * outputs);
    for (row, y, x_at) in
        (0..rows).flat_map(|row| (0..down).flat_map(move |y| (0..across).map(move |x_at| (row, y, x_at))))
    {
        for (output, bias) in bias.iter().enumerate() {
            let mut sum = f64::from(*bias);
            for (ky, kx) in (0..kernel_height).flat_map(|ky| (0..kernel_width).map(move |kx| (ky, kx))) {
                let (y, x_at) = (y * shape.stride + ky, x_at * shape.stride + kx);
                if y < before || x_at < before || y - before >= height || x_at - before >= width {
                    continue;
                }
                let pixel = &x[((row * height + y - before) * width + x_at - before) * inputs..][..inputs];
                for (input, value) in pixel.iter().enumerate() {
                    let place = ((output * inputs + input) * kernel_height + ky) * kernel_width + kx;
                    sum += f64::from(*value) * f64::from(weight[place]);
                }
            }
            result.push(sum as f32);
        }
    }
    (vec![rows, down, across, outputs], result)
}

/// A group norm of (rows, height, width, channels) by its definition.
pub(super) fn group_norm(x: &Tensor, weight: &[f32], bias: &[f32], groups: usize, epsilon: f64) -> Vec<f32> {
    let (rows, height, width, channels) = x.dims4().unwrap();
    let (x, size) = (values(x), channels / groups);
    let mut result = vec![0.0; x.len()];
    for (row, group) in (0..rows).flat_map(|row| (0..groups).map(move |group| (row, group))) {
        let members: Vec<usize> = (row * height * width..(row + 1) * height * width)
            .flat_map(|pixel| (0..size).map(move |channel| pixel * channels + group * size + channel))
            .collect();
        let count = members.len() as f64;
        let mean = members.iter().map(|at| f64::from(x[*at])).sum::<f64>() / count;
        let variance = members.iter().map(|at| (f64::from(x[*at]) - mean).powi(2)).sum::<f64>() / count;
        for at in members {
            let normal = (f64::from(x[at]) - mean) / (variance + epsilon).sqrt();
            result[at] = (normal * f64::from(weight[at % channels]) + f64::from(bias[at % channels])) as f32;
        }
    }
    result
}
