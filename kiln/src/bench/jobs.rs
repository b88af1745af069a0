//! The jobs that a bench renders: what the demo checkpoint knows, no two the same.

use farm::spec::RenderRequest;

/// Pixels of a side.
pub const SIDE: usize = 128;
/// Denoising steps.
pub const STEPS: usize = 20;
/// Guidance scale.
pub const GUIDANCE_SCALE: f64 = 5.0;

const SIZES: [&str; 2] = ["small", "large"];
const COLOURS: [&str; 11] =
    ["red", "green", "blue", "yellow", "purple", "pink", "cyan", "brown", "white", "gray", "black"];
const SHAPES: [&str; 8] = ["circle", "square", "triangle", "star", "ring", "cross", "heart", "diamond"];

/// The prompt of job `index`, for instance `a large red star on a blue background`. Differs from those of the 1,759
/// jobs before and after, so that no text embedding is used twice in a round.
pub fn prompt(index: u64) -> String {
    let mut rest = index;
    let mut pick = |words: &[&'static str]| {
        let (word, left) = (words[(rest % words.len() as u64) as usize], rest / words.len() as u64);
        rest = left;
        word
    };
    let (shape, size, colour) = (pick(&SHAPES), pick(&SIZES), pick(&COLOURS));
    // Ten of the colours are another one than the shape's.
    let others: Vec<&str> = COLOURS.into_iter().filter(|other| *other != colour).collect();
    let background = pick(&others);
    format!("a {size} {colour} {shape} on a {background} background")
}

/// Job `index` for the checkpoint that the catalog calls `model`.
pub fn request(index: u64, model: &str) -> RenderRequest {
    RenderRequest {
        model: Some(model.to_owned()),
        prompt: Some(prompt(index)),
        width: Some(SIDE as i64),
        height: Some(SIDE as i64),
        steps: Some(STEPS as i64),
        guidance_scale: Some(GUIDANCE_SCALE),
        seed: Some(index as i64),
        ..RenderRequest::default()
    }
}

/// The same job in the engine's words.
pub fn row(index: u64) -> engine::RowRequest {
    engine::RowRequest {
        prompt: prompt(index),
        negative_prompt: String::new(),
        width: SIDE,
        height: SIDE,
        steps: STEPS,
        guidance_scale: GUIDANCE_SCALE,
        sampler: None,
        schedule: None,
        seed: index,
        ..engine::RowRequest::default()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn no_prompt_comes_twice_before_all_have_come() {
        let all: BTreeSet<_> = (0..1760).map(prompt).collect();
        assert_eq!(all.len(), 1760);
        assert_eq!(prompt(0), prompt(1760));
        assert_eq!(prompt(0), "a small red circle on a green background");
    }

    #[test]
    fn both_ways_ask_for_the_same_picture() {
        let (request, row) = (request(7, "demo"), row(7));
        assert_eq!(request.prompt, Some(row.prompt));
        assert_eq!(request.seed, Some(row.seed as i64));
        assert_eq!((request.steps, request.guidance_scale), (Some(row.steps as i64), Some(row.guidance_scale)));
        assert_eq!((request.width, request.height), (Some(row.width as i64), Some(row.height as i64)));
    }
}
