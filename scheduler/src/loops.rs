//! How every loop of the scheduler runs: sweep, rest, and never die of an error.

use std::any::Any;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use futures_util::FutureExt;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use tracing::{error, info};

use crate::metrics::Metrics;

/// The first rest after a failed sweep; doubles with each failure.
const BACKOFF: Duration = Duration::from_millis(250);
/// The longest such rest.
const BACKOFF_MAX: Duration = Duration::from_secs(5);

/// What a sweep found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pace {
    /// There is more to do at once.
    Again,
    /// Nothing until the interval is over or somebody nudges.
    Rest,
}

/// One loop's work.
#[async_trait]
pub(crate) trait Sweep: Send {
    /// For logs and metrics.
    fn name(&self) -> &'static str;

    /// Does what there is to do now. An error ends this sweep, not the loop.
    async fn sweep(&mut self) -> anyhow::Result<Pace>;
}

/// When a loop sweeps.
#[derive(Clone, Debug)]
pub(crate) struct Rhythm {
    /// The rest between sweeps.
    pub(crate) interval: Duration,
    /// Ends a rest early. Without effect after a failure, so that a dead store is not hammered.
    pub(crate) nudge: Option<Arc<Notify>>,
}

/// Runs a loop until `stop`. A sweep that has begun is not cut short.
pub(crate) async fn repeat(mut work: impl Sweep, rhythm: Rhythm, metrics: Metrics, stop: CancellationToken) {
    let name = work.name();
    let mut failures = 0u32;
    while !stop.is_cancelled() {
        let outcome = match AssertUnwindSafe(work.sweep()).catch_unwind().await {
            Ok(outcome) => outcome,
            Err(panic) => Err(anyhow::anyhow!("panicked: {}", panic_message(&*panic))),
        };
        let rest = match outcome {
            Ok(pace) => {
                if failures > 0 {
                    info!(loop.name = name, failures, "the loop works again");
                }
                failures = 0;
                match pace {
                    Pace::Again => Duration::ZERO,
                    Pace::Rest => rhythm.interval,
                }
            }
            Err(problem) => {
                failures = failures.saturating_add(1);
                metrics.loop_failed(name);
                error!(loop.name = name, failures, "a sweep failed: {problem:#}");
                backoff(failures)
            }
        };
        let nudged = async {
            match &rhythm.nudge {
                Some(nudge) if failures == 0 => nudge.notified().await,
                _ => std::future::pending().await,
            }
        };
        tokio::select! {
            () = stop.cancelled() => break,
            () = tokio::time::sleep(rest) => {}
            () = nudged => {}
        }
    }
}

fn backoff(failures: u32) -> Duration {
    BACKOFF.saturating_mul(1 << (failures - 1).min(10)).min(BACKOFF_MAX)
}

/// What a panic said, if it said anything.
pub(crate) fn panic_message(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("without a message")
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    struct Scripted {
        sweeps: Vec<fn() -> anyhow::Result<Pace>>,
        stop: CancellationToken,
    }

    #[async_trait]
    impl Sweep for Scripted {
        fn name(&self) -> &'static str {
            "scripted"
        }

        async fn sweep(&mut self) -> anyhow::Result<Pace> {
            let step = self.sweeps.remove(0);
            if self.sweeps.is_empty() {
                self.stop.cancel();
            }
            step()
        }
    }

    #[tokio::test]
    async fn a_loop_survives_errors_and_panics_and_rests_longer_after_each() {
        let stop = CancellationToken::new();
        let sweeps: Vec<fn() -> anyhow::Result<Pace>> = vec![
            || Ok(Pace::Again),
            || anyhow::bail!("the store is away"),
            || panic!("a bug"),
            || Ok(Pace::Rest),
            || Ok(Pace::Rest),
        ];
        let begun = Instant::now();
        let rhythm = Rhythm { interval: Duration::from_millis(10), nudge: None };
        repeat(Scripted { sweeps, stop: stop.clone() }, rhythm, Metrics::new(), stop).await;
        assert!(begun.elapsed() >= BACKOFF + 2 * BACKOFF, "{:?}", begun.elapsed());
    }

    #[tokio::test]
    async fn a_nudge_ends_a_rest() {
        let stop = CancellationToken::new();
        let nudge = Arc::new(Notify::new());
        nudge.notify_one();
        let begun = Instant::now();
        let rhythm = Rhythm { interval: Duration::from_secs(60), nudge: Some(nudge) };
        let sweeps: Vec<fn() -> anyhow::Result<Pace>> = vec![|| Ok(Pace::Rest), || Ok(Pace::Rest)];
        repeat(Scripted { sweeps, stop: stop.clone() }, rhythm, Metrics::new(), stop).await;
        assert!(begun.elapsed() < Duration::from_secs(30));
    }

    #[test]
    fn the_rest_after_failures_doubles_up_to_a_bound() {
        assert_eq!(backoff(1), BACKOFF);
        assert_eq!(backoff(3), 4 * BACKOFF);
        assert_eq!(backoff(u32::MAX), BACKOFF_MAX);
    }
}
