//! The non-linear functions, value by value.

use candle_core::Tensor;
use pulp::Arch;
use rayon::prelude::*;

use super::host;
use crate::Result;

/// Values that one task works through: enough to be worth its start.
const CHUNK: usize = 16 * 1024;

/// x · sigmoid(x).
pub(crate) fn silu(x: &Tensor) -> Result<Tensor> {
    if !x.device().is_cpu() {
        return Ok(x.silu()?);
    }
    each(x, silu_of)
}

/// x · Φ(x) with the normal distribution's exact Φ, as torch's `gelu` by default.
pub(crate) fn gelu(x: &Tensor) -> Result<Tensor> {
    if !x.device().is_cpu() {
        return Ok(x.gelu_erf()?);
    }
    each(x, gelu_of)
}

/// x · sigmoid(1.702 x), the first CLIP's approximation of [`gelu`].
pub(crate) fn quick_gelu(x: &Tensor) -> Result<Tensor> {
    if !x.device().is_cpu() {
        return Ok((x * candle_nn::ops::sigmoid(&(x * 1.702)?)?)?);
    }
    each(x, |x| x / (1.0 + exp(-1.702 * x)))
}

/// (…, 2n) → (…, n): the first half times the [`gelu`] of the second.
pub(crate) fn geglu(x: &Tensor) -> Result<Tensor> {
    let mut dims = x.dims().to_vec();
    let last = dims.len() - 1;
    let half = dims[last] / 2;
    if !x.device().is_cpu() {
        return Ok((x.narrow(last, 0, half)? * x.narrow(last, half, half)?.gelu_erf()?)?);
    }
    dims[last] = half;
    let x32 = host::as_f32(x)?;
    let x32 = host::values(&x32)?;
    let mut output = host::zeros(x32.len() / 2)?;
    let lines = (CHUNK / half.max(1)).max(1);
    output.par_chunks_mut(lines * half).zip(x32.par_chunks(lines * 2 * half)).for_each(|(output, input)| {
        Arch::new().dispatch(|| {
            for (output, input) in output.chunks_exact_mut(half).zip(input.chunks_exact(2 * half)) {
                let (value, gate) = input.split_at(half);
                for ((output, value), gate) in output.iter_mut().zip(value).zip(gate) {
                    *output = value * gelu_of(*gate);
                }
            }
        });
    });
    host::tensor(output, dims, x.dtype())
}

fn each(x: &Tensor, function: impl Fn(f32) -> f32 + Sync) -> Result<Tensor> {
    let x32 = host::as_f32(x)?;
    let x32 = host::values(&x32)?;
    let mut output = host::zeros(x32.len())?;
    output.par_chunks_mut(CHUNK).zip(x32.par_chunks(CHUNK)).for_each(|(output, input)| {
        Arch::new().dispatch(|| {
            for (output, input) in output.iter_mut().zip(input) {
                *output = function(*input);
            }
        });
    });
    host::tensor(output, x.dims(), x.dtype())
}

/// e^x within 2 units in the last place, for x clamped to what `f32` can hold. Plain arithmetic without
/// branches or fused operations, so that it vectorises and gives the same bits on every machine.
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    // Adding this pushes the fraction out of the mantissa: the low bits then hold the nearest integer.
    const ROUNDER: f32 = 12_582_912.0;
    // ln 2 in two parts, the first with trailing zeros, so that n · ln 2 keeps its precision.
    const LN_2_HIGH: f32 = 0.693_359_4;
    const LN_2_LOW: f32 = -2.121_944_4e-4;
    let x = x.clamp(-87.0, 88.0);
    let rounded = x * std::f32::consts::LOG2_E + ROUNDER;
    let n = rounded - ROUNDER;
    let r = x - n * LN_2_HIGH - n * LN_2_LOW;
    // Taylor's series on |r| <= ln 2 / 2, where the next term is below 1e-8.
    let series = r * (1.0 / 5040.0) + 1.0 / 720.0;
    let series = series * r + 1.0 / 120.0;
    let series = series * r + 1.0 / 24.0;
    let series = series * r + 1.0 / 6.0;
    let series = series * r + 0.5;
    let series = series * r * r + r + 1.0;
    let power = f32::from_bits(rounded.to_bits().wrapping_sub(ROUNDER.to_bits()).wrapping_add(127) << 23);
    series * power
}

