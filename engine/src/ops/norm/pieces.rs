//! A group norm over a map that is never whole in memory: it is shown in pieces of whole lines, and then
//! normalises any part of the map by what it has seen.

use std::ops::Range;

use candle_core::DType;

use super::{GroupNorm, Moments, Parts, join_moments, with_pending};
use crate::Result;
use crate::ops::misuse;
use crate::ops::tensor::Tensor;

/// What a group norm has seen of a map's channels.
pub(crate) struct Seen {
    /// (rows · channels)
    moments: Vec<Moments>,
    parts: Parts,
    width: usize,
    /// Lines from the top.
    lines: usize,
}

impl Seen {
    /// Nothing yet of (rows, height, width, channels).
    pub fn nothing([rows, height, width, channels]: [usize; 4]) -> Self {
        let parts = Parts::of_lines(height, width);
        Self { moments: vec![Moments::default(); rows * channels], parts, width, lines: 0 }
    }

    /// Into how many lines a map of this size can be cut so that its pieces, one after the other, sum up as the
    /// whole: pieces are multiples of it, but for the last.
    pub fn unit(height: usize, width: usize) -> usize {
        Parts::of_lines(height, width).size / width.max(1)
    }

    fn height(&self) -> usize {
        self.parts.pixels / self.width.max(1)
    }

    /// The next lines, from the top down.
    pub fn look(&mut self, piece: &Tensor) -> Result<()> {
        let (rows, height, width, channels) = piece.dims4()?;
        let range = self.lines..self.lines + height;
        let whole = range.end == self.height() || range.end * width % self.parts.size == 0;
        if rows * channels != self.moments.len() || width != self.width || range.end > self.height() || !whole {
            return Err(misuse(format!("lines {range:?} of {:?} are no piece for a norm", piece.dims())));
        }
        self.lines = range.end;
        if let Some(x) = piece.device_values() {
            return self.look_on_device(x, range);
        }
        let pixels = height * width;
        let parts = Parts { pixels, count: pixels.div_ceil(self.parts.size), ..self.parts };
        join_moments(piece.resolved()?.host()?, parts, channels, &mut self.moments)
    }

    fn look_on_device(&mut self, x: &candle_core::Tensor, range: Range<usize>) -> Result<()> {
        let (rows, _, width, channels) = x.dims4()?;
        let pixels = range.len() * width;
        let x = x.reshape((rows, pixels, channels))?.to_dtype(DType::F32)?;
        let mean = x.mean_keepdim(1)?;
        let squares = x.broadcast_sub(&mean)?.sqr()?.sum(1)?.flatten_all()?.to_vec1::<f32>()?;
        let means = mean.flatten_all()?.to_vec1::<f32>()?;
        for (total, (mean, squares)) in self.moments.iter_mut().zip(means.into_iter().zip(squares)) {
            let part = Moments { count: pixels as f64, mean: f64::from(mean), squares: f64::from(squares) };
            *total = total.join(part);
        }
        Ok(())
    }
}

impl GroupNorm {
    /// Any lines of a map that has been `seen`, normalised as those of the whole, then SiLU.
    pub fn forward_silu_seen(&self, x: &Tensor, seen: &Seen) -> Result<Tensor> {
        let (rows, _, _, channels) = x.dims4()?;
        if seen.lines != seen.height() || rows * channels != seen.moments.len() || channels != self.weight.len() {
            let (lines, height) = (seen.lines, seen.height());
            return Err(misuse(format!("a norm of {:?} has seen {lines} of {height} lines", x.dims())));
        }
        let pending = self.pending(&seen.moments, channels, true);
        let Some(values) = x.device_values() else { return with_pending(&x.resolved()?, pending) };
        let per_channel =
            |numbers: Vec<f32>| candle_core::Tensor::from_vec(numbers, (rows, 1, 1, channels), values.device());
        let (scale, shift) = (per_channel(pending.scale)?, per_channel(pending.shift)?);
        let y = values.to_dtype(DType::F32)?.broadcast_mul(&scale)?.broadcast_add(&shift)?;
        Ok(Tensor::on_device(y.silu()?.to_dtype(values.dtype())?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::layout::{lines, stack_lines};
    use crate::ops::reference::{self, parameter, tensor_at};

    fn norm() -> GroupNorm {
        GroupNorm::new(&parameter([6], 8), &parameter([6], 9), 3, 1e-5).unwrap()
    }

    /// The map normalised piece by piece, each of so many units.
    fn in_pieces(x: &Tensor, units: usize) -> Tensor {
        let (rows, height, width, channels) = x.dims4().unwrap();
        let mut seen = Seen::nothing([rows, height, width, channels]);
        let step = units * Seen::unit(height, width);
        let pieces = (0..height).step_by(step).map(|top| lines(x, top..height.min(top + step)).unwrap());
        let pieces: Vec<Tensor> = pieces.collect();
        pieces.iter().for_each(|piece| seen.look(piece).unwrap());
        let pieces: Vec<Tensor> = pieces.iter().map(|piece| norm().forward_silu_seen(piece, &seen).unwrap()).collect();
        stack_lines(&pieces.iter().collect::<Vec<_>>()).unwrap()
    }

    #[test]
    fn pieces_are_normalised_bit_for_bit_as_the_whole() {
        for place in reference::places() {
            for (height, width) in [(1, 1), (7, 9), (64, 64), (200, 3), (3, 5000), (181, 190)] {
                let x = tensor_at([2, height, width, 6], 1, &place);
                for units in [1, 2, 5] {
                    reference::assert_same(&in_pieces(&x, units), &norm().forward_silu(&x).unwrap());
                }
            }
        }
    }

    #[test]
    fn the_path_for_other_devices_agrees() {
        let x = reference::tensor([2, 37, 41, 6], 1);
        let expected = reference::values(&norm().forward_silu(&x).unwrap());
        reference::assert_close(&reference::values(&in_pieces(&reference::elsewhere(&x), 3)), &expected, 1e-5);
    }

    #[test]
    fn pieces_that_do_not_fit_are_errors_and_not_panics() {
        let x = reference::tensor([1, 64, 64, 6], 1);
        let mut seen = Seen::nothing([1, 64, 64, 6]);
        assert!(norm().forward_silu_seen(&x, &seen).is_err(), "not seen yet");
        assert!(seen.look(&lines(&x, 0..Seen::unit(64, 64) + 1).unwrap()).is_err());
        assert!(seen.look(&reference::tensor([1, 65, 64, 6], 1)).is_err());
        assert!(seen.look(&reference::tensor([1, 64, 63, 6], 1)).is_err());
        assert!(seen.look(&reference::tensor([1, 64, 64, 5], 1)).is_err());
        seen.look(&x).unwrap();
        assert!(seen.look(&x).is_err());
        assert!(norm().forward_silu_seen(&reference::tensor([1, 64, 64, 5], 1), &seen).is_err());
    }
}
