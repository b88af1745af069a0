//! The pictures of all families where other kernels than ours compute: on a GPU and, on every machine, in its stead on
//! the processor. Rows share their passes as far as they can.

use std::collections::BTreeMap;
use std::sync::Arc;

use engine::{Checkpoint, Device, DeviceChoice, Precision, RowRequest, render};
use image::RgbImage;

use crate::company::{decode, in_company};
use crate::flux::{T5, TRANSFORMER, with_gguf};
use crate::golden::{self, Golden};
use crate::pictures;
use crate::support::{fixtures, folder, init, largest_difference, psnr, request};

/// How far a checkpoint's pictures may be from diffusers'.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Tolerance {
    /// One level of 255 at any pixel.
    Level,
    /// Decibels of signal to noise at least, for formats of 16 bits: 35 for trained weights, 18 for random ones, which
    /// amplify what is rounded. The processor's own kernels reach 39.9 and 20.9 in `bf16`.
    Decibels,
}

impl Tolerance {
    fn allows(self, checkpoint: &str, levels: u8, decibels: f64) -> bool {
        match self {
            Self::Level => levels <= 1,
            Self::Decibels => decibels >= if checkpoint == "demo" { 35.0 } else { 18.0 },
        }
    }
}

/// Every device and number format that there is, and how many of a checkpoint's batches to try there.
fn places() -> Vec<(Device, Precision, Tolerance, usize)> {
    // It is slow.
    let mut places = vec![(Device::elsewhere(), Precision::F32, Tolerance::Level, 1)];
    for choice in [DeviceChoice::Cuda(0), DeviceChoice::Metal] {
        match Device::open(choice) {
            Ok(device) => {
                let half = Precision::default_for(&device);
                places.push((device.clone(), Precision::F32, Tolerance::Level, usize::MAX));
                places.push((device, half, Tolerance::Decibels, usize::MAX));
            }
            Err(error) => println!("{choice} is left out: {error}"),
        }
    }
    places
}

/// Every picture that diffusers made.
fn goldens() -> Vec<Golden> {
    let lists = ["flux_pictures.json", "init_pictures.json"].map(|list| golden::read(&fixtures().join(list)));
    lists.into_iter().flatten().chain(pictures::goldens()).collect()
}

fn load(checkpoint: &str, device: &Device, precision: Precision) -> Arc<Checkpoint> {
    let quantised = (checkpoint == "flux_gguf").then(|| with_gguf(&[TRANSFORMER, T5]));
    let path = quantised.as_ref().map_or_else(|| folder(checkpoint), |quantised| quantised.path().to_owned());
    Arc::new(Checkpoint::load(&path, device, precision).unwrap())
}

/// Pictures of one size in one running batch.
fn render_together(checkpoint: &Arc<Checkpoint>, goldens: &[&Golden]) -> Vec<RgbImage> {
    let requests: Vec<RowRequest> = goldens.iter().map(|golden| golden.request()).collect();
    decode(checkpoint, in_company(checkpoint, &requests, |_| false))
}

/// The pictures of each checkpoint, those of one size together, the most first.
fn batches(goldens: &[Golden]) -> BTreeMap<&str, Vec<Vec<&Golden>>> {
    let mut sizes: BTreeMap<(&str, usize, usize), Vec<&Golden>> = BTreeMap::new();
    for golden in goldens {
        sizes.entry((&golden.checkpoint, golden.width, golden.height)).or_default().push(golden);
    }
    let mut batches: BTreeMap<&str, Vec<Vec<&Golden>>> = BTreeMap::new();
    for ((checkpoint, ..), batch) in sizes {
        batches.entry(checkpoint).or_default().push(batch);
    }
    batches.values_mut().for_each(|batches| batches.sort_by_key(|batch| std::cmp::Reverse(batch.len())));
    batches
}

#[test]
fn pictures_are_those_of_diffusers_on_every_device() {
    let goldens = goldens();
    for (device, precision, tolerance, most) in places() {
        let (mut worst, mut off) = (Vec::new(), Vec::new());
        for (name, batches) in batches(&goldens) {
            let checkpoint = load(name, &device, precision);
            let (mut most_levels, mut least_decibels, mut count) = (0, f64::INFINITY, 0);
            for batch in batches.iter().take(most) {
                for (golden, picture) in batch.iter().zip(render_together(&checkpoint, batch)) {
                    let expected = golden.expected();
                    let (levels, decibels) = (largest_difference(&picture, &expected), psnr(&picture, &expected));
                    if !tolerance.allows(name, levels, decibels) {
                        off.push(format!("{} of {name} by {levels} levels, {decibels:.1} dB", golden.file));
                    }
                    (most_levels, least_decibels) = (levels.max(most_levels), decibels.min(least_decibels));
                    count += 1;
                }
            }
            worst.push(format!("{name}: {count} pictures, at most {most_levels} off, at least {least_decibels:.1} dB"));
        }
        let place = format!("{} in {precision}", device.describe());
        println!("{place}: {worst:#?}");
        assert!(off.is_empty(), "{place}: beyond {tolerance:?}: {off:#?}");
    }
}

#[test]
fn the_vae_s_bands_make_the_same_pictures_on_every_device() {
    for (device, precision, tolerance, _) in places() {
        let picture = |bytes| {
            let checkpoint = Checkpoint::load(&folder("demo"), &device, precision).unwrap().with_vae_bytes(bytes);
            let init_image = init("scene.png", 0.5, None);
            let request = RowRequest { width: 128, height: 96, init_image, ..request("a ring") };
            render(&Arc::new(checkpoint), &request, |_, _| {}).unwrap()
        };
        let (whole, bands) = (picture(None), picture(Some(1 << 18)));
        let (levels, decibels) = (largest_difference(&bands, &whole), psnr(&bands, &whole));
        let place = format!("{} in {precision}", device.describe());
        assert!(tolerance.allows("demo", levels, decibels), "{place}: {levels} levels off, {decibels:.1} dB");
    }
}
