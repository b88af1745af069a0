//! The VAE both ways, whole and in bands.

use candle_core::{DType, Device};
use safetensors::SafeTensors;

use super::{CHECKPOINTS, Goldens, difference, dims4, folder, numbers};
use crate::noise::NoiseSource;
use crate::ops::{self, Place};
use crate::vae::Vae;

/// The seed of `vae.py`.
const SEED: u64 = 707;

fn vae(checkpoint: &str) -> Vae {
    vae_at(checkpoint, &Place::host())
}

fn vae_at(checkpoint: &str, place: &Place) -> Vae {
    Vae::load(folder(checkpoint).join("vae"), place).unwrap()
}

/// A golden picture as (height, width, 3) values, and its sides.
fn picture(goldens: &Goldens, name: &str) -> Option<(Vec<f32>, (usize, usize))> {
    let file = SafeTensors::deserialize(&goldens.bytes).unwrap();
    let view = file.tensor(name).ok()?;
    let values = view.data().iter().map(|byte| 2.0 * (f32::from(*byte) / 255.0) - 1.0).collect();
    Some((values, (view.shape()[1], view.shape()[2])))
}

#[test]
fn encoded_pictures_equal_those_of_diffusers() {
    let goldens = Goldens::read("vae");
    for checkpoint in CHECKPOINTS.into_iter().chain(["vae16"]) {
        let (vae, mut pictures) = (vae(checkpoint), 0);
        while let Some((values, size)) = picture(&goldens, &format!("{checkpoint}.{pictures}.picture")) {
            let expected = |what| goldens.tensor(&format!("{checkpoint}.{pictures}.{what}")).unwrap();
            let encoded = vae.encode(&values, size, usize::MAX).unwrap();
            for (got, what) in [(&encoded.mean, "mean"), (&encoded.log_variance, "logvar")] {
                let off = difference(got, &expected(what));
                assert!(off < 3e-5, "{checkpoint}: {what} of picture {pictures} is off by {off}");
            }
            let mut latent = encoded.sample(&mut NoiseSource::new(SEED));
            vae.config.to_denoiser(&mut latent);
            let off = difference(&latent, &expected("latent"));
            assert!(off < 3e-5, "{checkpoint}: the latent of picture {pictures} is off by {off}");
            pictures += 1;
        }
        assert!(pictures >= 2, "{checkpoint}");
    }
}

#[test]
fn a_shifted_latent_of_many_channels_decodes_as_in_diffusers() {
    let goldens = Goldens::read("vae");
    for checkpoint in CHECKPOINTS.into_iter().chain(["vae16"]) {
        let (vae, latents) = (vae(checkpoint), goldens.tensor(&format!("{checkpoint}.latents")).unwrap());
        let mut values = numbers(&latents);
        vae.config.to_decoder(&mut values);
        let decoded = vae.decode(&values, dims4(&latents), usize::MAX).unwrap();
        let off = difference(
            &ops::channels_first(&decoded).unwrap(),
            &goldens.tensor(&format!("{checkpoint}.decoded")).unwrap(),
        );
        assert!(off < 3e-5, "{checkpoint}: decoding is off by {off}");
    }
    let config = vae("vae16").config;
    assert_eq!((config.latent_channels, config.shift_factor), (16, 0.0609));
    let mut there_and_back = [1.5f32, -2.0];
    config.to_denoiser(&mut there_and_back);
    config.to_decoder(&mut there_and_back);
    assert!((there_and_back[0] - 1.5).abs() < 1e-6 && (there_and_back[1] + 2.0).abs() < 1e-6);
}

/// Numbers that change slowly over a map, as pictures and latents do.
fn waves(len: usize, period: f32, size: f32) -> Vec<f32> {
    (0..len).map(|index| size * (index as f32 / period).sin() * (index as f32 * 0.37).cos()).collect()
}

#[test]
fn a_picture_in_bands_is_bit_for_bit_the_whole_picture() {
    for dtype in [DType::F32, DType::BF16] {
        let vae = vae_at("demo", &Place::new(&Device::Cpu, dtype));
        for (height, width, budgets) in [(512, 768, vec![16 << 20]), (168, 136, vec![2 << 20, 0]), (128, 8, vec![0])] {
            let (down, across) = (height / 8, width / 8);
            let (latents, dims) = (waves(4 * down * across, 50.0, 4.0), [1, 4, down, across]);
            let pixels = waves(3 * height * width, 900.0, 1.0);
            let decode = |budget| vae.decode(&latents, dims, budget).unwrap().to_values().unwrap();
            let encode = |budget| vae.encode(&pixels, (height, width), budget).unwrap();
            let (decoded, encoded) = (decode(usize::MAX), encode(usize::MAX));
            for budget in budgets {
                let what = format!("{height} × {width} in {budget} bytes, {dtype:?}");
                assert!(vae.picture_bytes(height, width) > budget, "{what} is whole");
                assert!(decode(budget) == decoded, "{what}: decoding differs");
                let again = encode(budget);
                assert!(again.mean == encoded.mean, "{what}: the mean differs");
                assert!(again.log_variance == encoded.log_variance, "{what}: the variance differs");
            }
        }
    }
}

#[test]
fn rows_of_a_decoding_in_bands_are_the_rows_alone() {
    let vae = vae("demo");
    let (down, across) = (20, 12);
    let latents = waves(2 * 4 * down * across, 50.0, 4.0);
    let both = vae.decode(&latents, [2, 4, down, across], 0).unwrap().to_values().unwrap();
    for (row, latent) in latents.chunks(4 * down * across).enumerate() {
        let alone = vae.decode(latent, [1, 4, down, across], usize::MAX).unwrap().to_values().unwrap();
        assert!(both[row * alone.len()..(row + 1) * alone.len()] == alone, "row {row}");
    }
}

#[test]
fn a_decoder_that_f16_cannot_hold_computes_in_f32_there() {
    let picture_bytes = |dtype| vae_at("demo", &Place::new(&Device::Cpu, dtype).elsewhere()).picture_bytes(64, 64);
    let [half, brain, single] = [DType::F16, DType::BF16, DType::F32].map(picture_bytes);
    assert_eq!((half, 2 * brain), (single, single));
}
