//! Renders one picture and prints how long each part took:
//! `cargo run --release -p engine --example render -- demo/model "a red star on a blue background" star.png`

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use engine::{Checkpoint, Device, DeviceChoice, Precision, RowRequest, render};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let mut next =
        |name: &str| arguments.next().ok_or_else(|| format!("usage: render MODEL PROMPT OUT.png ({name} is missing)"));
    let (model, prompt, out) = (PathBuf::from(next("MODEL")?), next("PROMPT")?, PathBuf::from(next("OUT.png")?));

    let device = Device::open(DeviceChoice::best())?;
    let started = Instant::now();
    let checkpoint = Arc::new(Checkpoint::load(&model, &device, Precision::default_for(&device))?);
    println!("{}: loaded in {:.2} s", device.describe(), started.elapsed().as_secs_f64());

    let (width, height) = checkpoint.native_size();
    let request =
        RowRequest { prompt, width, height, steps: 20, guidance_scale: 5.0, seed: 1, ..RowRequest::default() };
    // The first picture also warms caches up; the second is what a farm pays.
    for _ in 0..2 {
        let started = Instant::now();
        let mut denoised = started.elapsed();
        let picture = render(&checkpoint, &request, |_, _| denoised = started.elapsed())?;
        let total = started.elapsed();
        println!(
            "{width}×{height}: {:.3} s ({:.3} s in the decoder)",
            total.as_secs_f64(),
            (total - denoised).as_secs_f64()
        );
        picture.save(&out)?;
    }
    Ok(())
}
