//! Where a token lies in the picture: a square table of sines and cosines, of which a picture takes the middle.
//!
//! Reference: <https://github.com/huggingface/diffusers/blob/v0.36.0/src/diffusers/models/embeddings.py>
//! (`PatchEmbed`, `get_2d_sincos_pos_embed`).

use crate::{Error, Result};

/// (side, side, width): a vector for each place of the largest picture.
pub(super) struct Positions {
    values: Vec<f32>,
    side: usize,
    width: usize,
}

impl Positions {
    /// A checkpoint's table.
    pub fn stored(values: Vec<f32>, side: usize, width: usize) -> Self {
        Self { values, side, width }
    }

    /// The table that checkpoints store: of the coordinates across, then of those down, in units such that the
    /// largest picture has as many as the one of `base` tokens a side.
    pub fn computed(side: usize, base: usize, width: usize) -> Self {
        let unit = (side as f64 / base as f64) as f32;
        let coordinates: Vec<f64> = (0..side).map(|place| f64::from(place as f32 / unit)).collect();
        let (half, quarter) = (width / 2, width / 4);
        let frequencies: Vec<f64> =
            (0..quarter).map(|index| 1.0 / 10_000f64.powf(index as f64 / (half as f64 / 2.0))).collect();
        let waves = |coordinate: f64| {
            let sines = frequencies.iter().map(move |frequency| (coordinate * frequency).sin() as f32);
            sines.chain(frequencies.iter().map(move |frequency| (coordinate * frequency).cos() as f32))
        };
        let places = coordinates.iter().flat_map(|down| coordinates.iter().map(move |across| (*across, *down)));
        let values = places.flat_map(|(across, down)| waves(across).chain(waves(down))).collect();
        Self { values, side, width }
    }

    /// The vectors of a picture of so many tokens, line by line, once for each of `rows`.
    pub fn of(&self, rows: usize, height: usize, width: usize) -> Result<Vec<f32>> {
        for (field, tokens) in [("height", height), ("width", width)] {
            if tokens > self.side {
                let limit = format!("at most {} tokens of the denoiser's", self.side);
                return Err(Error::request(field, limit, tokens));
            }
        }
        let (top, left) = ((self.side - height) / 2, (self.side - width) / 2);
        let lines = (top..top + height).map(|line| (line * self.side + left) * self.width);
        let picture: Vec<f32> =
            lines.flat_map(|start| &self.values[start..start + width * self.width]).copied().collect();
        Ok(picture.repeat(rows))
    }

    #[cfg(test)]
    pub fn values(&self) -> &[f32] {
        &self.values
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_picture_takes_the_middle_of_the_table() {
        let table = Positions::stored((0..5 * 5 * 2).map(|value| value as f32).collect(), 5, 2);
        // Two lines from the second, three places from the second.
        assert_eq!(table.of(1, 2, 3).unwrap(), [12., 13., 14., 15., 16., 17., 22., 23., 24., 25., 26., 27.]);
        assert_eq!(table.of(2, 1, 1).unwrap(), [24., 25., 24., 25.]);
        assert_eq!(table.of(1, 5, 5).unwrap().len(), 50);
    }

    #[test]
    fn a_picture_larger_than_the_table_is_refused() {
        let table = Positions::computed(4, 2, 8);
        let error = table.of(1, 4, 5).unwrap_err().to_string();
        assert_eq!(error, "`width` must be at most 4 tokens of the denoiser's, but is 5");
        assert!(table.of(1, 5, 4).is_err());
    }
}
