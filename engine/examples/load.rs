//! Loads a checkpoint and prints how long that took and how much memory it needed at its peak (Linux):
//! `cargo run --release -p engine --example load -- x.safetensors bf16`

use std::path::PathBuf;
use std::time::Instant;

use engine::{Checkpoint, Device, DeviceChoice, Precision};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let model = PathBuf::from(arguments.next().ok_or("usage: load MODEL [f32|f16|bf16]")?);
    let device = Device::open(DeviceChoice::best())?;
    let precision: Precision = match arguments.next() {
        Some(word) => word.parse()?,
        None => Precision::default_for(&device),
    };
    let before = mebibytes("VmRSS")?;
    let started = Instant::now();
    let checkpoint = Checkpoint::load(&model, &device, precision)?;
    let seconds = started.elapsed().as_secs_f64();
    let (held, peak) = (mebibytes("RssAnon")?, mebibytes("VmHWM")?);
    let (width, height) = checkpoint.native_size();
    println!("{}, {precision}, {width}×{height}: loaded in {seconds:.2} s", device.describe());
    println!(
        "before {before:.0} MiB, held after {held:.0} MiB, peak {peak:.0} MiB: {:.3} of what is held",
        peak / held
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
