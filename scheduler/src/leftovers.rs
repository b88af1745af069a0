//! The leftover sweeper: deletes objects of attempts that did not win.
//!
//! A worker that lost its lease may have uploaded its image all the same. The key carries the attempt, so the
//! winner's object is never touched.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use farm::artifact::{self, SharedArtifacts};
use farm::clock::Clock;
use farm::store::{Leftover, SharedStore};
use futures_util::StreamExt;

use crate::loops::{Pace, Sweep};
use crate::metrics::Metrics;

/// Leftovers looked up at once.
const BATCH: u32 = 200;
/// Deletions under way at once.
const AT_ONCE: usize = 8;

/// Deletes what lost attempts left behind.
pub(crate) struct LeftoverSweeper {
    pub(crate) store: SharedStore,
    pub(crate) artifacts: SharedArtifacts,
    pub(crate) clock: Arc<dyn Clock>,
    /// How long after its end an attempt may still be uploading.
    pub(crate) grace: Duration,
    pub(crate) metrics: Metrics,
}

#[async_trait]
impl Sweep for LeftoverSweeper {
    fn name(&self) -> &'static str {
        "leftover sweeper"
    }

    async fn sweep(&mut self) -> anyhow::Result<Pace> {
        let leftovers = self.store.leftovers(self.clock.now() - self.grace, BATCH).await?;
        let full_page = leftovers.len() == BATCH as usize;
        let this = &*self;
        let outcomes: Vec<_> = futures_util::stream::iter(leftovers)
            .map(|leftover| async move { this.delete(&leftover).await.map(|()| leftover) })
            .buffer_unordered(AT_ONCE)
            .collect()
            .await;
        // What was deleted is forgotten even if others failed; those stay for the next sweep.
        let mut deleted = Vec::new();
        let mut failure = None;
        for outcome in outcomes {
            match outcome {
                Ok(leftover) => deleted.push(leftover),
                Err(error) => failure = Some(error),
            }
        }
        if !deleted.is_empty() {
            self.store.forget_leftovers(&deleted).await?;
            self.metrics.leftovers_deleted(deleted.len() as u64);
        }
        match failure {
            Some(error) => Err(error),
            None if full_page => Ok(Pace::Again),
            None => Ok(Pace::Rest),
        }
    }
}

impl LeftoverSweeper {
    async fn delete(&self, leftover: &Leftover) -> anyhow::Result<()> {
        let Leftover { submission_id, job_id, attempt } = *leftover;
        artifact::delete_attempt(self.artifacts.as_ref(), submission_id, job_id, attempt).await?;
        Ok(())
    }
}
