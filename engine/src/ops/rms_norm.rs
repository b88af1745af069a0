//! Root mean square norm.

use candle_core::{D, DType};

use super::kernel::element::Element;
use super::kernel::isa::{Isa, Kernel, dispatch};
use super::kernel::simd::Simd;
use super::layer_norm::total;
use super::misuse;
use super::parameter::Parameter;
use super::per_token::{PerToken, per_token};
use super::tensor::Tensor;
use crate::Result;

/// Divides by the root of the mean square, of a token's channels or of each head's, and multiplies with a
/// weight. The mean is `f32` in every format.
pub(crate) struct RmsNorm {
    weight: Vec<f32>,
    epsilon: f64,
}

impl RmsNorm {
    /// A norm from a weight of as many values as are normalised together.
    pub fn new(weight: &Parameter<'_>, epsilon: f64) -> Result<Self> {
        if weight.dims().len() != 1 || weight.dims()[0] == 0 {
            return Err(misuse(format!("a root mean square norm was given a weight of {:?}", weight.dims())));
        }
        Ok(Self { weight: weight.values()?, epsilon })
    }

    /// (rows, …, channels), normalised. Where there are several times as many channels as weights, these are
    /// heads side by side, each normalised alone.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let width = self.weight.len();
        if !x.dims().last().is_some_and(|channels| channels.is_multiple_of(width)) {
            return Err(misuse(format!("a root mean square norm of {width} channels was given {:?}", x.dims())));
        }
        match x.device_values() {
            Some(x) => Ok(Tensor::on_device(self.on_device(x)?)),
            None => per_token(x, width, 1, self),
        }
    }

    fn on_device(&self, x: &candle_core::Tensor) -> Result<candle_core::Tensor> {
        let heads = x.to_dtype(DType::F32)?.reshape(((), self.weight.len()))?;
        let mean = heads.sqr()?.mean_keepdim(D::Minus1)?;
        let normal = heads.broadcast_div(&(mean + self.epsilon)?.sqrt()?)?;
        let weight = candle_core::Tensor::new(self.weight.as_slice(), x.device())?;
        Ok(normal.broadcast_mul(&weight)?.reshape(x.dims())?.to_dtype(x.dtype())?)
    }
}

impl PerToken for RmsNorm {
    fn run<E: Element>(&self, _row: usize, _width: usize, from: &[E], to: &mut [E]) {
        dispatch(Isa::best(), Normalise { norm: self, from, to });
    }
}

struct Normalise<'a, E> {
    norm: &'a RmsNorm,
    from: &'a [E],
    to: &'a mut [E],
}

