//! Masks: which parts of an init image are painted anew.

use image::GrayImage;

use super::resize;
use crate::Mask;

/// A mask at a picture's size.
pub(super) struct Painted {
    width: usize,
    /// How much of each pixel is painted anew, 0 to 1: at the edges of a blurred mask something between.
    shares: Vec<f32>,
}

impl Painted {
    /// The mask of a row, resized where it has another size, then blurred, or all or nothing without a blur.
    pub fn new(mask: &Mask, (width, height): (usize, usize)) -> Self {
        let from = (mask.picture.width() as usize, mask.picture.height() as usize);
        let bytes = resize::lanczos(mask.picture.as_raw(), 1, from, (width, height));
        let mut shares: Vec<f32> = bytes.into_iter().map(|byte| f32::from(byte) / 255.0).collect();
        if mask.blur > 0.0 {
            shares = blurred(&shares, (width, height), mask.blur);
        } else {
            shares.iter_mut().for_each(|share| *share = f32::from(*share >= 0.5));
        }
        Self { width, shares }
    }

    /// All of a picture.
    pub fn all((width, height): (usize, usize)) -> Self {
        Self { width, shares: vec![1.0; width * height] }
    }

    /// Takes what is painted anew out of (height, width, 3) values: zeros.
    pub fn cover(&self, values: &mut [f32]) {
        for (pixel, share) in values.chunks_exact_mut(3).zip(&self.shares) {
            if *share >= 0.5 {
                pixel.fill(0.0);
            }
        }
    }

    /// The shares of a latent's values, each that of its first pixel.
    pub fn of_latent(&self, factor: usize) -> Vec<f32> {
        let lines = self.shares.chunks_exact(self.width).step_by(factor);
        lines.flat_map(|line| line.iter().step_by(factor).copied()).collect()
    }
}

/// A Gaussian blur of `deviation` pixels; beyond its edges a map goes on as at them.
fn blurred(values: &[f32], (width, height): (usize, usize), deviation: f64) -> Vec<f32> {
    let reach = (3.0 * deviation).ceil() as usize;
    let weight = |at: usize| (-((at as f64 - reach as f64) / deviation).powi(2) / 2.0).exp();
    let weights: Vec<f64> = (0..=2 * reach).map(weight).collect();
    let total: f64 = weights.iter().sum();
    let along = |values: &[f32], len: usize, stride: usize, first: usize, at: usize| -> f32 {
        let place = |offset: usize| (at + offset).saturating_sub(reach).min(len - 1);
        let each = weights.iter().enumerate();
        let sum: f64 = each.map(|(offset, weight)| weight * f64::from(values[first + place(offset) * stride])).sum();
        (sum / total) as f32
    };
    let lines = (0..height).flat_map(|y| (0..width).map(move |x| (x, y)));
    let across: Vec<f32> = lines.clone().map(|(x, y)| along(values, width, 1, y * width, x)).collect();
    lines.map(|(x, y)| along(&across, height, width, x, y)).collect()
}

/// A mask of one byte per pixel, as Pillow makes it of colours.
pub fn gray(picture: &image::RgbImage) -> GrayImage {
    let share = |pixel: &image::Rgb<u8>| {
        let [red, green, blue] = pixel.0.map(u32::from);
        ((red * 19_595 + green * 38_470 + blue * 7_471 + 0x8000) >> 16) as u8
    };
    GrayImage::from_fn(picture.width(), picture.height(), |x, y| image::Luma([share(picture.get_pixel(x, y))]))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::MaskedContent;

    /// The right half of 16 × 8 pixels.
    fn half(blur: f64) -> Mask {
        let picture = GrayImage::from_fn(16, 8, |x, _| image::Luma([if x < 8 { 100 } else { 200 }]));
        Mask { picture: Arc::new(picture), blur, content: MaskedContent::Original }
    }

    #[test]
    fn a_mask_is_all_or_nothing_and_a_blurred_one_has_soft_edges() {
        let sharp = Painted::new(&half(0.0), (16, 8));
        assert_eq!(sharp.of_latent(4)[..4], [0.0, 0.0, 1.0, 1.0]);
        assert_eq!(sharp.of_latent(4).len(), 8);
        let soft = Painted::new(&half(2.0), (16, 8)).of_latent(2);
        assert!(soft.windows(2).take(7).all(|pair| pair[0] <= pair[1]), "{soft:?}");
        assert!((soft[0] - 100.0 / 255.0).abs() < 0.02 && (soft[7] - 200.0 / 255.0).abs() < 0.02, "{soft:?}");
        assert!(soft[3] > soft[0] + 0.05 && soft[4] < soft[7] - 0.05, "{soft:?}");
    }

    #[test]
    fn what_is_painted_is_covered() {
        let mut values = vec![0.7; 16 * 8 * 3];
        Painted::new(&half(0.0), (16, 8)).cover(&mut values);
        assert_eq!((values[7 * 3], values[8 * 3]), (0.7, 0.0));
        Painted::all((16, 8)).cover(&mut values);
        assert!(values.iter().all(|value| *value == 0.0));
    }

    #[test]
    fn colours_become_gray_as_in_pillow() {
        // Image.new("RGB", (1, 1), colour).convert("L")
        for (colour, expected) in [([255, 0, 0], 76), ([0, 255, 0], 150), ([0, 0, 255], 29), ([255, 255, 255], 255)] {
            assert_eq!(gray(&image::RgbImage::from_pixel(1, 1, image::Rgb(colour))).into_raw(), [expected]);
        }
    }
}
