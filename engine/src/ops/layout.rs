//! Moving values without changing them.

use candle_core::Tensor;
use rayon::prelude::*;

use super::host;
use crate::Result;

/// (rows, channels, height, width) → (rows, height, width, channels).
pub(crate) fn channels_last(x: &Tensor) -> Result<Tensor> {
    Ok(x.permute((0, 2, 3, 1))?.contiguous()?)
}

/// (rows, height, width, channels) → (rows, channels, height, width).
pub(crate) fn channels_first(x: &Tensor) -> Result<Tensor> {
    Ok(x.permute((0, 3, 1, 2))?.contiguous()?)
}

/// The channels of `left`, then those of `right`, at every pixel.
pub(crate) fn concat_channels(left: &Tensor, right: &Tensor) -> Result<Tensor> {
    Ok(Tensor::cat(&[left, right], candle_core::D::Minus1)?)
}

/// `before` zeros above and left of a (rows, channels, height, width) map, `after` below and right.
pub(super) fn pad(x: &Tensor, before: usize, after: usize) -> Result<Tensor> {
    Ok(x.pad_with_zeros(2, before, after)?.pad_with_zeros(3, before, after)?)
}

/// Resizes a feature map to `height` × `width`, each pixel from its nearest one as torch chooses it
/// (rounding down).
pub(crate) fn upsample_nearest(x: &Tensor, height: usize, width: usize) -> Result<Tensor> {
    if !x.device().is_cpu() {
        return channels_last(&channels_first(x)?.upsample_nearest2d(height, width)?);
    }
    let (rows, from_height, from_width, channels) = x.dims4()?;
    let x32 = host::as_f32(x)?;
    let x32 = host::values(&x32)?;
    let mut output = host::zeros(rows * height * width * channels)?;
    let columns: Vec<usize> = (0..width).map(|column| nearest(column, from_width, width)).collect();
    let lines_per_task = (32 * 1024 / (width * channels).max(1)).max(1);
    output.par_chunks_mut(width * channels).with_min_len(lines_per_task).enumerate().for_each(|(line, output)| {
        let (row, y) = (line / height, nearest(line % height, from_height, height));
        let start = (row * from_height + y) * from_width * channels;
        let input = &x32[start..start + from_width * channels];
        for (pixel, column) in output.chunks_exact_mut(channels).zip(&columns) {
            pixel.copy_from_slice(&input[column * channels..(column + 1) * channels]);
        }
    });
    host::tensor(output, (rows, height, width, channels), x.dtype())
}

/// Where pixel `to` of `to_len` comes from, with the scale in `f32` as torch computes it.
fn nearest(to: usize, from_len: usize, to_len: usize) -> usize {
    let scale = from_len as f32 / to_len as f32;
    ((to as f32 * scale) as usize).min(from_len - 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::reference;

    #[test]
    fn doubling_repeats_each_pixel_four_times() {
        let x = reference::tensor([2, 2, 3, 2], 1);
        let big = upsample_nearest(&x, 4, 6).unwrap();
        assert_eq!(big.dims(), [2, 4, 6, 2]);
        for (y, x_at) in (0..4).flat_map(|y| (0..6).map(move |x| (y, x))) {
            let at = |t: &Tensor, y, x| reference::values(&t.narrow(1, y, 1).unwrap().narrow(2, x, 1).unwrap());
            assert_eq!(at(&big, y, x_at), at(&x, y / 2, x_at / 2));
        }
    }

    #[test]
    fn an_odd_size_takes_the_pixels_that_torch_takes() {
        // torch.nn.functional.interpolate(arange(3), size=5) and (arange(4), size=7), mode "nearest".
        let chosen = |from, to| (0..to).map(|at| nearest(at, from, to)).collect::<Vec<_>>();
        assert_eq!(chosen(3, 5), [0, 0, 1, 1, 2]);
        assert_eq!(chosen(4, 7), [0, 0, 1, 1, 2, 2, 3]);
    }

    #[test]
    fn the_two_layouts_are_inverse() {
        let x = reference::tensor([2, 3, 4, 5], 1);
        let last = channels_last(&x).unwrap();
        assert_eq!(last.dims(), [2, 4, 5, 3]);
        assert_eq!(reference::values(&channels_first(&last).unwrap()), reference::values(&x));
    }

    #[test]
    fn concatenation_keeps_each_pixel_together() {
        let (left, right) = (reference::tensor([1, 2, 2, 2], 1), reference::tensor([1, 2, 2, 3], 2));
        let both = concat_channels(&left, &right).unwrap();
        assert_eq!(both.dims(), [1, 2, 2, 5]);
        let (left, right, both) = (reference::values(&left), reference::values(&right), reference::values(&both));
        assert_eq!(both[..5], [left[0], left[1], right[0], right[1], right[2]]);
    }
}
