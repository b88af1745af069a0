//! Classifier-free guidance: away from what the negative prompt predicts, towards the prompt.
//!
//! Reference: Ho & Salimans 2022, <https://arxiv.org/abs/2207.12598>, with the weight as diffusers has it.

/// Whether a row of this scale needs its negative prompt at all.
pub(crate) fn is_guided(scale: f64) -> bool {
    scale > 1.0
}

/// negative + scale · (positive - negative), value by value.
pub(crate) fn guide(negative: &[f32], positive: &[f32], scale: f64) -> Vec<f32> {
    let scale = scale as f32;
    negative.iter().zip(positive).map(|(negative, positive)| negative + scale * (positive - negative)).collect()
}

/// guided + scale · (positive - worse), value by value: away from what a worse denoiser predicts.
pub(crate) fn push(guided: &[f32], positive: &[f32], worse: &[f32], scale: f64) -> Vec<f32> {
    let (scale, pairs) = (scale as f32, positive.iter().zip(worse));
    guided.iter().zip(pairs).map(|(guided, (positive, worse))| guided + (positive - worse) * scale).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scale_of_one_or_less_needs_no_negative_prompt() {
        assert!(!is_guided(0.0) && !is_guided(1.0));
        assert!(is_guided(1.01));
    }

    #[test]
    fn what_layers_add_is_stretched_too() {
        assert_eq!(push(&[1.0, 2.0], &[2.0, 0.5], &[1.0, 1.5], 3.0), [4.0, -1.0]);
    }

    #[test]
    fn the_scale_stretches_the_difference() {
        assert_eq!(guide(&[1.0, -1.0], &[2.0, 0.5], 3.0), [4.0, 3.5]);
    }
}
