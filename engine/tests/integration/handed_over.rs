//! Rows that end in the middle of the way from noise, and rows that go on there: against diffusers, in mixed batches,
//! and refused where they cannot be.

use std::collections::BTreeMap;
use std::sync::Arc;

use engine::{InitContent, InitImage, Latent, MaskedContent, RowRequest, RunningBatch, denoise, render};
use safetensors::SafeTensors;
use serde::Deserialize;

use crate::company::in_company;
use crate::golden::Golden;
use crate::support::{checkpoint, fixtures, init, largest_difference, mask, request};

/// One row of the list.
#[derive(Deserialize)]
struct Part {
    #[serde(flatten)]
    golden: Golden,
    /// The name of the latent that it starts from.
    init_latent: Option<String>,
    /// The name of the latent that it ends in, unless it ends in a picture.
    latent: Option<String>,
}

impl Part {
    fn request(&self, latents: &BTreeMap<String, Arc<Latent>>) -> RowRequest {
        let from = self.init_latent.as_ref().map(|name| InitImage {
            content: InitContent::Latent(Arc::clone(&latents[name])),
            strength: self.golden.strength(),
            mask: self.golden.mask(),
        });
        let asked = self.golden.request();
        RowRequest { init_image: from.or(asked.init_image.clone()), ..asked }
    }
}

fn parts() -> Vec<Part> {
    let list = std::fs::read_to_string(fixtures().join("handed_over.json")).unwrap();
    serde_json::from_str(&list).unwrap()
}

/// diffusers' latents by name.
fn latents() -> BTreeMap<String, Arc<Latent>> {
    let bytes = std::fs::read(fixtures().join("goldens/handed_over.safetensors")).unwrap();
    let read = |(name, view): (&str, safetensors::tensor::TensorView)| {
        let values = view.data().chunks_exact(4).map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap()));
        (name.to_owned(), Arc::new(Latent::new(values.collect(), view.shape().try_into().unwrap()).unwrap()))
    };
    SafeTensors::deserialize(&bytes).unwrap().iter().map(read).collect()
}

/// How far apart two latents are, relative to the second one's largest value.
fn distance(got: &Latent, expected: &Latent) -> f32 {
    assert_eq!(got.shape(), expected.shape());
    let largest = |values: &mut dyn Iterator<Item = f32>| values.fold(0.0, |most: f32, value| most.max(value.abs()));
    let apart = largest(&mut got.values().iter().zip(expected.values()).map(|(a, b)| a - b));
    apart / largest(&mut expected.values().iter().copied())
}

#[test]
fn every_row_ends_in_diffusers_latent_or_picture() {
    let (parts, latents) = (parts(), latents());
    for part in &parts {
        let (checkpoint, request) = (checkpoint(&part.golden.checkpoint), part.request(&latents));
        match &part.latent {
            Some(name) => {
                let apart = distance(&denoise(&checkpoint, &request, |_, _| {}).unwrap(), &latents[name]);
                assert!(apart < 1e-4, "{name}: {apart}");
            }
            None => {
                let picture = render(&checkpoint, &request, |_, _| {}).unwrap();
                let difference = largest_difference(&picture, &part.golden.expected());
                assert!(difference <= 1, "{}: {difference}", part.golden.file);
            }
        }
    }
    assert!(parts.iter().filter(|part| part.latent.is_some()).count() >= 10);
}

#[test]
fn a_chain_of_our_own_rows_is_diffusers_picture() {
    let mut own = BTreeMap::new();
    let mut pictures = 0;
    for part in parts() {
        let (checkpoint, request) = (checkpoint(&part.golden.checkpoint), part.request(&own));
        let latent = denoise(&checkpoint, &request, |_, _| {}).unwrap();
        match part.latent {
            Some(name) => drop(own.insert(name, Arc::new(latent))),
            None => {
                let picture = checkpoint.decode(&[latent]).unwrap().remove(0);
                let difference = largest_difference(&picture, &part.golden.expected());
                assert!(difference <= 1, "{}: {difference}", part.golden.file);
                pictures += 1;
            }
        }
    }
    assert!(pictures >= 12);
}

#[test]
fn two_rows_of_one_checkpoint_take_each_call_of_one_row_once() {
    let checkpoint = checkpoint("sdxl");
    let whole = RowRequest { steps: 10, ..request("a red star") };
    let (mut calls, mut expected) = (0, 0);
    let picture = render(&checkpoint, &whole, |_, total| expected = total).unwrap();
    // Euler keeps nothing but its latent from step to step: what is handed over is all there is.
    for switch in [0.1, 0.12, 0.25, 0.5, 0.599, 0.9] {
        let first = RowRequest { denoising_end: Some(switch), ..whole.clone() };
        let latent = denoise(&checkpoint, &first, |_, total| calls = total).unwrap();
        let content = InitContent::Latent(Arc::new(latent));
        let rest = RowRequest {
            denoising_start: Some(switch),
            init_image: Some(InitImage { content, strength: 1.0, mask: None }),
            ..whole.clone()
        };
        let (before, mut after) = (calls, 0);
        assert!(picture == render(&checkpoint, &rest, |_, total| after = total).unwrap(), "{switch}");
        assert_eq!(before + after, expected, "{switch}");
        assert!(before > 0 && after > 0, "{switch}");
    }
}

