//! A farm of one's own, and the audit that every test ends with.

mod audit;
mod client;
mod farm;
pub mod golden;
mod process;
mod services;

pub use audit::audit;
pub use client::Client;
pub use farm::{Farm, tiny_checkpoint};
pub use process::{Process, kiln};
pub use services::{control, repository, services};

use std::future::Future;
use std::time::{Duration, Instant};

/// Repeats `look` until it answers, for at most `limit`; panics with what was waited for.
pub async fn eventually<T, F, Fut>(what: &str, limit: Duration, mut look: F) -> T
where
    F: FnMut() -> Fut,
    Fut: Future<Output = Option<T>>,
{
    let start = Instant::now();
    loop {
        if let Some(found) = look().await {
            return found;
        }
        assert!(start.elapsed() < limit, "waited {limit:?} in vain: {what}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}
