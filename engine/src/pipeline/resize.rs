//! Resizing of 8-bit pictures by Lanczos' kernel, value for value as Pillow does it, which diffusers resizes
//! with: across, then down, with weights of 22 bits and a rounding to 8 bits after each.
//!
//! Reference: <https://github.com/python-pillow/Pillow/blob/12.0.0/src/libImaging/Resample.c>

use std::f64::consts::PI;

use image::RgbImage;

/// Zero crossings of the kernel on each side.
const SUPPORT: f64 = 3.0;
const PRECISION_BITS: u32 = 32 - 8 - 2;

/// A picture at another (width, height), as init images are resized; for callers that have time before the row joins.
pub fn resized(picture: RgbImage, (width, height): (u32, u32)) -> RgbImage {
    if picture.dimensions() == (width, height) || picture.is_empty() {
        return picture;
    }
    let from = (picture.width() as usize, picture.height() as usize);
    let values = lanczos(picture.as_raw(), 3, from, (width as usize, height as usize));
    RgbImage::from_raw(width, height, values).unwrap_or(picture)
}

/// (height, width, channels) values of `from` (width, height) → those of `to` (width, height).
pub(super) fn lanczos(values: &[u8], channels: usize, from: (usize, usize), to: (usize, usize)) -> Vec<u8> {
    let mut values = values.to_vec();
    if from.0 != to.0 {
        let windows = windows(from.0, to.0);
        let lines = values.chunks_exact((from.0 * channels).max(1));
        values = lines.flat_map(|line| resampled(&windows, line, channels, channels)).collect();
    }
    if from.1 == to.1 {
        return values;
    }
    // A line of the result is a weighted sum of lines.
    let line = to.0 * channels;
    resampled(&windows(from.1, to.1), &values, line, line)
}

/// The sums of each window over `values`, whose places are `stride` apart; `width` of them side by side.
fn resampled(windows: &[Window], values: &[u8], width: usize, stride: usize) -> Vec<u8> {
    let mut result = Vec::with_capacity(windows.len() * width);
    for window in windows {
        for at in 0..width {
            let places = values[window.first * stride + at..].iter().step_by(stride);
            let sum: i64 = places.zip(&window.weights).map(|(value, weight)| i64::from(*value) * weight).sum();
            let rounded = (sum + (1 << (PRECISION_BITS - 1))) >> PRECISION_BITS;
            result.push(rounded.clamp(0, 255) as u8);
        }
    }
    result
}

/// What one place of the result is made of.
struct Window {
    first: usize,
    weights: Vec<i64>,
}

fn windows(from: usize, to: usize) -> Vec<Window> {
    let scale = from as f64 / to as f64;
    let filter_scale = scale.max(1.0);
    let support = SUPPORT * filter_scale;
    let window = |place: usize| {
        let centre = (place as f64 + 0.5) * scale;
        let first = ((centre - support + 0.5) as i64).max(0) as usize;
        let end = ((centre + support + 0.5) as usize).min(from);
        let weight = |at: usize| kernel((at as f64 - centre + 0.5) * (1.0 / filter_scale));
        let total: f64 = (first..end).map(weight).sum();
        let fixed = |weight: f64| (weight / total * f64::from(1 << PRECISION_BITS)).round() as i64;
        Window { first, weights: (first..end).map(|at| fixed(weight(at))).collect() }
    };
    (0..to).map(window).collect()
}

fn kernel(x: f64) -> f64 {
    let sinc = |x: f64| if x == 0.0 { 1.0 } else { (x * PI).sin() / (x * PI) };
    if (-SUPPORT..SUPPORT).contains(&x) { sinc(x) * sinc(x / SUPPORT) } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use safetensors::SafeTensors;

    use super::*;

    #[test]
    fn resized_pictures_are_pillows_value_for_value() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/goldens/resize.safetensors");
        let bytes = std::fs::read(path).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let mut cases = 0;
        while let Ok(from) = file.tensor(&format!("{cases}.from")) {
            let to = file.tensor(&format!("{cases}.to")).unwrap();
            let size = |shape: &[usize]| (shape[1], shape[0]);
            let got = lanczos(from.data(), from.shape()[2], size(from.shape()), size(to.shape()));
            assert!(got == to.data(), "case {cases}: {:?} to {:?}", from.shape(), to.shape());
            cases += 1;
        }
        assert!(cases >= 6);
    }
}
