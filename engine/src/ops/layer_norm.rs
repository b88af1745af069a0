//! Layer norm.

use candle_core::{D, DType};

use super::kernel::element::Element;
use super::kernel::isa::{Isa, Kernel, dispatch};
use super::kernel::simd::Simd;
use super::misuse;
use super::parameter::Parameter;
use super::per_token::{PerToken, per_token};
use super::tensor::Tensor;
use crate::Result;

/// Normalises each token over its channels: its mean becomes 0 and its deviation 1, and then weight and bias
/// come.
pub(crate) struct LayerNorm {
    weight: Vec<f32>,
    bias: Vec<f32>,
    epsilon: f64,
}

impl LayerNorm {
    /// A norm from (channels) weight and bias.
    pub fn new(weight: &Parameter<'_>, bias: &Parameter<'_>, epsilon: f64) -> Result<Self> {
        let (weight, bias) = (weight.values()?, bias.values()?);
        if weight.len() != bias.len() {
            return Err(misuse(format!("a layer norm of {} weights and {} biases", weight.len(), bias.len())));
        }
        Ok(Self { weight, bias, epsilon })
    }

    /// A norm of `channels` that has learned nothing.
    pub fn plain(channels: usize, epsilon: f64) -> Self {
        Self { weight: vec![1.0; channels], bias: vec![0.0; channels], epsilon }
    }

    /// (rows, …, channels), normalised.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.check(x)?;
        if let Some(x) = x.device_values() {
            return Ok(Tensor::on_device(self.on_device(x)?));
        }
        let Self { weight, bias, epsilon } = self;
        per_token(x, weight.len(), 1, &Then { weight, bias, epsilon: *epsilon as f32 })
    }

    /// (rows, …, channels), normalised, times 1 + `scale`, plus `shift`: both (rows, channels), each row by
    /// its own.
    pub fn forward_modulated(&self, x: &Tensor, scale: &Tensor, shift: &Tensor) -> Result<Tensor> {
        self.check(x)?;
        let (rows, channels) = (x.dims()[0], self.weight.len());
        if x.dims().len() < 2 || scale.dims() != [rows, channels] || shift.dims() != scale.dims() {
            let (scale, shift) = (scale.dims(), shift.dims());
            return Err(misuse(format!("a layer norm of {:?} was given {scale:?} and {shift:?}", x.dims())));
        }
        match (x.device_values(), scale.device_values(), shift.device_values()) {
            (Some(x), Some(scale), Some(shift)) => {
                let mut dims = vec![1; x.rank()];
                (dims[0], dims[x.rank() - 1]) = (rows, channels);
                let (scale, shift) = ((scale.reshape(dims.as_slice())? + 1.0)?, shift.reshape(dims.as_slice())?);
                Ok(Tensor::on_device(self.on_device(x)?.broadcast_mul(&scale)?.broadcast_add(&shift)?))
            }
            (None, None, None) => {
                // (normal · weight + bias) · (1 + scale) + shift, with what a row's tokens share taken together.
                let (scale, shift) = (scale.to_values()?, shift.to_values()?);
                let learned = (0..rows).flat_map(|_| self.weight.iter().zip(&self.bias));
                let (weight, bias): (Vec<f32>, Vec<f32>) = learned
                    .zip(scale.iter().zip(&shift))
                    .map(|((weight, bias), (scale, shift))| (weight * (1.0 + scale), bias * (1.0 + scale) + shift))
                    .unzip();
                per_token(x, channels, rows, &Then { weight: &weight, bias: &bias, epsilon: self.epsilon as f32 })
            }
            _ => Err(misuse("a layer norm and what it was given are on different devices".to_owned())),
        }
    }

    fn check(&self, x: &Tensor) -> Result<()> {
        let channels = self.weight.len();
        if x.dims().last() != Some(&channels) {
            return Err(misuse(format!("a layer norm of {channels} channels was given {:?}", x.dims())));
        }
        Ok(())
    }

    fn on_device(&self, x: &candle_core::Tensor) -> Result<candle_core::Tensor> {
        let dtype = x.dtype();
        let x = x.to_dtype(DType::F32)?;
        let centred = x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?;
        let variance = centred.sqr()?.mean_keepdim(D::Minus1)?;
        let normal = centred.broadcast_div(&(variance + self.epsilon)?.sqrt()?)?;
        let weight = candle_core::Tensor::new(self.weight.as_slice(), x.device())?;
        let bias = candle_core::Tensor::new(self.bias.as_slice(), x.device())?;
        Ok(normal.broadcast_mul(&weight)?.broadcast_add(&bias)?.to_dtype(dtype)?)
    }
}

/// What becomes of normal values.
struct Then<'a> {
    /// (rows, channels): multiplied with them,
    weight: &'a [f32],
    /// and then added.
    bias: &'a [f32],
    epsilon: f32,
}

