//! Functions of single values that no layer could take into its own pass.

use std::ops::Range;

use candle_core::DType;
use half::bf16;

use super::buffer::{Buffer, Format};
use super::kernel::element::Element;
use super::kernel::functions;
use super::kernel::isa::{Isa, Kernel, dispatch};
use super::kernel::simd::Simd;
use super::misuse;
use super::shared::{Shared, run_tasks};
use super::tensor::Tensor;
use crate::Result;

/// x · sigmoid(x).
pub(crate) fn silu(x: &Tensor) -> Result<Tensor> {
    if let Some(x) = x.device_values() {
        return Ok(Tensor::on_device(x.to_dtype(DType::F32)?.silu()?.to_dtype(x.dtype())?));
    }
    let resolved = x.resolved()?;
    let from = resolved.host()?;
    let mut output = Buffer::new(from.format(), from.len())?;
    match from.format() {
        Format::F32 => silu_values::<f32>(from.values(), output.values_mut()),
        Format::Bf16 => silu_values::<bf16>(from.values(), output.values_mut()),
    }?;
    Ok(Tensor::on_host(output, x.dims()))
}

fn silu_values<E: Element>(from: &[E], to: &mut [E]) -> Result<()> {
    in_parts(to, |range, to| dispatch(Isa::best(), Silu { from: &from[range], to }))
}

/// left · right, value by value.
pub(crate) fn multiply(left: &Tensor, right: &Tensor) -> Result<Tensor> {
    if left.dims() != right.dims() {
        return Err(misuse(format!("{:?} and {:?} cannot be multiplied", left.dims(), right.dims())));
    }
    if let (Some(left), Some(right)) = (left.device_values(), right.device_values()) {
        return Ok(Tensor::on_device((left * right)?));
    }
    let (left, right) = (left.resolved()?, right.resolved()?);
    let (one, other) = (left.host()?, right.host()?);
    if one.format() != other.format() {
        return Err(misuse("tensors of different formats cannot be multiplied".to_owned()));
    }
    let mut output = Buffer::new(one.format(), one.len())?;
    match one.format() {
        Format::F32 => multiply_values::<f32>(one.values(), other.values(), output.values_mut()),
        Format::Bf16 => multiply_values::<bf16>(one.values(), other.values(), output.values_mut()),
    }?;
    Ok(Tensor::on_host(output, left.dims()))
}

fn multiply_values<E: Element>(left: &[E], right: &[E], to: &mut [E]) -> Result<()> {
    in_parts(to, |range, to| {
        dispatch(Isa::best(), Product { left: &left[range.clone()], right: &right[range], to });
    })
}

/// Has `work` fill parts of `to`, each known by its place.
fn in_parts<E: Element>(to: &mut [E], work: impl Fn(Range<usize>, &mut [E]) + Send + Sync) -> Result<()> {
    /// Work per value, in multiply-adds.
    const WORK: usize = 16;
    /// Values of a task.
    const PART: usize = 64 * 1024;
    let len = to.len();
    let shared = Shared::new(to);
    run_tasks(len.div_ceil(PART), WORK * len, |task| {
        let range = task * PART..len.min((task + 1) * PART);
        // SAFETY: each task writes its own values.
        #[allow(unsafe_code)]
        let to = unsafe { shared.part(range.clone()) };
        work(range, to);
        Ok(())
    })
}

struct Silu<'a, E> {
    from: &'a [E],
    to: &'a mut [E],
}

impl<E: Element> Kernel for Silu<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        for (from, to) in self.from.chunks(S::LANES).zip(self.to.chunks_mut(S::LANES)) {
            // SAFETY: both have as many values as `from`, at most a vector's.
            #[allow(unsafe_code)]
            unsafe {
                let value = functions::silu(simd, E::load_some(simd, from.as_ptr(), from.len()));
                E::store_some(simd, to.as_mut_ptr(), value, from.len());
            }
        }
    }
}

struct Product<'a, E> {
    left: &'a [E],
    right: &'a [E],
    to: &'a mut [E],
}

