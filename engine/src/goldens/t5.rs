//! T5's tokenizer and encoder against those of transformers.

use candle_core::{DType, Device};

use super::{Goldens, difference, folder};
use crate::ops::Place;
use crate::text::{T5Encoder, T5Tokenizer};

/// Numbers of tokens that prompts become.
const LENGTHS: [usize; 3] = [8, 40, 256];

fn encoder(name: &str, place: &Place) -> T5Encoder {
    T5Encoder::load(folder("t5").join(name), place).unwrap()
}

fn ids(goldens: &Goldens, length: usize) -> Vec<Vec<u32>> {
    let rows = goldens.tensor(&format!("tokens.{length}")).unwrap().to_vec2::<i64>().unwrap();
    rows.into_iter().map(|row| row.into_iter().map(|id| u32::try_from(id).unwrap()).collect()).collect()
}

/// How far the encoder is off the golden states of all prompts that have some.
fn worst(name: &str, place: &Place) -> f32 {
    let (goldens, encoder) = (Goldens::read("t5"), encoder(name, place));
    let rows: std::collections::BTreeMap<usize, Vec<usize>> = goldens.value("rows");
    let mut worst = 0f32;
    for (length, rows) in rows {
        let (ids, expected) = (ids(&goldens, length), goldens.tensor(&format!("{name}.{length}")).unwrap());
        assert!(!rows.is_empty());
        for (index, row) in rows.into_iter().enumerate() {
            let states = encoder.forward(&ids[row]).unwrap();
            assert_eq!(states.dims(), [1, length, encoder.config.width]);
            worst = worst.max(difference(&states.to_values().unwrap(), &expected.narrow(0, index, 1).unwrap()));
        }
    }
    worst
}

#[test]
fn prompts_become_the_token_ids_of_transformers() {
    let goldens = Goldens::read("t5");
    let prompts: Vec<String> = goldens.list("prompts");
    for name in ["tokenizer", "pieces"] {
        let tokenizer = T5Tokenizer::load(&folder("t5").join(name), 512).unwrap();
        for length in LENGTHS {
            let expected = ids(&goldens, length);
            assert!(prompts.len() >= 10 && prompts.len() == expected.len());
            for (prompt, expected) in prompts.iter().zip(expected) {
                assert_eq!(tokenizer.ids(prompt, length).unwrap(), expected, "{name}: {prompt:?}");
            }
        }
    }
}

#[test]
fn states_equal_those_of_transformers() {
    for name in ["gated", "relu"] {
        let off = worst(name, &Place::host());
        assert!(off < 1e-5, "{name} is off by {off}");
    }
}

#[test]
fn half_precision_follows_full_precision_at_its_own_distance() {
    for (dtype, range) in [(DType::F16, 0.0..1e-5), (DType::BF16, 1e-4..0.1)] {
        let off = worst("gated", &Place::new(&Device::Cpu, dtype));
        assert!(range.contains(&off), "{dtype:?} is off by {off}");
    }
}

#[test]
fn no_token_at_all_is_refused() {
    let error = encoder("gated", &Place::host()).forward(&[]).unwrap_err().to_string();
    assert!(error.contains("`prompt` must be at least one token"), "{error}");
    assert!(encoder("gated", &Place::host()).forward(&[100_000]).is_err());
}
