//! Whole pictures against diffusers': the same seed gives the same picture.

use std::collections::BTreeMap;

use engine::{MicroConditioning, RowRequest, SkipLayerGuidance, render};
use serde::Deserialize;

use crate::support::{CHECKPOINTS, checkpoint, fixtures, largest_difference};

/// One entry of `pictures.json` or of a family's list in `pictures/`.
#[derive(Deserialize)]
struct Golden {
    checkpoint: String,
    file: String,
    prompt: String,
    negative_prompt: String,
    width: usize,
    height: usize,
    steps: usize,
    guidance_scale: f64,
    sampler: Option<String>,
    schedule: Option<String>,
    seed: u64,
    #[serde(default)]
    original_size: Option<(usize, usize)>,
    #[serde(default)]
    crop: (usize, usize),
    #[serde(default)]
    target_size: Option<(usize, usize)>,
    skip_layer_guidance: Option<SkipLayers>,
    max_sequence_length: Option<usize>,
}

/// Skip-layer guidance as the list has it.
#[derive(Clone, Deserialize)]
struct SkipLayers {
    layers: Vec<usize>,
    scale: f64,
    start: f64,
    stop: f64,
}

impl SkipLayers {
    fn asked(self) -> SkipLayerGuidance {
        let Self { layers, scale, start, stop } = self;
        SkipLayerGuidance { layers, scale, start, stop }
    }
}

impl Golden {
    fn request(&self) -> RowRequest {
        RowRequest {
            prompt: self.prompt.clone(),
            negative_prompt: self.negative_prompt.clone(),
            width: self.width,
            height: self.height,
            steps: self.steps,
            guidance_scale: self.guidance_scale,
            sampler: self.sampler.as_deref().map(|word| word.parse().unwrap()),
            schedule: self.schedule.as_deref().map(|word| word.parse().unwrap()),
            seed: self.seed,
            micro_conditioning: MicroConditioning {
                original_size: self.original_size,
                crop: self.crop,
                target_size: self.target_size,
            },
            skip_layer_guidance: self.skip_layer_guidance.clone().map(SkipLayers::asked),
            max_sequence_length: self.max_sequence_length,
            ..RowRequest::default()
        }
    }
}

fn goldens() -> Vec<Golden> {
    let listed = std::fs::read_dir(fixtures().join("pictures")).unwrap().map(|entry| entry.unwrap().path());
    let lists = listed.filter(|path| path.extension().is_some_and(|extension| extension == "json"));
    let read = |path| serde_json::from_str::<Vec<Golden>>(&std::fs::read_to_string(path).unwrap()).unwrap();
    lists.chain([fixtures().join("pictures.json")]).flat_map(read).collect()
}

#[test]
fn every_picture_is_at_most_one_level_off_diffusers() {
    let goldens = goldens();
    let mut worst: BTreeMap<&str, (u8, usize)> = BTreeMap::new();
    let mut off = Vec::new();
    for golden in &goldens {
        let path = fixtures().join("pictures").join(&golden.file);
        let expected = image::open(path).unwrap().into_rgb8();
        let got = render(&checkpoint(&golden.checkpoint), &golden.request(), |_, _| {}).unwrap();
        let difference = largest_difference(&got, &expected);
        let entry = worst.entry(&golden.checkpoint).or_default();
        *entry = (entry.0.max(difference), entry.1 + 1);
        if difference > 1 {
            off.push(format!("{} by {difference}", golden.file));
        }
    }
    println!("largest difference and number of pictures per checkpoint: {worst:?}");
    assert!(off.is_empty(), "more than one level off: {off:?}");
    assert!(CHECKPOINTS.iter().all(|name| worst.contains_key(name)), "a checkpoint has no pictures: {worst:?}");
}