/// Rows of one size that begin and end in many ways.
fn rows(latents: &BTreeMap<String, Arc<Latent>>) -> Vec<RowRequest> {
    let of = |seed, steps| RowRequest { seed, steps, ..request("a red star") };
    let from = |name: &str, mask| {
        Some(InitImage { content: InitContent::Latent(Arc::clone(&latents[name])), strength: 0.5, mask })
    };
    vec![
        of(1, 4),
        RowRequest { denoising_end: Some(0.6), ..of(2, 7) },
        RowRequest { denoising_start: Some(0.8), init_image: from("refined-00.base", None), ..of(3, 10) },
        RowRequest { init_image: init("scene.png", 0.8, Some(mask("mask.png"))), ..of(4, 5) },
        RowRequest {
            denoising_start: Some(0.4),
            denoising_end: Some(0.9),
            init_image: from("refined-09.base", Some(mask("mask.png"))),
            guidance_scale: 1.0,
            ..of(5, 9)
        },
        RowRequest { init_image: from("refined-03.base", None), ..of(6, 6) },
        RowRequest { denoising_start: Some(0.5), init_image: init("wide.png", 0.5, None), ..of(7, 4) },
    ]
}

#[test]
fn rows_that_hand_over_share_passes_with_others_and_are_the_rows_alone() {
    for name in ["sdxl", "sdxl_refiner"] {
        let (checkpoint, requests) = (checkpoint(name), rows(&latents()));
        let finished = in_company(&checkpoint, &requests, |id| id % 2 == 1);
        for (id, request) in (0..).zip(&requests) {
            let mut calls = 0;
            let alone = denoise(&checkpoint, request, |_, total| calls = total).unwrap();
            let (total, latent) = &finished[&id];
            assert!(latent.values() == alone.values(), "{name}: row {id}");
            assert_eq!(*total, calls, "{name}: row {id}");
        }
    }
}

#[test]
fn rows_that_cannot_begin_or_end_there_are_refused_by_name() {
    let refusal = |name: &str, request: RowRequest| {
        RunningBatch::new(checkpoint(name), 64, 64).join(1, &request).unwrap_err().to_string()
    };
    let plain = || RowRequest { steps: 10, ..request("a star") };
    let latent = |shape: [usize; 3]| {
        let latent = Latent::new(vec![0.5; shape.iter().product()], shape).unwrap();
        Some(InitImage { content: InitContent::Latent(Arc::new(latent)), strength: 0.5, mask: None })
    };
    for share in [0.0, 1.0, -0.2, f64::NAN] {
        let text = refusal("sdxl", RowRequest { denoising_end: Some(share), ..plain() });
        assert!(text.starts_with("`denoising_end` must be above 0 and below 1, but is"), "{text}");
    }
    let going_on = |start| RowRequest { denoising_start: Some(start), init_image: latent([4, 8, 8]), ..plain() };
    let noise = engine::Mask { content: MaskedContent::Noise, ..mask("mask.png") };
    for (name, request, expected) in [
        (
            "sdxl",
            RowRequest { denoising_end: Some(0.001), ..plain() },
            "`denoising_end` must be so much that of 10 steps at least one is left, but is 0.001",
        ),
        (
            "sdxl",
            RowRequest { denoising_start: Some(0.5), ..plain() },
            "`denoising_start` must be absent without an init image, but is 0.5",
        ),
        ("sdxl", going_on(1.5), "`denoising_start` must be above 0 and below 1, but is 1.5"),
        (
            "sdxl",
            going_on(0.9995),
            "`denoising_start` must be so little that of 10 steps at least one is left, but is 0.9995",
        ),
        (
            "sdxl",
            RowRequest { denoising_end: Some(0.4), ..going_on(0.4) },
            "`denoising_start` must be below `denoising_end`, which is 0.4, but is 0.4",
        ),
        (
            "sdxl",
            RowRequest { init_image: latent([4, 8, 16]), ..going_on(0.4) },
            "`init_image` must be a latent of 4 × 8 × 8, as the row's `width` and `height` ask for, but is 4 × 8 × 16",
        ),
        (
            "sdxl",
            RowRequest { init_image: init("scene.png", 1.0, Some(noise)), ..going_on(0.4) },
            "`masked_content` must be original with `denoising_start`, but is noise",
        ),
        (
            "sd1",
            RowRequest { denoising_end: Some(0.5), ..plain() },
            "`denoising_end` must be absent for this checkpoint's family, but is 0.5",
        ),
        (
            "sd3",
            RowRequest { denoising_start: Some(0.5), init_image: init("scene.png", 1.0, None), ..plain() },
            "`denoising_start` must be absent for this checkpoint's family, but is 0.5",
        ),
        (
            "flux_dev",
            RowRequest { init_image: latent([16, 8, 8]), ..plain() },
            "`init_image` must be a picture for this checkpoint's family, but is a latent",
        ),
    ] {
        assert_eq!(refusal(name, request), expected);
    }
}

#[test]
fn a_latent_is_as_many_finite_numbers_as_its_shape_says() {
    for (values, shape) in [(vec![0.0; 7], [2, 2, 2]), (vec![], [0, 4, 4]), (vec![1.0], [usize::MAX, 2, 1])] {
        let text = Latent::new(values, shape).unwrap_err().to_string();
        assert!(text.starts_with("`init_image` must be"), "{text}");
    }
    let text = Latent::new(vec![0.0, f32::NAN], [1, 1, 2]).unwrap_err().to_string();
    assert_eq!(text, "`init_image` must be finite numbers, but is a latent with others");
}
