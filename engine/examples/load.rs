//! Loads a checkpoint, encodes a prompt and denoises a step of a small picture, and prints how long loading took and
//! how much memory is held after each (Linux): `cargo run --release -p engine --example load -- x.safetensors bf16 drop`

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use engine::{Checkpoint, Device, DeviceChoice, LoadOptions, Precision, RowRequest, RunningBatch, TextEncoders};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let model = PathBuf::from(arguments.next().ok_or("usage: load MODEL [f32|f16|bf16] [keep|drop|auto]")?);
    let device = Device::open(DeviceChoice::best())?;
    let precision: Precision = match arguments.next() {
        Some(word) => word.parse()?,
        None => Precision::default_for(&device),
    };
    let text_encoders: TextEncoders = arguments.next().map_or(Ok(TextEncoders::Keep), |word| word.parse())?;
    let before = mebibytes("VmRSS")?;
    let started = Instant::now();
    let options = LoadOptions { text_encoders, ..LoadOptions::default() };
    let checkpoint = Arc::new(Checkpoint::load_with(&model, &device, precision, options)?);
    let seconds = started.elapsed().as_secs_f64();
    let (held, peak) = (mebibytes("RssAnon")?, mebibytes("VmHWM")?);
    let (width, height) = checkpoint.native_size();
    println!("{}, {precision}, {width}×{height}: loaded in {seconds:.2} s", device.describe());
    println!(
        "before {before:.0} MiB, held after {held:.0} MiB, peak {peak:.0} MiB: {:.3} of what is held",
        peak / held
    );

    let side = checkpoint.side_multiple() * 8;
    let mut batch = RunningBatch::new(Arc::clone(&checkpoint), side, side);
    let (prompt, started) = ("a red star on a blue background".to_owned(), Instant::now());
    batch.join(0, &RowRequest { prompt, width: side, height: side, steps: 4, ..RowRequest::default() })?;
    let (seconds, joined) = (started.elapsed().as_secs_f64(), mebibytes("RssAnon")?);
    batch.step(&[0])?;
    let encoders = checkpoint.encoder_counts();
    println!(
        "text encoders of about {} MiB, {text_encoders}: held {joined:.0} MiB after a prompt ({seconds:.2} s), {:.0} MiB after a step",
        encoders.bytes >> 20,
        mebibytes("RssAnon")?
    );
    Ok(())
}

/// A line of what the kernel says of this process.
fn mebibytes(field: &str) -> Result<f64, Box<dyn std::error::Error>> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
    let number = line.and_then(|line| line.split_whitespace().next()).ok_or("the kernel does not say")?;
    Ok(number.parse::<f64>()? / 1024.0)
}
