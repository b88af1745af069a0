//! Pictures that start from pictures: against diffusers, in mixed batches, and refused where they cannot be.

use std::sync::Arc;

use engine::{Checkpoint, Device, DeviceChoice, InitContent, InitImage, Mask, MaskedContent, Precision};
use engine::{RowRequest, RunningBatch, gray, render};
use image::RgbImage;

use crate::company::{decode, in_company};
use crate::golden;
use crate::support::{checkpoint, fixtures, folder, init, largest_difference, mask, request};

#[test]
fn every_picture_is_at_most_one_level_off_diffusers() {
    let goldens = golden::read(&fixtures().join("init_pictures.json"));
    let mut off = Vec::new();
    for golden in &goldens {
        let difference = golden.difference(&checkpoint(&golden.checkpoint));
        if difference > 1 {
            off.push(format!("{} ({}) by {difference}", golden.file, golden.checkpoint));
        }
    }
    assert!(off.is_empty(), "more than one level off: {off:?}");
    assert!(goldens.len() >= 20);
}

/// Rows with and without init image and mask, of one size.
fn rows() -> Vec<RowRequest> {
    let soft = Mask { blur: 4.0, content: MaskedContent::Noise, ..mask("mask.png") };
    let of = |seed, steps, init_image| RowRequest { seed, steps, init_image, ..request("a red star") };
    vec![
        of(1, 4, None),
        of(2, 6, init("scene.png", 0.5, None)),
        of(3, 5, init("scene.png", 0.8, Some(mask("mask.png")))),
        of(4, 3, init("wide.png", 1.0, Some(mask("wide_mask.png")))),
        of(5, 5, init("scene.png", 0.6, Some(soft))),
        RowRequest { guidance_scale: 1.0, ..of(6, 7, init("wide.png", 0.3, None)) },
    ]
}

fn rows_in_company_are_the_rows_alone(name: &str) {
    let (checkpoint, requests) = (checkpoint(name), rows());
    let pictures = decode(&checkpoint, in_company(&checkpoint, &requests, |id| id % 2 == 1));
    assert_eq!(pictures.len(), requests.len());
    for ((id, request), picture) in (0..).zip(&requests).zip(&pictures) {
        let mut steps = 0;
        assert!(picture == &render(&checkpoint, request, |_, _| steps += 1).unwrap(), "{name}: row {id}");
        let strength = request.init_image.as_ref().map_or(1.0, |init| init.strength);
        let least = (request.steps as f64 * strength) as usize;
        assert!((least..=least + 1).contains(&steps), "{name}: {steps} calls for row {id}");
    }
}

#[test]
fn rows_with_and_without_init_images_share_a_pass_and_are_the_rows_alone() {
    for name in ["sd1", "one_layer", "bf16", "inpaint", "sdxl", "sdxl_inpaint", "sd3", "flux_dev"] {
        rows_in_company_are_the_rows_alone(name);
    }
}

#[test]
fn a_plain_checkpoint_keeps_what_the_mask_leaves_and_paints_the_rest() {
    let checkpoint = checkpoint("demo");
    let of = |blur, content| {
        let mask = Mask { blur, content, ..mask("mask.png") };
        RowRequest { width: 128, height: 128, init_image: init("scene.png", 0.8, Some(mask)), ..request("a red star") }
    };
    let sharp = render(&checkpoint, &of(0.0, MaskedContent::Original), |_, _| {}).unwrap();
    // What the VAE alone makes of the picture's corner.
    let kept = RowRequest {
        init_image: init(
            "scene.png",
            0.8,
            Some(Mask { picture: Arc::new(image::GrayImage::new(64, 64)), ..mask("mask.png") }),
        ),
        ..of(0.0, MaskedContent::Original)
    };
    let kept = render(&checkpoint, &kept, |_, _| {}).unwrap();
    let apart = |a: &RgbImage, b: &RgbImage, x, y| {
        let (a, b) = (a.get_pixel(x, y).0, b.get_pixel(x, y).0);
        (0..3).map(|channel| a[channel].abs_diff(b[channel])).max().unwrap()
    };
    assert!(apart(&sharp, &kept, 2, 2) <= 16, "the corner has changed by {}", apart(&sharp, &kept, 2, 2));
    assert!(largest_difference(&sharp, &kept) > 60, "nothing was painted");
    for other in [of(6.0, MaskedContent::Original), of(0.0, MaskedContent::Noise)] {
        assert!(render(&checkpoint, &other, |_, _| {}).unwrap() != sharp, "{:?}", other.init_image);
    }
}

#[test]
fn an_inpainting_denoiser_sees_its_mask() {
    let checkpoint = checkpoint("inpaint");
    let of = |mask| RowRequest { init_image: init("scene.png", 1.0, mask), ..request("a red star") };
    let pictures: Vec<RgbImage> = [Some(mask("mask.png")), Some(mask("wide_mask.png")), None]
        .into_iter()
        .map(|mask| render(&checkpoint, &of(mask), |_, _| {}).unwrap())
        .collect();
    assert!(checkpoint.inpaints());
    assert!(largest_difference(&pictures[0], &pictures[1]) > 2);
    assert!(largest_difference(&pictures[0], &pictures[2]) > 2);
}

#[test]
fn memory_for_the_vae_shows_in_no_bit_of_a_picture() {
    let device = Device::open(DeviceChoice::Cpu).unwrap();
    let load = |bytes| {
        let checkpoint = Checkpoint::load(&folder("demo"), &device, Precision::F32).unwrap();
        Arc::new(checkpoint.with_vae_bytes(bytes))
    };
    let request = RowRequest { width: 256, height: 192, init_image: init("scene.png", 0.5, None), ..request("a ring") };
    let whole = render(&load(Some(1 << 30)), &request, |_, _| {}).unwrap();
    assert!(whole == render(&load(Some(1 << 20)), &request, |_, _| {}).unwrap());
    assert!(whole == render(&load(None), &request, |_, _| {}).unwrap());
}

#[test]
fn init_images_that_cannot_be_are_refused_by_name() {
    let refusal = |init: InitImage| {
        let mut batch = RunningBatch::new(checkpoint("sd1"), 64, 64);
        batch.join(1, &RowRequest { init_image: Some(init), ..request("a star") }).unwrap_err().to_string()
    };
    let whole = || init("scene.png", 0.5, None).unwrap();
    for strength in [0.0, -1.0, 1.5, f64::NAN] {
        let text = refusal(InitImage { strength, ..whole() });
        assert!(text.starts_with("`strength` must be above 0 and at most 1, but is"), "{text}");
    }
    assert_eq!(
        refusal(InitImage { strength: 0.2, ..whole() }),
        "`strength` must be so much that of 4 steps at least one is left, but is 0.2"
    );
    let masked = |mask| refusal(InitImage { mask: Some(mask), ..whole() });
    for blur in [-1.0, 257.0, f64::NAN] {
        let text = masked(Mask { blur, ..mask("mask.png") });
        assert!(text.starts_with("`mask_blur` must be 0 to 256 pixels, but is"), "{text}");
    }
    let nothing = || Arc::new(RgbImage::new(0, 3));
    let text = refusal(InitImage { content: InitContent::Picture(nothing()), ..whole() });
    assert!(text.starts_with("`init_image` must be a picture with pixels"), "{text}");
    let text = masked(Mask { picture: Arc::new(gray(&nothing())), ..mask("mask.png") });
    assert!(text.starts_with("`mask_image` must be"), "{text}");
}
