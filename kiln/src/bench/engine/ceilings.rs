//! The machine's own limits, measured in this process.

use ::engine::bench::{self, DeviceRates, Rate};
use ::engine::{Device, Precision};
use anyhow::Result;
use serde::Serialize;

use super::super::machine;
use super::super::table::Table;
use super::roofline::Roof;

/// So many times the last cache is more than it can help with.
const CACHES: usize = 8;
/// At least and at most so much memory is read and copied.
const BUFFER: (usize, usize) = (256 << 20, 2 << 30);

/// What was measured.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Ceilings {
    /// Threads of the engine.
    pub threads: usize,
    /// Every kind of multiply-add that the processor has.
    pub peaks: Vec<Peak>,
    /// Bytes read per second.
    pub read: OneAndAll,
    /// Bytes read and written per second by copying.
    pub copy: OneAndAll,
}

/// One kind of multiply-add.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Peak {
    /// The factors' number format.
    pub dtype: &'static str,
    /// The instructions, for people.
    pub instructions: &'static str,
    /// Floating-point operations per second.
    pub flops: OneAndAll,
}

/// A rate on one thread and on all.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct OneAndAll {
    /// On one thread.
    pub one: f64,
    /// On all of the engine's.
    pub all: f64,
}

impl From<Rate> for OneAndAll {
    fn from(Rate { one, all }: Rate) -> Self {
        Self { one, all }
    }
}

/// Measures for some 10 seconds: the processor, or another device that is to be used.
pub fn measure(device: &Device, precision: Precision) -> Result<Ceilings> {
    if device.is_processor() { Ok(of_processor()) } else { of_device(device, precision) }
}

fn of_device(device: &Device, precision: Precision) -> Result<Ceilings> {
    let DeviceRates { flops, bytes } = bench::device_rates(device, precision)?;
    let rate = |all| OneAndAll { one: all, all };
    let peak = Peak { dtype: precision.as_str(), instructions: "products of 8192×8192", flops: rate(flops) };
    Ok(Ceilings { peaks: vec![peak], threads: 1, read: rate(bytes), copy: rate(bytes) })
}

fn of_processor() -> Ceilings {
    let bandwidth = bench::bandwidth((CACHES * machine::last_cache_bytes()).clamp(BUFFER.0, BUFFER.1));
    let peaks = bench::multiply_add_peaks().into_iter().map(|peak| Peak {
        dtype: peak.precision.as_str(),
        instructions: peak.instructions,
        flops: peak.flops.into(),
    });
    Ceilings {
        peaks: peaks.collect(),
        threads: bench::threads(),
        read: bandwidth.read.into(),
        copy: bandwidth.copy.into(),
    }
}

impl Ceilings {
    /// The ceilings for computing in `precision`: of all multiply-adds that could do it, the fastest. A processor
    /// without instructions for 16 bits computes them as `f32`.
    pub fn roof(&self, precision: Precision) -> Roof {
        let serves = |peak: &&Peak| peak.dtype == precision.as_str() || peak.dtype == Precision::F32.as_str();
        let peaks = self.peaks.iter().filter(serves).map(|peak| peak.flops.all);
        Roof { flops: peaks.fold(0.0, f64::max), bytes: self.read.all.max(self.copy.all) }
    }

    /// For people.
    pub fn table(&self) -> Table {
        let threads = format!("{} threads", self.threads);
        let mut table = Table::new(
            "Ceilings: multiply-adds between registers, memory beyond all caches",
            ["what", "unit", "1 thread", threads.as_str()],
        );
        for Peak { dtype, instructions, flops } in &self.peaks {
            let cell = |rate: f64| format!("{:.0}", rate / 1e9);
            table.row([format!("{dtype}, {instructions}"), "GFLOP/s".into(), cell(flops.one), cell(flops.all)]);
        }
        for (what, rate) in [("memory, read", self.read), ("memory, copied (read + written)", self.copy)] {
            let cell = |rate: f64| format!("{:.1}", rate / 1e9);
            table.row([what.into(), "GB/s".into(), cell(rate.one), cell(rate.all)]);
        }
        table
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_roof_is_the_fastest_way_to_compute_in_its_format() {
        let rate = |all| OneAndAll { one: all / 2.0, all };
        let peak = |dtype, flops| Peak { dtype, instructions: "some", flops: rate(flops) };
        let mut ceilings = Ceilings {
            threads: 2,
            peaks: vec![peak("f32", 100.0), peak("f32", 200.0), peak("bf16", 400.0), peak("bf16", 1600.0)],
            read: rate(20.0),
            copy: rate(24.0),
        };
        assert_eq!(ceilings.roof(Precision::F32), Roof { flops: 200.0, bytes: 24.0 });
        assert_eq!(ceilings.roof(Precision::Bf16), Roof { flops: 1600.0, bytes: 24.0 });
        ceilings.peaks.truncate(2);
        assert_eq!(ceilings.roof(Precision::Bf16).flops, 200.0);
        assert!(ceilings.table().to_string().contains("2 threads"));
    }
}
