//! Timing the same thing again and again.

use std::hint::black_box;
use std::time::Instant;

use anyhow::Result;
use serde::Serialize;

use super::super::machine;
use super::super::stats::Spread;

/// Seconds of every run, and their middle.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Timed {
    /// Of the samples.
    pub seconds: Spread,
    /// In the order in which they were taken.
    pub samples: Vec<f64>,
}

impl Timed {
    /// Of these seconds; `None` without any.
    pub fn of(samples: Vec<f64>) -> Option<Self> {
        Some(Self { seconds: Spread::of(&samples)?, samples })
    }
}

/// Runs once to warm up, and then `runs` times. `run` does the work once and says how long that took.
pub fn sample(runs: u32, mut run: impl FnMut() -> Result<f64>) -> Result<Timed> {
    let [timed] = in_turns(runs, [&mut run])?;
    Ok(timed)
}

/// [`sample`] of several works in turns, each time another one first: what changes with time, as a disk's rate does,
/// changes for all.
pub fn in_turns<const N: usize>(runs: u32, works: [&mut dyn FnMut() -> Result<f64>; N]) -> Result<[Timed; N]> {
    let mut samples = [const { Vec::new() }; N];
    for round in 0..=runs as usize {
        for turn in 0..N {
            let which = (round + turn) % N;
            let seconds = works[which]()?;
            if round > 0 {
                samples[which].push(seconds);
            }
        }
    }
    let timed: Option<Vec<Timed>> = samples.into_iter().map(Timed::of).collect();
    timed.and_then(|timed| timed.try_into().ok()).ok_or_else(|| anyhow::anyhow!("nothing was timed"))
}

/// How long `work` takes; getting rid of what it makes is not part of it.
pub fn seconds<T>(work: impl FnOnce() -> Result<T>) -> Result<f64> {
    let started = Instant::now();
    let made = black_box(work()?);
    let seconds = started.elapsed().as_secs_f64();
    drop(made);
    Ok(seconds)
}

/// Fills the caches with something else, so that what is timed next comes from memory, as a model's weights do.
pub struct CacheFlush(Vec<u64>);

impl CacheFlush {
    /// Twice the last cache.
    pub fn new() -> Self {
        Self(vec![1; 2 * machine::last_cache_bytes() / size_of::<u64>()])
    }

    /// Takes milliseconds.
    pub fn flush(&mut self) {
        self.0.iter_mut().for_each(|value| *value = value.wrapping_add(1));
        black_box(&self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_run_is_not_counted() {
        let mut count = 0.0;
        let timed = sample(3, || {
            count += 1.0;
            Ok(count)
        });
        let timed = timed.unwrap();
        assert_eq!(timed.samples, [2.0, 3.0, 4.0]);
        assert_eq!(timed.seconds, Spread { median: 3.0, min: 2.0, max: 4.0 });
    }

    #[test]
    fn works_in_turns_share_their_rounds() {
        let order = std::cell::RefCell::new(Vec::new());
        let work = |name: f64| {
            order.borrow_mut().push(name);
            Ok(name)
        };
        let [first, second] = in_turns(2, [&mut || work(1.0), &mut || work(2.0)]).unwrap();
        assert_eq!((first.samples, second.samples), (vec![1.0; 2], vec![2.0; 2]));
        assert_eq!(order.into_inner(), [1.0, 2.0, 2.0, 1.0, 1.0, 2.0]);
        assert!(in_turns(0, [&mut || Ok(1.0)]).is_err());
    }

    #[test]
    fn a_failing_run_ends_it() {
        assert_eq!(sample(3, || anyhow::bail!("no")).unwrap_err().to_string(), "no");
    }
}
