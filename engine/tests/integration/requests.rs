//! Bad requests get an error that names field, limit and value.

use engine::{Error, RowRequest, RunningBatch, render};

use crate::support::{checkpoint, request};

fn refusal(request: &RowRequest) -> String {
    let mut batch = RunningBatch::new(checkpoint("sd1"), 64, 64);
    let error = batch.join(1, request).unwrap_err();
    assert!(matches!(error, Error::Request { .. }), "{error}");
    assert!(batch.is_empty());
    error.to_string()
}

#[test]
fn sizes_that_the_vae_cannot_make_are_refused() {
    let sized = |width, height| RowRequest { width, height, ..request("a star") };
    assert_eq!(refusal(&sized(60, 64)), "`width` must be a multiple of 8 from 8 to 16384, but is 60");
    assert_eq!(refusal(&sized(64, 0)), "`height` must be a multiple of 8 from 8 to 16384, but is 0");
    assert!(refusal(&sized(1 << 62, 64)).starts_with("`width` must be a multiple of 8 from 8 to 16384"));
    assert_eq!(refusal(&sized(64, 72)), "`height` must be 64 as in this batch, but is 72");
}

#[test]
fn a_milliard_steps_are_refused() {
    let steps = |steps| RowRequest { steps, ..request("a star") };
    assert_eq!(refusal(&steps(1_000_000_000)), "`steps` must be 1 to 1000, but is 1000000000");
    assert_eq!(refusal(&steps(0)), "`steps` must be 1 to 1000, but is 0");
}

#[test]
fn guidance_that_is_no_number_is_refused() {
    for scale in [f64::NAN, f64::INFINITY, -1.0] {
        let text = refusal(&RowRequest { guidance_scale: scale, ..request("a star") });
        assert!(text.starts_with("`guidance_scale` must be a finite number of at least 0"), "{text}");
    }
}

#[test]
fn a_row_joins_once_and_steps_once() {
    let mut batch = RunningBatch::new(checkpoint("sd1"), 64, 64);
    batch.join(5, &request("a star")).unwrap();
    assert_eq!(batch.join(5, &request("a ring")).unwrap_err().to_string(), "`row` must be new to this batch, but is 5");
    assert_eq!(batch.step(&[6]).unwrap_err().to_string(), "`row` must be in this batch, but is 6");
    assert_eq!(batch.step(&[5, 5]).unwrap_err().to_string(), "`row` must be named once in a step, but is 5");
    assert!(batch.step(&[]).unwrap().is_empty());
    assert_eq!(batch.step(&[5]).unwrap()[0].step, 1);
}

#[test]
fn any_text_is_a_prompt() {
    let checkpoint = checkpoint("sd1");
    let long = "word ".repeat(5000);
    for prompt in ["", " \n\t ", "🐟🐟🐟👨‍👩‍👧", "<|endoftext|><|startoftext|>", "\u{0}\u{feff}\u{202e}", long.as_str()]
    {
        let request = RowRequest { negative_prompt: prompt.to_owned(), steps: 1, ..request(prompt) };
        render(&checkpoint, &request, |_, _| {}).unwrap();
    }
}

#[test]
fn a_checkpoint_knows_its_size() {
    assert_eq!(checkpoint("demo").native_size(), (128, 128));
    assert_eq!(checkpoint("demo").vae_factor(), 8);
    assert_eq!(checkpoint("one_layer").vae_factor(), 4);
    assert_eq!(checkpoint("one_layer").native_size(), (64, 64));
    assert!(checkpoint("demo").decode(&[]).unwrap().is_empty());
}
