//! What a client sends at once, turned into a stream of jobs that never lies in memory as a whole.

mod expand;
mod lines;
mod request;
mod spool;

pub(crate) use expand::Expansion;
pub(crate) use lines::LineSplitter;
pub use request::{SeedRange, SubmissionRequest, Sweep, SweepValues};
pub(crate) use spool::{Spool, SpoolError, SpooledJobs};

/// The seed of a job that names none: 0 to 2^32-1, as the usual tools draw it.
pub(crate) fn draw_seed() -> u64 {
    u64::from(rand::random::<u32>())
}
