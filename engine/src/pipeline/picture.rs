//! From a decoder's numbers to eight bits, and from eight bits to an encoder's numbers.

use image::RgbImage;

use crate::{Error, Result, RowId};

/// A picture from (height, width, 3) values of about -1 to 1, rounded as diffusers does: half to even.
pub(super) fn from_values(values: &[f32], width: usize, height: usize, row: RowId) -> Result<RgbImage> {
    if !values.iter().all(|value| value.is_finite()) {
        return Err(Error::NotFinite { row });
    }
    let bytes =
        values.iter().map(|value| ((value / 2.0 + 0.5).clamp(0.0, 1.0) * 255.0).round_ties_even() as u8).collect();
    let side = |pixels: usize| u32::try_from(pixels).map_err(|_| Error::request("width", "a side below 2^32", pixels));
    RgbImage::from_raw(side(width)?, side(height)?, bytes)
        .ok_or_else(|| Error::Device(candle_core::Error::Msg("a decoded picture has the wrong size".to_owned())))
}

/// Eight bits as values from -1 to 1.
pub(super) fn to_values(bytes: &[u8]) -> Vec<f32> {
    bytes.iter().map(|byte| 2.0 * (f32::from(*byte) / 255.0) - 1.0).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_clamped_and_rounded_half_to_even() {
        // 0.5 / 255 and 1.5 / 255 of full scale lie exactly between two bytes.
        let between = |byte: f32| 2.0 * ((byte + 0.5) / 255.0) - 1.0;
        let picture = from_values(&[-7.0, 7.0, 0.0, -1.0, 1.0, between(1.0)], 2, 1, 0).unwrap();
        assert_eq!(picture.into_raw()[..5], [0, 255, 128, 0, 255]);
    }

    #[test]
    fn bytes_become_values_and_back() {
        let bytes: Vec<u8> = (0..=254).collect();
        let picture = from_values(&to_values(&bytes), 85, 1, 0).unwrap();
        assert_eq!(picture.into_raw(), bytes);
    }

    #[test]
    fn a_value_that_is_not_finite_names_its_row() {
        let error = from_values(&[0.0, f32::NAN, 0.0], 1, 1, 42).unwrap_err();
        assert!(matches!(error, Error::NotFinite { row: 42 }));
    }
}
