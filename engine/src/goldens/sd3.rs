//! Stable Diffusion 3's transformer against diffusers'.

use candle_core::{DType, Device, Tensor};

use super::{Goldens, at, difference, dims4, folder, numbers};
use crate::denoiser::{Mmdit, Prompts};
use crate::ops::Place;

const CHECKPOINTS: [&str; 3] = ["sd3", "sd35_medium", "sd3_without_t5"];

fn transformer(checkpoint: &str, place: &Place) -> Mmdit {
    Mmdit::load(folder(checkpoint).join("transformer"), place).unwrap()
}

/// One call's tensors.
struct Call {
    sample: Tensor,
    tokens: Tensor,
    pooled: Tensor,
    timesteps: Vec<f32>,
    output: Tensor,
    /// Without `layers`.
    skipped: Tensor,
    layers: Vec<usize>,
}

impl Call {
    fn all(checkpoint: &str) -> Vec<Self> {
        let goldens = Goldens::read(checkpoint);
        let read = |index: usize| {
            let tensor = |name: &str| goldens.tensor(&format!("{index}.{name}"));
            Some(Self {
                sample: tensor("sample")?,
                tokens: tensor("tokens")?,
                pooled: tensor("pooled")?,
                timesteps: goldens.list("timesteps"),
                output: tensor("output")?,
                skipped: tensor("skipped")?,
                layers: goldens.list("layers"),
            })
        };
        (0..).map_while(read).collect()
    }

    fn run(&self, model: &Mmdit, place: &Place, skipped: &[usize]) -> Vec<f32> {
        let prompts = Prompts { tokens: &at(&self.tokens, place), pooled: &at(&self.pooled, place) };
        model.forward(&numbers(&self.sample), dims4(&self.sample), &self.timesteps, prompts, skipped).unwrap()
    }

    /// The call with one of its rows alone.
    fn row(&self, index: usize) -> Self {
        let part = |tensor: &Tensor| tensor.narrow(0, index, 1).unwrap();
        Self {
            sample: part(&self.sample),
            tokens: part(&self.tokens),
            pooled: part(&self.pooled),
            timesteps: vec![self.timesteps[index]],
            output: part(&self.output),
            skipped: part(&self.skipped),
            layers: self.layers.clone(),
        }
    }
}

#[test]
fn a_call_with_mixed_timesteps_equals_diffusers_rows() {
    let place = Place::host();
    for checkpoint in CHECKPOINTS {
        let (model, calls) = (transformer(checkpoint, &place), Call::all(checkpoint));
        assert!(calls.len() >= 2);
        for (index, call) in calls.iter().enumerate() {
            let off = difference(&call.run(&model, &place, &[]), &call.output);
            assert!(off < 1e-5, "{checkpoint}: call {index} is off by {off}");
            let off = difference(&call.run(&model, &place, &call.layers), &call.skipped);
            assert!(!call.layers.is_empty() && off < 1e-5, "{checkpoint}: call {index} without layers is off by {off}");
        }
    }
}

#[test]
fn a_row_of_a_call_equals_the_row_alone_bit_for_bit() {
    for place in [Place::host(), Place::new(&Device::Cpu, DType::BF16)] {
        for checkpoint in CHECKPOINTS {
            let (model, calls) = (transformer(checkpoint, &place), Call::all(checkpoint));
            for call in &calls {
                let batch = call.run(&model, &place, &[]);
                let len = batch.len() / call.timesteps.len();
                for row in 0..call.timesteps.len() {
                    let alone = call.row(row).run(&model, &place, &[]);
                    let of_batch = &batch[row * len..(row + 1) * len];
                    let same = of_batch.iter().zip(&alone).all(|(a, b)| a.to_bits() == b.to_bits());
                    assert!(same && alone.len() == len, "{checkpoint}: row {row}");
                }
            }
        }
    }
}

#[test]
fn half_precision_follows_full_precision_at_its_own_distance() {
    // On the processor `f16` is computed as `f32`.
    for (dtype, range) in [(DType::F16, 0.0..1e-5), (DType::BF16, 1e-4..0.1)] {
        let place = Place::new(&Device::Cpu, dtype);
        for checkpoint in CHECKPOINTS {
            let (model, calls) = (transformer(checkpoint, &place), Call::all(checkpoint));
            let off = difference(&calls[0].run(&model, &place, &[]), &calls[0].output);
            assert!(range.contains(&off), "{checkpoint}: {dtype:?} is off by {off}");
        }
    }
}

#[test]
fn the_table_of_positions_is_the_one_that_checkpoints_store() {
    for checkpoint in CHECKPOINTS {
        let model = transformer(checkpoint, &Place::host());
        let (stored, computed) = model.positions();
        assert_eq!(stored.len(), computed.len());
        let off = stored.iter().zip(&computed).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
        // Stored in half precision.
        assert!(off < 4e-3, "{checkpoint} is off by {off}");
    }
}
