//! What this machine can do at most, measured in this process with its threads: multiply-adds that never
//! leave the registers, and bytes that no cache holds.

use std::hint::black_box;
use std::time::{Duration, Instant};

use super::peaks::{self, Kernel};
use crate::Precision;

/// Long enough for the timer's grain not to matter, short enough to fall between what disturbs it.
const WINDOW: Duration = Duration::from_millis(40);
/// The best of so many windows: what disturbs a measurement only ever makes it slower. Together they are long enough
/// for the clock to settle.
const WINDOWS: usize = 25;

/// A rate on one thread and on all of them at once.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rate {
    /// On one thread, the others idle.
    pub one: f64,
    /// The sum over all threads of the engine's pool.
    pub all: f64,
}

/// How fast this machine multiplies and adds in one number format with one kind of instructions.
#[derive(Clone, Debug, PartialEq)]
pub struct Peak {
    /// The format of the factors; sums are `f32`.
    pub precision: Precision,
    /// The instructions, for people: `AVX-512 FMA`.
    pub instructions: &'static str,
    /// Floating-point operations per second; a multiply-add is two.
    pub flops: Rate,
}

/// How fast this machine moves memory that is far larger than its caches, in bytes per second.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Bandwidth {
    /// Reading.
    pub read: Rate,
    /// Copying: what is read and what is written, both counted.
    pub copy: Rate,
}

/// Threads of the engine's pool.
pub fn threads() -> usize {
    rayon::current_num_threads()
}

/// The peak of every kind of multiply-add that this processor has. Takes two seconds for each.
pub fn multiply_add_peaks() -> Vec<Peak> {
    let peak = |kernel: &Kernel| Peak {
        precision: kernel.precision,
        instructions: kernel.instructions,
        flops: Rate { one: flops(kernel, 1), all: flops(kernel, threads()) },
    };
    peaks::kernels().iter().map(peak).collect()
}

fn flops(kernel: &Kernel, threads: usize) -> f64 {
    best(|| {
        together(threads, |_| {
            let mut rounds = 0u64;
            let started = Instant::now();
            while started.elapsed() < WINDOW {
                (kernel.run)(peaks::ROUNDS);
                rounds += peaks::ROUNDS;
            }
            rounds as f64 * kernel.flops_per_round / seconds(started)
        })
    })
}

/// Reads and copies a buffer of `bytes`, which should be several times the last cache.
pub fn bandwidth(bytes: usize) -> Bandwidth {
    let mut buffer = vec![1u64; (bytes / 16 * 2).max(2)];
    let mut rate = |threads: usize| {
        let share = buffer.len().div_ceil(2 * threads) * 2;
        let read = best(|| {
            together(threads, |thread| {
                let part = &buffer[(thread * share).min(buffer.len())..((thread + 1) * share).min(buffer.len())];
                let started = Instant::now();
                black_box(sum(black_box(part)));
                size_of_val(part) as f64 / seconds(started)
            })
        });
        let copy = best(|| {
            let parts = std::sync::Mutex::new(buffer.chunks_mut(share));
            together(threads, |_| {
                let Some(part) = parts.lock().ok().and_then(|mut parts| parts.next()) else { return 0.0 };
                let bytes = size_of_val(part) as f64;
                let (to, from) = part.split_at_mut(part.len() / 2);
                let started = Instant::now();
                to.copy_from_slice(black_box(from));
                black_box(to);
                bytes / seconds(started)
            })
        });
        (read, copy)
    };
    let ((read_one, copy_one), (read_all, copy_all)) = (rate(1), rate(threads()));
    Bandwidth { read: Rate { one: read_one, all: read_all }, copy: Rate { one: copy_one, all: copy_all } }
}

/// Never zero: a tiny buffer can be faster than the clock's grain.
fn seconds(started: Instant) -> f64 {
    started.elapsed().as_secs_f64().max(1e-9)
}

fn best(measure: impl FnMut() -> f64) -> f64 {
    std::iter::repeat_with(measure).take(WINDOWS).fold(0.0, f64::max)
}

/// The sum of what `measure` returns on `threads` threads that begin together.
fn together(threads: usize, measure: impl Fn(usize) -> f64 + Sync) -> f64 {
    let start = std::sync::Barrier::new(threads);
    let (start, measure) = (&start, &measure);
    std::thread::scope(|scope| {
        let running: Vec<_> = (0..threads)
            .map(|thread| {
                scope.spawn(move || {
                    start.wait();
                    measure(thread)
                })
            })
            .collect();
        running.into_iter().filter_map(|thread| thread.join().ok()).sum()
    })
}

/// In lanes, so that reading is what it waits for.
fn sum(values: &[u64]) -> u64 {
    let mut lanes = [0u64; 32];
    let (chunks, rest) = values.as_chunks::<32>();
    for chunk in chunks {
        for (lane, value) in lanes.iter_mut().zip(chunk) {
            *lane = lane.wrapping_add(*value);
        }
    }
    lanes.iter().chain(rest).fold(0, |sum, value| sum.wrapping_add(*value))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_processor_multiplies_f32() {
        let kernels = peaks::kernels();
        assert!(kernels.iter().any(|kernel| kernel.precision == Precision::F32));
        for kernel in kernels {
            (kernel.run)(1);
            assert!(kernel.flops_per_round > 0.0, "{}", kernel.instructions);
        }
    }

    #[test]
    fn memory_has_a_speed_even_if_there_is_hardly_any() {
        for bytes in [0, 1000, 1 << 20] {
            let Bandwidth { read, copy } = bandwidth(bytes);
            for rate in [read.one, read.all, copy.one, copy.all] {
                assert!(rate.is_finite() && rate > 0.0, "{bytes}: {read:?} {copy:?}");
            }
        }
    }

    #[test]
    fn a_sum_takes_every_value() {
        let values: Vec<u64> = (0..100).collect();
        assert_eq!(sum(&values), 4950);
    }
}
