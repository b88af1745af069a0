//! Which checkpoint a worker should serve next: a pure function of the demand and the fleet.

use std::time::Duration;

/// How long jobs of another checkpoint may wait for a warm worker.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Bounds {
    /// For the interactive lane.
    pub interactive: Duration,
    /// For the bulk lane.
    pub bulk: Duration,
}
