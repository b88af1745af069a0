//! What the tests stand on.

pub mod fake;
pub mod farm;
pub mod faults;
pub mod ports;

pub use fake::Stage;
pub use farm::{TestFarm, wait_for};
