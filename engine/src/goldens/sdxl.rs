//! What only Stable Diffusion XL has: two encoders, of which the second pools, and sizes.

use super::{Goldens, at, difference, dims4, folder, numbers, unet};
use crate::denoiser::{Added, UNet};
use crate::ops::{Place, Tensor};
use crate::text::{ClipEncoder, ClipOutput, ClipTokenizer, Pooled, States};

const CHECKPOINTS: [&str; 3] = ["sdxl", "sdxl_turbo", "sdxl_refiner"];

#[test]
fn each_encoder_pads_and_speaks_as_its_folder_says() {
    for checkpoint in CHECKPOINTS {
        let goldens = Goldens::read(checkpoint);
        let mut encoders = 0;
        for number in ["", "_2"] {
            let Some(tokens) = goldens.tensor(&format!("tokens{number}")) else { continue };
            let pooled = if number.is_empty() { Pooled::No } else { Pooled::Projected };
            let output = ClipOutput { states: States::Penultimate, pooled };
            let path = folder(checkpoint).join(format!("text_encoder{number}"));
            let encoder = ClipEncoder::load(&path, output, &Place::host()).unwrap();
            let path = folder(checkpoint).join(format!("tokenizer{number}"));
            let tokenizer = ClipTokenizer::load(&path, 77, encoder.config.vocabulary).unwrap();
            let prompts = goldens.list::<String>("prompts");
            for (row, prompt) in goldens.list::<usize>("embedded").into_iter().enumerate() {
                let ids = tokenizer.ids(&prompts[prompt]).unwrap();
                let expected = tokens.get(prompt).unwrap().to_vec1::<i64>().unwrap();
                assert_eq!(ids.iter().map(|id| i64::from(*id)).collect::<Vec<_>>(), expected);
                let got = encoder.forward(&ids).unwrap();
                let expect = |name: &str| goldens.tensor(name).unwrap().narrow(0, row, 1).unwrap();
                let off = difference(&got.states.to_values().unwrap(), &expect(&format!("penultimate{number}")));
                assert!(off < 5e-6, "{checkpoint}: states{number} of prompt {prompt} are off by {off}");
                if let Some(pooled) = got.pooled {
                    let off = difference(&pooled.to_values().unwrap(), &expect("pooled_2"));
                    assert!(off < 5e-6, "{checkpoint}: what is pooled of prompt {prompt} is off by {off}");
                }
            }
            encoders += 1;
        }
        assert_eq!(encoders, if checkpoint == "sdxl_refiner" { 1 } else { 2 });
    }
}

/// One denoiser call for rows from `first` on.
fn call(unet: &UNet, goldens: &Goldens, first: usize, rows: usize) -> Vec<f32> {
    let part = |name: &str| goldens.tensor(name).unwrap().narrow(0, first, rows).unwrap();
    let sample = part("unet.sample");
    let here = |name: &str| -> Tensor { at(&part(name), &Place::host()) };
    let added = Added { pooled: &here("pooled_2"), numbers: &numbers(&part("unet.time_ids")) };
    let timesteps = numbers(&part("unet.timesteps"));
    unet.forward(&numbers(&sample), dims4(&sample), &timesteps, &here("unet.context"), Some(added)).unwrap()
}

#[test]
fn a_denoiser_call_with_sizes_of_each_row_equals_diffusers_rows_and_the_row_alone() {
    for checkpoint in CHECKPOINTS {
        let (goldens, unet) = (Goldens::read(checkpoint), unet(checkpoint));
        let expected = goldens.tensor("unet.output").unwrap();
        let rows = expected.dim(0).unwrap();
        let together = call(&unet, &goldens, 0, rows);
        let off = difference(&together, &expected);
        // Sizes of a thousand pixels are angles of a thousand radians: the last bit of a frequency shows.
        assert!(off < 2e-4, "{checkpoint} is off by {off}");
        for (row, in_company) in together.chunks_exact(together.len() / rows).enumerate() {
            let alone = call(&unet, &goldens, row, 1);
            assert!(in_company.iter().zip(&alone).all(|(a, b)| a.to_bits() == b.to_bits()), "{checkpoint}: row {row}");
        }
    }
}