#[inline(always)]
pub(super) fn silu_of(x: f32) -> f32 {
    x / (1.0 + exp(-x))
}

/// x · Φ(x) = x/2 · erfc(-x/√2).
#[inline(always)]
fn gelu_of(x: f32) -> f32 {
    let tail = erfc(x.abs() * std::f32::consts::FRAC_1_SQRT_2);
    let twice_phi = if x < 0.0 { tail } else { 2.0 - tail };
    0.5 * x * twice_phi
}

/// The complementary error function for x >= 0 as t · P(t) · exp(-x²) with t = 1 / (1 + 0.35 x), where
/// P is a least-squares fit over 0 <= x <= 6 whose own absolute error is below 4e-9.
#[inline(always)]
fn erfc(x: f32) -> f32 {
    let t = 1.0 / (1.0 + 0.35 * x);
    let fit = t * -0.192_573_05 + 0.744_897_5;
    let fit = fit * t - 0.622_766_1;
    let fit = fit * t + 0.619_837_1;
    let fit = fit * t + 0.032_038_96;
    let fit = fit * t + 0.222_365_33;
    let fit = fit * t + 0.196_200_22;
    t * fit * exp(-x * x)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::reference;

    /// Φ by Simpson's rule in `f64`: slow and beyond doubt.
    fn phi(x: f64) -> f64 {
        let intervals = 2000;
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

    #[test]
    fn exp_is_within_two_units_in_the_last_place() {
        for step in -8700..=8800 {
            let x = step as f32 / 100.0;
            let exact = f64::from(x).exp();
            assert!((f64::from(exp(x)) - exact).abs() <= exact * 2.4e-7, "exp({x}) = {}", exp(x));
        }
        assert!(exp(f32::NAN).is_nan());
    }

    #[test]
    fn gelu_is_the_exact_one_and_not_its_tanh_approximation() {
        for step in -600..=600 {
            let x = step as f32 / 100.0;
            let exact = f64::from(x) * phi(f64::from(x));
            assert!((f64::from(gelu_of(x)) - exact).abs() < 4e-7, "gelu({x}) = {}, not {exact}", gelu_of(x));
        }
    }

    #[test]
    fn silu_and_quick_gelu_follow_their_definitions() {
        let x = reference::tensor([3, 7], 1);
        let x = (x * 9.0).unwrap();
        let sigmoid = |x: f32| 1.0 / (1.0 + (-x).exp());
        let values = reference::values(&x);
        let expected: Vec<f32> = values.iter().map(|x| x * sigmoid(*x)).collect();
        reference::assert_close(&reference::values(&silu(&x).unwrap()), &expected, 1e-6);
        let expected: Vec<f32> = values.iter().map(|x| x * sigmoid(1.702 * x)).collect();
        reference::assert_close(&reference::values(&quick_gelu(&x).unwrap()), &expected, 1e-6);
    }

    #[test]
    fn geglu_gates_the_first_half_by_the_second_over_many_chunks() {
        let x = reference::tensor([3, 700, 2 * 33], 1);
        let (value, gate) = (x.narrow(2, 0, 33).unwrap(), x.narrow(2, 33, 33).unwrap());
        let expected = (value * gelu(&gate.contiguous().unwrap()).unwrap()).unwrap();
        reference::assert_close(&reference::values(&geglu(&x).unwrap()), &reference::values(&expected), 1e-7);
    }

    #[test]
    fn a_row_of_a_batch_equals_the_row_alone() {
        let x = reference::tensor([3, 77, 26], 1);
        for function in [silu, gelu, quick_gelu, geglu] {
            let batch = function(&x).unwrap();
            for row in 0..3 {
                reference::assert_row_is(&batch, row, &function(&x.narrow(0, row, 1).unwrap()).unwrap());
            }
        }
    }
}
