//! What a device beside the processor can do at most, measured through the operations that models call.

use std::time::Instant;

use crate::ops::{Linear, Parameter, Tensor, multiply};
use crate::{Device, Precision, Result};

/// How fast a device computes and moves memory.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DeviceRates {
    /// Floating-point operations per second in products of large square matrices.
    pub flops: f64,
    /// Bytes per second, read and written, of a memory that no cache holds.
    pub bytes: f64,
}

/// Takes some seconds, most of them to make up numbers.
///
/// # Errors
/// [`crate::Error::OutOfMemory`] or [`crate::Error::Device`].
pub fn device_rates(device: &Device, precision: Precision) -> Result<DeviceRates> {
    rates(device, precision, 8192, 1 << 27)
}

fn rates(device: &Device, precision: Precision, side: usize, values: usize) -> Result<DeviceRates> {
    let place = device.place(precision);
    let numbers = |count: usize| (0..count).map(|at| (at % 251) as f32 / 251.0).collect::<Vec<_>>();
    let weight = Parameter::from_values(&numbers(side * side), &[side, side]);
    let linear = Linear::new(&weight, None, &place)?;
    let x = Tensor::new(&numbers(side * side), &[side, side], &place)?;
    let product = best(device, || linear.forward(&x).map(drop))?;
    let x = Tensor::new(&numbers(values), &[1, values], &place)?;
    let moved = best(device, || multiply(&x, &x).map(drop))?;
    // Both factors are read, and the product is written.
    Ok(DeviceRates { flops: 2.0 * (side as f64).powi(3) / product, bytes: 3.0 * x.bytes() as f64 / moved })
}

/// Seconds of the quickest of some runs.
fn best(device: &Device, run: impl Fn() -> Result<()>) -> Result<f64> {
    let mut best = f64::INFINITY;
    for _ in 0..12 {
        device.synchronize()?;
        let started = Instant::now();
        run()?;
        device.synchronize()?;
        best = best.min(started.elapsed().as_secs_f64());
    }
    Ok(best)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_numbers() {
        let DeviceRates { flops, bytes } = rates(&Device::elsewhere(), Precision::F32, 64, 4096).unwrap();
        assert!(flops.is_finite() && flops > 0.0 && bytes.is_finite() && bytes > 0.0, "{flops} {bytes}");
    }
}
