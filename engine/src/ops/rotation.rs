//! Rotary position embedding: each pair of a head's channels is turned by an angle that its token's place
//! gives.
//!
//! Reference: Su et al. 2021, <https://arxiv.org/abs/2104.09864>, with pairs of neighbours.

use candle_core::{D, DType};
use half::bf16;

use super::buffer::{Buffer, Format};
use super::kernel::element::Element;
use super::kernel::isa::{Isa, Kernel, dispatch};
use super::kernel::simd::Simd;
use super::misuse;
use super::shared::{Shared, run_tasks};
use super::tensor::{Place, Tensor};
use crate::Result;

/// Angles of all tokens of a row, the same in every row and head.
pub(crate) struct Rotation {
    /// (tokens, width): each pair's cosine twice,
    cosines: Vec<f32>,
    /// and its sine, first negative: what the partner is multiplied with.
    sines: Vec<f32>,
    /// Channels of a head.
    width: usize,
    /// Cosines and sines (tokens, 1, width / 2) on another device.
    device: Option<(candle_core::Tensor, candle_core::Tensor)>,
}

impl Rotation {
    /// A rotation by `angles` (tokens, width / 2). The angles are `f64`, and their sines `f32` in every format:
    /// half precision would lose where a token is.
    pub fn new(angles: &[f64], width: usize, place: &Place) -> Result<Self> {
        if width == 0 || !width.is_multiple_of(2) || !angles.len().is_multiple_of(width / 2) {
            return Err(misuse(format!("{} angles for heads of {width} channels", angles.len())));
        }
        let device = match place.on_host() {
            Some(_) => None,
            None => {
                let of = |function: fn(f64) -> f64| {
                    let values: Vec<f32> = angles.iter().map(|angle| function(*angle) as f32).collect();
                    candle_core::Tensor::from_vec(values, ((), 1, width / 2), place.device())
                };
                Some((of(f64::cos)?, of(f64::sin)?))
            }
        };
        let pairs = angles.iter().map(|angle| angle.sin_cos());
        let cosines = pairs.clone().flat_map(|(_, cosine)| [cosine as f32; 2]).collect();
        let sines = pairs.flat_map(|(sine, _)| [-sine as f32, sine as f32]).collect();
        Ok(Self { cosines, sines, width, device })
    }

    fn tokens(&self) -> usize {
        self.cosines.len() / self.width
    }

    /// (rows, tokens, channels), heads side by side in the channels.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (rows, tokens, channels) = x.dims3()?;
        if tokens != self.tokens() || !channels.is_multiple_of(self.width) {
            let (of, width) = (self.tokens(), self.width);
            return Err(misuse(format!("a rotation of {of} tokens, {width} channels each, was given {:?}", x.dims())));
        }
        match (x.device_values(), &self.device) {
            (Some(x), Some((cosines, sines))) => Ok(Tensor::on_device(self.on_device(x, cosines, sines)?)),
            (None, None) => {
                let resolved = x.resolved()?;
                let from = resolved.host()?;
                let mut output = Buffer::new(from.format(), from.len())?;
                match from.format() {
                    Format::F32 => self.on_host::<f32>(from.values(), output.values_mut(), [rows, channels]),
                    Format::Bf16 => self.on_host::<bf16>(from.values(), output.values_mut(), [rows, channels]),
                }?;
                Ok(Tensor::on_host(output, x.dims()))
            }
            _ => Err(misuse("a rotation and what it was given are on different devices".to_owned())),
        }
    }

    fn on_host<E: Element>(&self, from: &[E], to: &mut [E], [rows, channels]: [usize; 2]) -> Result<()> {
        /// Work per value, in multiply-adds.
        const WORK: usize = 8;
        /// Values of a task.
        const VALUES: usize = 64 * 1024;
        let tokens = self.tokens();
        let part = (VALUES / channels.max(1)).max(1);
        let parts = tokens.div_ceil(part);
        let shared = Shared::new(to);
        run_tasks(rows * parts, WORK * from.len(), |task| {
            let (row, first) = (task / parts, task % parts * part);
            let tokens = first..tokens.min(first + part);
            let range = (row * self.tokens() + tokens.start) * channels..(row * self.tokens() + tokens.end) * channels;
            // SAFETY: each task writes its own tokens.
            #[allow(unsafe_code)]
            let to = unsafe { shared.part(range.clone()) };
            let (cosines, sines) = (&self.cosines[first * self.width..], &self.sines[first * self.width..]);
            dispatch(Isa::best(), Turn { cosines, sines, width: self.width, channels, from: &from[range], to });
            Ok(())
        })
    }

    fn on_device(
        &self,
        x: &candle_core::Tensor,
        cosines: &candle_core::Tensor,
        sines: &candle_core::Tensor,
    ) -> Result<candle_core::Tensor> {
        let (rows, tokens, channels) = x.dims3()?;
        let pairs = x.to_dtype(DType::F32)?.reshape((rows, tokens, channels / self.width, self.width / 2, 2))?;
        let (first, second) = (pairs.narrow(D::Minus1, 0, 1)?.squeeze(D::Minus1)?, pairs.narrow(D::Minus1, 1, 1)?);
        let second = second.squeeze(D::Minus1)?;
        let turned = [
            (first.broadcast_mul(cosines)? - second.broadcast_mul(sines)?)?,
            (second.broadcast_mul(cosines)? + first.broadcast_mul(sines)?)?,
        ];
        Ok(candle_core::Tensor::stack(&turned, 4)?.reshape(x.dims())?.to_dtype(x.dtype())?)
    }
}