impl PerToken for Then<'_> {
    fn run<E: Element>(&self, row: usize, channels: usize, from: &[E], to: &mut [E]) {
        let range = row * channels..(row + 1) * channels;
        let then = Then { weight: &self.weight[range.clone()], bias: &self.bias[range], ..*self };
        dispatch(Isa::best(), Normalise { then, from, to });
    }
}

/// Tokens of one row.
struct Normalise<'a, E> {
    then: Then<'a>,
    from: &'a [E],
    to: &'a mut [E],
}

impl<E: Element> Kernel for Normalise<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Then { weight, bias, epsilon } = self.then;
        let channels = weight.len();
        for (from, to) in self.from.chunks_exact(channels).zip(self.to.chunks_exact_mut(channels)) {
            let mean = total(simd, from, 0.0, false) / channels as f32;
            let variance = total(simd, from, mean, true) / channels as f32;
            let scale = simd.splat(1.0 / (variance + epsilon).sqrt());
            let mean = simd.splat(mean);
            for at in (0..channels).step_by(S::LANES) {
                let count = S::LANES.min(channels - at);
                // SAFETY: `at` and `count` stay within all four.
                #[allow(unsafe_code)]
                unsafe {
                    let (weight, bias) = (weight.as_ptr().add(at), bias.as_ptr().add(at));
                    let (from, to) = (from.as_ptr().add(at), to.as_mut_ptr().add(at));
                    if count == S::LANES {
                        let normal = simd.mul(simd.sub(E::load(simd, from), mean), scale);
                        E::store(simd, to, simd.mul_add(normal, simd.load(weight), simd.load(bias)));
                    } else {
                        let normal = simd.mul(simd.sub(E::load_some(simd, from, count), mean), scale);
                        let (weight, bias) = (simd.load_some(weight, count), simd.load_some(bias, count));
                        E::store_some(simd, to, simd.mul_add(normal, weight, bias), count);
                    }
                }
            }
        }
    }
}

