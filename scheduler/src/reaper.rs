//! The reaper: takes jobs back from workers that fell silent.

use async_trait::async_trait;
use farm::job::JobState;
use farm::store::SharedStore;
use tracing::info;

use crate::loops::{Pace, Sweep};
use crate::metrics::Metrics;

/// Leases that one transaction takes back.
const BATCH: u32 = 500;

/// Takes back expired leases.
pub(crate) struct Reaper {
    pub(crate) store: SharedStore,
    pub(crate) metrics: Metrics,
}

#[async_trait]
impl Sweep for Reaper {
    fn name(&self) -> &'static str {
        "reaper"
    }

    async fn sweep(&mut self) -> anyhow::Result<Pace> {
        let reaped = self.store.reap(BATCH).await?;
        let total = reaped.retried + reaped.failed + reaped.cancelled;
        if total == 0 {
            return Ok(Pace::Rest);
        }
        info!(retried = reaped.retried, failed = reaped.failed, cancelled = reaped.cancelled, "leases had expired");
        self.metrics.reaped(JobState::Pending, reaped.retried);
        self.metrics.reaped(JobState::Failed, reaped.failed);
        self.metrics.reaped(JobState::Cancelled, reaped.cancelled);
        Ok(if total >= u64::from(BATCH) { Pace::Again } else { Pace::Rest })
    }
}