impl<E: Element> Kernel for Normalise<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let RmsNorm { weight, epsilon } = self.norm;
        let width = weight.len();
        for (from, to) in self.from.chunks_exact(width).zip(self.to.chunks_exact_mut(width)) {
            let mean = total(simd, from, 0.0, true) / width as f32;
            let scale = simd.splat(1.0 / (mean + *epsilon as f32).sqrt());
            for at in (0..width).step_by(S::LANES) {
                let count = S::LANES.min(width - at);
                // SAFETY: `at` and `count` stay within all three.
                #[allow(unsafe_code)]
                unsafe {
                    let (weight, from) = (weight.as_ptr().add(at), from.as_ptr().add(at));
                    let to = to.as_mut_ptr().add(at);
                    if count == S::LANES {
                        let normal = simd.mul(E::load(simd, from), scale);
                        E::store(simd, to, simd.mul(normal, simd.load(weight)));
                    } else {
                        let normal = simd.mul(E::load_some(simd, from, count), scale);
                        E::store_some(simd, to, simd.mul(normal, simd.load_some(weight, count)), count);
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::norm::GroupNorm;
    use crate::ops::reference::{self, parameter, tensor_at};
    use crate::ops::tensor::Place;

    const EPSILON: f64 = 1e-6;

    fn norm(width: usize) -> RmsNorm {
        RmsNorm::new(&parameter([width], 2), EPSILON).unwrap()
    }

    fn plain(x: &Tensor, norm: &RmsNorm) -> Vec<f32> {
        let mut expected = Vec::new();
        for head in reference::values(x).chunks(norm.weight.len()) {
            let squares: f64 = head.iter().map(|value| f64::from(*value).powi(2)).sum();
            let root = (squares / head.len() as f64 + EPSILON).sqrt();
            let each = head.iter().zip(&norm.weight);
            expected.extend(each.map(|(value, weight)| (f64::from(*value) / root * f64::from(*weight)) as f32));
        }
        expected
    }

    #[test]
    fn a_norm_over_odd_widths_and_any_number_of_heads_equals_the_definition() {
        for place in reference::places() {
            for width in [1, 2, 5, 15, 16, 17, 33, 64, 321] {
                for heads in [1, 2, 3] {
                    let values: Vec<f32> =
                        reference::numbers(2 * 67 * heads * width, 1).iter().map(|value| value * 3.0 + 1.0).collect();
                    let x = Tensor::new(&values, &[2, 67, heads * width], &place).unwrap();
                    let got = norm(width).forward(&x).unwrap();
                    assert_eq!(got.dims(), x.dims());
                    let expected = plain(&x, &norm(width));
                    reference::assert_close(&reference::values(&got), &expected, reference::tolerance(&place));
                    let there = norm(width).forward(&reference::elsewhere(&x)).unwrap();
                    assert_eq!(there.dims(), x.dims());
                    reference::assert_close(&reference::values(&there), &expected, 2e-5);
                }
            }
        }
    }

    #[test]
    fn large_values_keep_their_direction() {
        for place in reference::places() {
            let large: Vec<f32> = reference::numbers(3 * 32, 1).iter().map(|value| value * 1e15).collect();
            let x = Tensor::new(&large, &[1, 3, 32], &place).unwrap();
            let got = norm(32).forward(&x).unwrap();
            reference::assert_close(&reference::values(&got), &plain(&x, &norm(32)), reference::tolerance(&place));
        }
    }

    #[test]
    fn a_pending_group_norm_is_applied_first() {
        for place in reference::places() {
            let group_norm = GroupNorm::new(&parameter([33], 5), &parameter([33], 6), 3, EPSILON).unwrap();
            let pending = group_norm.forward_silu(&tensor_at([2, 5, 7, 33], 1, &place)).unwrap();
            let after = norm(11).forward(&pending.resolved().unwrap()).unwrap();
            reference::assert_same(&norm(11).forward(&pending).unwrap(), &after);
        }
    }

    #[test]
    fn neither_company_nor_threads_nor_damage_in_another_row_show() {
        for place in reference::places() {
            for (tokens, channels, width) in [(1, 5, 5), (77, 33, 11), (301, 320, 64)] {
                let (x, norm) = (tensor_at([3, tokens, channels], 1, &place), norm(width));
                let run = |x: &Tensor| norm.forward(x).unwrap();
                reference::assert_rows_stand_alone(&x, &place, run);
                reference::assert_threads_do_not_show(|| run(&x));
                reference::assert_damage_stays_in_its_row(&x, &place, run);
            }
        }
    }

    #[test]
    fn wrong_shapes_are_errors_and_not_panics() {
        for place in reference::places() {
            assert!(norm(5).forward(&tensor_at([2, 3, 6], 1, &place)).is_err());
            assert!(norm(5).forward(&tensor_at([], 1, &place)).is_err());
        }
        assert!(RmsNorm::new(&parameter([0], 1), EPSILON).is_err());
        assert!(RmsNorm::new(&parameter([2, 3], 1), EPSILON).is_err());
        assert!(norm(5).forward(&reference::elsewhere(&reference::tensor([2, 6], 1))).is_err());
        assert_eq!(norm(5).forward(&Tensor::new(&[], &[0, 5], &Place::host()).unwrap()).unwrap().dims(), [0, 5]);
    }
}
