//! Where tokens lie, as angles.
//!
//! Reference: <https://github.com/huggingface/diffusers/blob/v0.36.0/src/diffusers/pipelines/flux/pipeline_flux.py>
//! (`_prepare_latent_image_ids`) and `models/embeddings.py` (`get_1d_rotary_pos_embed`).

/// The base of the angles' frequencies.
const THETA: f64 = 10_000.0;

/// The angles (tokens, half of the sum of `axes`) of `text` tokens, which all lie at the origin, and of
/// `down` × `across` patches, whose places are (0, line, column).
pub(super) fn angles(axes: &[usize], text: usize, [down, across]: [usize; 2]) -> Vec<f64> {
    let frequencies: Vec<(usize, f64)> = axes
        .iter()
        .enumerate()
        .flat_map(|(axis, width)| {
            (0..*width).step_by(2).map(move |at| (axis, THETA.powf(-(at as f64) / *width as f64)))
        })
        .collect();
    let patches = (0..down).flat_map(|line| (0..across).map(move |column| [0, line, column]));
    let places = std::iter::repeat_n([0; 3], text).chain(patches);
    places.flat_map(|place| frequencies.iter().map(move |(axis, frequency)| place[*axis] as f64 * frequency)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_lie_at_the_origin_and_patches_on_a_grid() {
        let angles = angles(&[2, 4, 2], 2, [2, 3]);
        assert_eq!(angles.len(), (2 + 6) * 4);
        assert!(angles[..8].iter().all(|angle| *angle == 0.0));
        let last = &angles[7 * 4..];
        assert_eq!((last[0], last[1], last[3]), (0.0, 1.0, 2.0));
        assert!((last[2] - 0.01).abs() < 1e-15);
    }
}
