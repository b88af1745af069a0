//! FLUX's transformer, and the blocks of GGUF files.

use candle_core::{DType, Device};

use super::{Goldens, at, difference, dims4, folder, numbers};
use crate::denoiser::{FluxInputs, FluxTransformer};
use crate::ops::{Parameter, Place, Quantisation, Stored};

const CHECKPOINTS: [&str; 2] = ["flux_dev", "flux_schnell"];

fn transformer(checkpoint: &str, place: &Place) -> FluxTransformer {
    FluxTransformer::load(folder(checkpoint).join("transformer"), place).unwrap()
}

/// What the transformer makes of these rows of call `index`.
fn call(
    transformer: &FluxTransformer,
    goldens: &Goldens,
    index: usize,
    rows: std::ops::Range<usize>,
    place: &Place,
) -> Vec<f32> {
    let tensor = |name: &str| goldens.tensor(name).unwrap().narrow(0, rows.start, rows.len()).unwrap();
    let sample = tensor(&format!("{index}.sample"));
    let inputs = FluxInputs {
        timesteps: &numbers(&tensor("timesteps")),
        guidance: &numbers(&tensor("guidance")),
        prompts: &at(&tensor(&format!("{index}.prompts")), place),
        pooled: &at(&tensor("pooled"), place),
    };
    transformer.forward(&numbers(&sample), dims4(&sample), &inputs).unwrap()
}

#[test]
fn a_call_with_mixed_timesteps_and_guidance_equals_diffusers_rows() {
    for checkpoint in CHECKPOINTS {
        let (goldens, transformer) = (Goldens::read(checkpoint), transformer(checkpoint, &Place::host()));
        let mut calls = 0;
        while let Some(expected) = goldens.tensor(&format!("{calls}.output")) {
            let got = call(&transformer, &goldens, calls, 0..4, &Place::host());
            let off = difference(&got, &expected);
            assert!(off < 2e-5, "{checkpoint}: call {calls} is off by {off}");
            calls += 1;
        }
        assert_eq!(calls, 3);
    }
}

#[test]
fn a_row_of_a_call_equals_the_row_alone_bit_for_bit() {
    for place in [Place::host(), Place::new(&Device::Cpu, DType::BF16)] {
        for checkpoint in CHECKPOINTS {
            let (goldens, transformer) = (Goldens::read(checkpoint), transformer(checkpoint, &place));
            let batch = call(&transformer, &goldens, 2, 0..4, &place);
            let len = batch.len() / 4;
            for row in 0..4 {
                let alone = call(&transformer, &goldens, 2, row..row + 1, &place);
                let same =
                    batch[row * len..(row + 1) * len].iter().zip(&alone).all(|(a, b)| a.to_bits() == b.to_bits());
                assert!(same, "{checkpoint}: row {row}");
            }
        }
    }
}

#[test]
fn half_precision_follows_full_precision_at_its_own_distance() {
    let place = Place::new(&Device::Cpu, DType::BF16);
    for checkpoint in CHECKPOINTS {
        let (goldens, transformer) = (Goldens::read(checkpoint), transformer(checkpoint, &place));
        let off = difference(&call(&transformer, &goldens, 0, 0..4, &place), &goldens.tensor("0.output").unwrap());
        assert!((1e-4..0.05).contains(&off), "{checkpoint} is off by {off}");
    }
}

#[test]
fn blocks_are_read_as_the_format_s_own_package_reads_them() {
    let goldens = Goldens::read("quantised");
    for (format, word) in [
        (Quantisation::Q4_0, "Q4_0"),
        (Quantisation::Q4_1, "Q4_1"),
        (Quantisation::Q5_0, "Q5_0"),
        (Quantisation::Q5_1, "Q5_1"),
        (Quantisation::Q8_0, "Q8_0"),
        (Quantisation::Q4K, "Q4_K"),
        (Quantisation::Q5K, "Q5_K"),
        (Quantisation::Q6K, "Q6_K"),
    ] {
        for blocks in ["noise", "rounded"] {
            let expected = numbers(&goldens.tensor(&format!("{word}.{blocks}.values")).unwrap());
            let bytes = goldens.bytes(&format!("{word}.{blocks}.blocks"));
            let got = Parameter::new(&bytes, Stored::Quantised(format), &[expected.len()]).values().unwrap();
            assert!(got.len() >= 256 && got == expected, "{word}: {blocks}");
        }
    }
}
