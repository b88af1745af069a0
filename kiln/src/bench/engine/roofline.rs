//! What share of a machine's ceiling something reaches: whatever computes `flops` and moves `bytes` takes at least as
//! long as the slower of the two takes by itself.
//!
//! Reference: Williams, Waterman, Patterson, "Roofline: an insightful visual performance model", 2009.

use serde::Serialize;

/// A machine's ceilings with all its threads.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Roof {
    /// Floating-point operations per second.
    pub flops: f64,
    /// Bytes per second between memory and processor.
    pub bytes: f64,
}

/// What holds something back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Bound {
    /// Multiply-adds.
    Compute,
    /// Memory.
    Memory,
}

impl Bound {
    /// For tables.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Compute => "compute",
            Self::Memory => "memory",
        }
    }
}

/// How something with so much work did.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Reached {
    /// What it is held back by.
    pub bound: Bound,
    /// Of that ceiling, 1 being all of it. More than 1 where caches held what is counted as moved.
    pub share: f64,
}

impl Roof {
    /// The share of this roof that `seconds` for `flops` and `bytes` mean.
    pub fn reached(self, flops: f64, bytes: f64, seconds: f64) -> Reached {
        let (computing, moving) = (flops / self.flops, bytes / self.bytes);
        let bound = if computing >= moving { Bound::Compute } else { Bound::Memory };
        Reached { bound, share: computing.max(moving) / seconds }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_slower_of_computing_and_moving_is_the_bound() {
        let roof = Roof { flops: 100.0, bytes: 10.0 };
        assert_eq!(roof.reached(100.0, 1.0, 2.0), Reached { bound: Bound::Compute, share: 0.5 });
        assert_eq!(roof.reached(100.0, 20.0, 4.0), Reached { bound: Bound::Memory, share: 0.5 });
        assert_eq!(roof.reached(0.0, 10.0, 1.0), Reached { bound: Bound::Memory, share: 1.0 });
    }
}