/// Some tokens of a row.
struct Turn<'a, E> {
    /// From the first of these tokens on.
    cosines: &'a [f32],
    sines: &'a [f32],
    width: usize,
    channels: usize,
    from: &'a [E],
    to: &'a mut [E],
}

impl<E: Element> Kernel for Turn<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        const { assert!(S::LANES.is_multiple_of(2), "pairs stay together") };
        let Self { cosines, sines, width, channels, from, to } = self;
        let tables = cosines.chunks_exact(width).zip(sines.chunks_exact(width));
        let tokens = from.chunks_exact(channels).zip(to.chunks_exact_mut(channels));
        for ((from, to), (cosines, sines)) in tokens.zip(tables) {
            for (from, to) in from.chunks_exact(width).zip(to.chunks_exact_mut(width)) {
                for at in (0..width).step_by(S::LANES) {
                    let count = S::LANES.min(width - at);
                    let mut values = [0f32; 16];
                    // SAFETY: `at` and `count` stay within both, and 16 is the widest vector.
                    #[allow(unsafe_code)]
                    unsafe {
                        simd.store(values.as_mut_ptr(), E::load_some(simd, from.as_ptr().add(at), count));
                    }
                    let mut turned = [0f32; 16];
                    let tables = cosines[at..at + count].as_chunks().0.iter().zip(sines[at..at + count].as_chunks().0);
                    let pairs = values.as_chunks().0.iter().zip(turned.as_chunks_mut().0);
                    for (([first, second], to), ([cosine, _], [minus_sine, sine])) in pairs.zip(tables) {
                        *to = [first * cosine + second * minus_sine, second * cosine + first * sine];
                    }
                    // SAFETY: as above.
                    #[allow(unsafe_code)]
                    unsafe {
                        E::store_some(simd, to.as_mut_ptr().add(at), simd.load(turned.as_ptr()), count);
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

    fn angles(tokens: usize, width: usize) -> Vec<f64> {
        reference::numbers(tokens * width / 2, 9).into_iter().map(|number| f64::from(number) * 100.0).collect()
    }

    fn plain(x: &Tensor, angles: &[f64], width: usize) -> Vec<f32> {
        let (rows, tokens, channels) = x.dims3().unwrap();
        let mut expected = reference::values(x);
        for (at, pair) in expected.chunks_exact_mut(2).enumerate() {
            let (token, channel) = (2 * at / channels % tokens, 2 * at % channels);
            let (sine, cosine) = angles[token * (width / 2) + channel % width / 2].sin_cos();
            let (first, second) = (f64::from(pair[0]), f64::from(pair[1]));
            pair[0] = (first * cosine - second * sine) as f32;
            pair[1] = (first * sine + second * cosine) as f32;
        }
        assert_eq!(expected.len(), rows * tokens * channels);
        expected
    }

    #[test]
    fn a_rotation_over_odd_shapes_equals_the_definition() {
        for place in reference::places() {
            for (tokens, heads, width) in [(1, 1, 2), (3, 2, 6), (7, 3, 16), (5, 1, 30), (300, 2, 128), (33, 5, 34)] {
                let (x, angles) = (tensor_at([2, tokens, heads * width], 1, &place), angles(tokens, width));
                let got = Rotation::new(&angles, width, &place).unwrap().forward(&x).unwrap();
                assert_eq!(got.dims(), x.dims());
                let expected = plain(&x, &angles, width);
                reference::assert_close(&reference::values(&got), &expected, reference::tolerance(&place));
            }
        }
    }

    #[test]
    fn neither_company_nor_threads_nor_damage_in_another_row_show() {
        for place in reference::places() {
            for (tokens, heads, width) in [(1, 3, 6), (500, 2, 128)] {
                let x = tensor_at([3, tokens, heads * width], 1, &place);
                let rotation = Rotation::new(&angles(tokens, width), width, &place).unwrap();
                let run = |x: &Tensor| rotation.forward(x).unwrap();
                reference::assert_rows_stand_alone(&x, &place, run);
                reference::assert_threads_do_not_show(|| run(&x));
                reference::assert_damage_stays_in_its_row(&x, &place, run);
            }
        }
    }

    #[test]
    fn a_pending_norm_is_applied_first() {
        for place in reference::places() {
            let norm = GroupNorm::new(&parameter([32], 1), &parameter([32], 2), 4, 1e-5).unwrap();
            let pending = norm.forward_silu(&tensor_at([2, 5, 1, 32], 3, &place)).unwrap();
            let pending = pending.reshape(&[2, 5, 32]).unwrap();
            let rotation = Rotation::new(&angles(5, 16), 16, &place).unwrap();
            let after = rotation.forward(&pending.resolved().unwrap()).unwrap();
            reference::assert_same(&rotation.forward(&pending).unwrap(), &after);
        }
    }

    #[test]
    fn the_path_for_other_devices_agrees() {
        let (x, angles) = (reference::tensor([2, 9, 36], 1), angles(9, 12));
        let here = Rotation::new(&angles, 12, &Place::host()).unwrap();
        let of = |function: fn(f64) -> f64| {
            let values: Vec<f32> = angles.iter().map(|angle| function(*angle) as f32).collect();
            candle_core::Tensor::from_vec(values, ((), 1, 6), &candle_core::Device::Cpu).unwrap()
        };
        let there = Rotation {
            device: Some((of(f64::cos), of(f64::sin))),
            ..Rotation::new(&angles, 12, &Place::host()).unwrap()
        };
        let (expected, got) = (here.forward(&x).unwrap(), there.forward(&reference::elsewhere(&x)).unwrap());
        assert_eq!(got.dims(), expected.dims());
        reference::assert_close(&reference::values(&got), &reference::values(&expected), 1e-6);
        assert!(here.forward(&reference::elsewhere(&x)).is_err());
        assert!(there.forward(&x).is_err());
    }

    #[test]
    fn wrong_shapes_are_errors_and_not_panics() {
        let place = Place::host();
        assert!(Rotation::new(&[0.0; 4], 3, &place).is_err());
        assert!(Rotation::new(&[0.0; 5], 4, &place).is_err());
        assert!(Rotation::new(&[], 0, &place).is_err());
        let rotation = Rotation::new(&[0.0; 6], 4, &place).unwrap();
        for dims in [vec![1, 2, 4], vec![1, 3, 6], vec![3, 4]] {
            assert!(rotation.forward(&Tensor::new(&vec![0.0; dims.iter().product()], &dims, &place).unwrap()).is_err());
        }
        assert_eq!(rotation.forward(&Tensor::new(&[], &[0, 3, 4], &place).unwrap()).unwrap().dims(), [0, 3, 4]);
    }
}