/// The sum of all values' distances from `centre`, or of their squares.
#[inline(always)]
pub(super) fn total<S: Simd, E: Element>(simd: S, values: &[E], centre: f32, squared: bool) -> f32 {
    let centre_lanes = simd.splat(centre);
    let term = |sum, value| {
        let distance = simd.sub(value, centre_lanes);
        if squared { simd.mul_add(distance, distance, sum) } else { simd.add(sum, distance) }
    };
    let mut sums = [simd.splat(0.0); 2];
    let whole = values.len() / S::LANES * S::LANES;
    for at in (0..whole).step_by(S::LANES) {
        // SAFETY: a whole vector lies behind `at`.
        #[allow(unsafe_code)]
        let value = unsafe { E::load(simd, values.as_ptr().add(at)) };
        sums[at / S::LANES % 2] = term(sums[at / S::LANES % 2], value);
    }
    let rest = values[whole..].iter().map(|value| {
        let distance = value.to_f32() - centre;
        if squared { distance * distance } else { distance }
    });
    simd.sum(simd.add(sums[0], sums[1])) + rest.sum::<f32>()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::norm::GroupNorm;
    use crate::ops::reference::{self, parameter, tensor_at};
    use crate::ops::tensor::Place;

    const EPSILON: f64 = 1e-5;

    fn norm(channels: usize) -> LayerNorm {
        LayerNorm::new(&parameter([channels], 2), &parameter([channels], 3), EPSILON).unwrap()
    }

    fn plain(x: &Tensor, norm: &LayerNorm) -> Vec<f32> {
        let mut expected = Vec::new();
        for token in reference::values(x).chunks(norm.weight.len()) {
            let count = token.len() as f64;
            let mean = token.iter().map(|value| f64::from(*value)).sum::<f64>() / count;
            let variance = token.iter().map(|value| (f64::from(*value) - mean).powi(2)).sum::<f64>() / count;
            expected.extend(token.iter().zip(norm.weight.iter().zip(&norm.bias)).map(|(value, (weight, bias))| {
                let normal = (f64::from(*value) - mean) / (variance + EPSILON).sqrt();
                (normal * f64::from(*weight) + f64::from(*bias)) as f32
            }));
        }
        expected
    }

    #[test]
    fn a_layer_norm_over_odd_widths_equals_the_definition() {
        for place in reference::places() {
            for channels in [1, 2, 3, 5, 15, 16, 17, 33, 96, 320, 321, 1280] {
                let shifted: Vec<f32> =
                    reference::numbers(2 * 67 * channels, 1).iter().map(|value| value * 2.0 - 5.0).collect();
                let (x, norm) = (Tensor::new(&shifted, &[2, 67, channels], &place).unwrap(), norm(channels));
                let got = norm.forward(&x).unwrap();
                assert_eq!(got.dims(), x.dims());
                reference::assert_close(&reference::values(&got), &plain(&x, &norm), reference::tolerance(&place));
            }
        }
    }

    #[test]
    fn a_pending_group_norm_is_applied_first() {
        for place in reference::places() {
            let group_norm = GroupNorm::new(&parameter([33], 5), &parameter([33], 6), 3, EPSILON).unwrap();
            let pending = group_norm.forward_silu(&tensor_at([2, 5, 7, 33], 1, &place)).unwrap();
            let after = norm(33).forward(&pending.resolved().unwrap()).unwrap();
            reference::assert_same(&norm(33).forward(&pending).unwrap(), &after);
        }
    }

    #[test]
    fn a_modulated_norm_scales_and_shifts_each_row_by_its_own() {
        for place in reference::places() {
            for (dims, channels) in
                [(vec![3, 7, 33], 33), (vec![2, 5], 5), (vec![2, 3, 5, 16], 16), (vec![2, 701, 96], 96)]
            {
                let x = Tensor::new(&reference::numbers(dims.iter().product(), 1), &dims, &place).unwrap();
                let (scale, shift) =
                    (tensor_at([dims[0], channels], 7, &place), tensor_at([dims[0], channels], 8, &place));
                for norm in [norm(channels), LayerNorm::plain(channels, EPSILON)] {
                    let (scales, shifts) = (reference::values(&scale), reference::values(&shift));
                    let each = x.elements() / dims[0];
                    let of_row = |at: usize| at / each * channels + at % channels;
                    let normal = plain(&x, &norm).into_iter().enumerate();
                    let expected: Vec<f32> =
                        normal.map(|(at, value)| value * (1.0 + scales[of_row(at)]) + shifts[of_row(at)]).collect();
                    let run =
                        |x: &Tensor, scale: &Tensor, shift: &Tensor| norm.forward_modulated(x, scale, shift).unwrap();
                    let got = run(&x, &scale, &shift);
                    assert_eq!(got.dims(), x.dims());
                    reference::assert_close(&reference::values(&got), &expected, reference::tolerance(&place));
                    for index in 0..dims[0] {
                        let [x, scale, shift] =
                            [&x, &scale, &shift].map(|tensor| reference::row(tensor, index, &place));
                        reference::assert_row_is(&got, index, &run(&x, &scale, &shift));
                    }
                    reference::assert_threads_do_not_show(|| run(&x, &scale, &shift));
                    let [x, scale, shift] = [&x, &scale, &shift].map(reference::elsewhere);
                    let there = reference::values(&run(&x, &scale, &shift));
                    reference::assert_close(&there, &expected, 2e-5);
                }
            }
        }
    }

    #[test]
    fn a_norm_that_has_learned_nothing_only_normalises() {
        let x = reference::tensor([2, 5, 33], 1);
        let norm = LayerNorm::plain(33, EPSILON);
        let got = reference::values(&norm.forward(&x).unwrap());
        reference::assert_close(&got, &plain(&x, &norm), 2e-5);
        for token in got.chunks(33) {
            assert!(token.iter().sum::<f32>().abs() < 1e-4);
            assert!((token.iter().map(|value| value * value).sum::<f32>() / 33.0 - 1.0).abs() < 1e-3);
        }
    }

    #[test]
    fn neither_company_nor_threads_nor_damage_in_another_row_show() {
        for place in reference::places() {
            for (tokens, channels) in [(1, 5), (77, 33), (301, 320)] {
                let (x, norm) = (tensor_at([3, tokens, channels], 1, &place), norm(channels));
                let run = |x: &Tensor| norm.forward(x).unwrap();
                reference::assert_rows_stand_alone(&x, &place, run);
                reference::assert_threads_do_not_show(|| run(&x));
                reference::assert_damage_stays_in_its_row(&x, &place, run);
            }
        }
    }

    #[test]
    fn the_path_for_other_devices_agrees() {
        let (x, norm) = (reference::tensor([2, 5, 33], 1), norm(33));
        let (here, there) = (norm.forward(&x).unwrap(), norm.forward(&reference::elsewhere(&x)).unwrap());
        reference::assert_close(&reference::values(&there), &reference::values(&here), 1e-5);
    }

    #[test]
    fn wrong_shapes_are_errors_and_not_panics() {
        for place in reference::places() {
            assert!(norm(5).forward(&tensor_at([2, 3, 6], 1, &place)).is_err());
            assert!(norm(5).forward(&tensor_at([], 1, &place)).is_err());
        }
        assert!(LayerNorm::new(&parameter([5], 1), &parameter([6], 2), EPSILON).is_err());
        let (x, vector) = (reference::tensor([2, 3, 5], 1), reference::tensor([2, 5], 2));
        for misfit in [reference::tensor([3, 5], 2), reference::tensor([2, 6], 2), reference::elsewhere(&vector)] {
            assert!(norm(5).forward_modulated(&x, &misfit, &vector).is_err());
            assert!(norm(5).forward_modulated(&x, &vector, &misfit).is_err());
        }
        assert!(norm(5).forward(&reference::elsewhere(&reference::tensor([2, 6], 1))).is_err());
        assert_eq!(norm(5).forward(&Tensor::new(&[], &[0, 5], &Place::host()).unwrap()).unwrap().dims(), [0, 5]);
    }
}
