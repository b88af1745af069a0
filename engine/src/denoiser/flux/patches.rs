//! Latents as tokens and back, and where a token lies.
//!
//! Reference: <https://github.com/huggingface/diffusers/blob/v0.36.0/src/diffusers/pipelines/flux/pipeline_flux.py>
//! (`_pack_latents`, `_prepare_latent_image_ids`) and `models/embeddings.py` (`get_1d_rotary_pos_embed`).

use super::config::SIDE;

/// The base of the angles' frequencies.
const THETA: f64 = 10_000.0;

/// Latents (rows, channels, height, width) as (rows, patches, channels · SIDE · SIDE), patches line by line;
/// height and width are whole patches.
pub(super) fn pack(latents: &[f32], [rows, channels, height, width]: [usize; 4]) -> Vec<f32> {
    let mut tokens = vec![0.0; latents.len()];
    for_each_value([rows, channels, height, width], |latent, token| tokens[token] = latents[latent]);
    tokens
}

/// The opposite of [`pack`].
pub(super) fn unpack(tokens: &[f32], [rows, channels, height, width]: [usize; 4]) -> Vec<f32> {
    let mut latents = vec![0.0; tokens.len()];
    for_each_value([rows, channels, height, width], |latent, token| latents[latent] = tokens[token]);
    latents
}

/// Where each value lies in latents, and where among tokens.
fn for_each_value([rows, channels, height, width]: [usize; 4], mut place: impl FnMut(usize, usize)) {
    let (down, across) = (height / SIDE, width / SIDE);
    let mut latent = 0;
    for row in 0..rows {
        for channel in 0..channels {
            for y in 0..height {
                for x in 0..width {
                    let patch = (row * down + y / SIDE) * across + x / SIDE;
                    place(latent, ((patch * channels + channel) * SIDE + y % SIDE) * SIDE + x % SIDE);
                    latent += 1;
                }
            }
        }
    }
}

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
    fn a_patch_holds_its_values_channel_by_channel_and_line_by_line() {
        let dims = [2, 3, 4, 6];
        let latents: Vec<f32> = (0..2 * 3 * 4 * 6).map(|value| value as f32).collect();
        let tokens = pack(&latents, dims);
        // The second patch of the second line of the second row.
        let first = 72 + 2 * 6 + 2;
        let of_channel = |channel: usize| [0, 1, 6, 7].map(|at| (first + 24 * channel + at) as f32);
        assert_eq!(tokens[(6 + 4) * 12..(6 + 5) * 12], [of_channel(0), of_channel(1), of_channel(2)].concat());
        assert_eq!(unpack(&tokens, dims), latents);
    }

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
