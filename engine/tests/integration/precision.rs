//! What the number format may change, on trained weights.

use std::sync::Arc;

use engine::{Checkpoint, Device, DeviceChoice, Precision, RowRequest, render};

use crate::company::in_company;
use crate::support::{checkpoint, folder, psnr, request};

fn loaded(precision: Precision) -> Arc<Checkpoint> {
    let device = Device::open(DeviceChoice::Cpu).unwrap();
    Arc::new(Checkpoint::load(&folder("demo"), &device, precision).unwrap())
}

#[test]
fn half_precision_keeps_the_picture_of_full_precision() {
    let full = checkpoint("demo");
    let prompts = ["a red circle on a blue background", "a small green star", "a large yellow square on black"];
    for (precision, least) in [(Precision::F16, 60.0), (Precision::Bf16, 45.0)] {
        let half = loaded(precision);
        for (seed, prompt) in prompts.iter().enumerate() {
            let request = RowRequest { steps: 8, seed: seed as u64, ..request(prompt) };
            let (expected, got) =
                (render(&full, &request, |_, _| {}).unwrap(), render(&half, &request, |_, _| {}).unwrap());
            let ratio = psnr(&got, &expected);
            println!("{precision}, {prompt:?}: {ratio:.1} dB");
            assert!(ratio >= least, "{precision}, {prompt:?}: {ratio:.1} dB, less than {least}");
        }
    }
}

#[test]
fn a_row_of_a_mixed_batch_equals_the_row_alone_in_half_precision() {
    let model = loaded(Precision::Bf16);
    let sized = |prompt, seed, steps| RowRequest { width: 72, height: 64, seed, steps, ..request(prompt) };
    let requests = [sized("a red circle", 1, 3), sized("a blue star", 2, 2), sized("", 3, 3)];
    let finished = in_company(&model, &requests, |_| false);
    for (request, (_, latent)) in requests.iter().zip(finished.into_values()) {
        let picture = model.decode(&[latent]).unwrap().remove(0);
        assert_eq!(picture, render(&model, request, |_, _| {}).unwrap(), "{:?}", request.prompt);
    }
}