impl<E: Element> Kernel for Product<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let factors = self.left.chunks(S::LANES).zip(self.right.chunks(S::LANES));
        for ((left, right), to) in factors.zip(self.to.chunks_mut(S::LANES)) {
            // SAFETY: all three have as many values, at most a vector's.
            #[allow(unsafe_code)]
            unsafe {
                let left = E::load_some(simd, left.as_ptr(), left.len());
                let right = E::load_some(simd, right.as_ptr(), right.len());
                E::store_some(simd, to.as_mut_ptr(), simd.mul(left, right), to.len());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::norm::GroupNorm;
    use crate::ops::reference::{self, parameter, tensor_at};

    #[test]
    fn silu_over_odd_lengths_equals_the_definition() {
        for place in reference::places() {
            for len in [1, 3, 7, 8, 15, 16, 17, 33, 1000, 200_001] {
                let wide: Vec<f32> = reference::numbers(len, 1).iter().map(|value| value * 20.0).collect();
                let x = Tensor::new(&wide, &[1, len], &place).unwrap();
                let got = silu(&x).unwrap();
                assert_eq!(got.dims(), [1, len]);
                let expected: Vec<f32> =
                    reference::values(&x).iter().map(|value| reference::silu(f64::from(*value)) as f32).collect();
                reference::assert_close(&reference::values(&got), &expected, reference::tolerance(&place));
            }
            assert_eq!(silu(&tensor_at([0, 3], 1, &place)).unwrap().dims(), [0, 3]);
        }
    }

    #[test]
    fn a_product_over_odd_lengths_equals_the_definition() {
        for place in reference::places() {
            for len in [1, 3, 8, 17, 33, 200_001] {
                let (x, y) = (tensor_at([2, len], 1, &place), tensor_at([2, len], 2, &place));
                let got = multiply(&x, &y).unwrap();
                assert_eq!(got.dims(), [2, len]);
                let (left, right) = (reference::values(&x), reference::values(&y));
                let expected: Vec<f32> = left.iter().zip(&right).map(|(left, right)| left * right).collect();
                reference::assert_close(&reference::values(&got), &expected, reference::tolerance(&place));
                reference::assert_threads_do_not_show(|| multiply(&x, &y).unwrap());
                let there = multiply(&reference::elsewhere(&x), &reference::elsewhere(&y)).unwrap();
                reference::assert_close(&reference::values(&there), &expected, 1e-6);
            }
            let x = tensor_at([2, 3], 1, &place);
            assert!(multiply(&x, &tensor_at([3, 2], 1, &place)).is_err());
            assert!(multiply(&x, &reference::elsewhere(&x)).is_err());
        }
        let (x, half) = (reference::tensor([2, 3], 1), tensor_at([2, 3], 1, &reference::bf16_place()));
        assert!(multiply(&x, &half).is_err());
    }

    #[test]
    fn a_pending_norm_is_applied_first() {
        for place in reference::places() {
            let norm = GroupNorm::new(&parameter([33], 1), &parameter([33], 2), 3, 1e-5).unwrap();
            let x = tensor_at([2, 5, 7, 33], 3, &place);
            let after = silu(&norm.forward(&x).unwrap().resolved().unwrap()).unwrap();
            reference::assert_same(&silu(&norm.forward(&x).unwrap()).unwrap(), &after);
            let fused = reference::values(&norm.forward_silu(&x).unwrap());
            reference::assert_close(&reference::values(&after), &fused, reference::tolerance(&place));
        }
    }

    #[test]
    fn neither_company_nor_threads_nor_damage_in_another_row_show() {
        for place in reference::places() {
            for tokens in [1, 77, 3001] {
                let x = tensor_at([3, tokens, 33], 1, &place);
                reference::assert_rows_stand_alone(&x, &place, |x| silu(x).unwrap());
                reference::assert_threads_do_not_show(|| silu(&x).unwrap());
                reference::assert_damage_stays_in_its_row(&x, &place, |x| silu(x).unwrap());
            }
        }
    }

    #[test]
    fn the_path_for_other_devices_agrees() {
        let x = reference::tensor([3, 77], 1);
        let (here, there) = (silu(&x).unwrap(), silu(&reference::elsewhere(&x)).unwrap());
        reference::assert_close(&reference::values(&there), &reference::values(&here), 1e-6);
    }
}
