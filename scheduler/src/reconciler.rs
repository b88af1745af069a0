//! The reconciler: puts jobs back to pending that the store believes on the broker, but the broker has lost.
//!
//! A lost message cannot be seen, only counted: if a queue holds fewer messages than it has jobs that have
//! been queued for long, some are lost, and all of those are published again. Too many messages are harmless
//! (a second delivery finds nothing to claim), too few are not. The broker is asked *before* the store, so that
//! jobs that workers take in between make the second number smaller, never the first.
//!
//! Workers hold a few deliveries that they have not claimed yet, which look the same as lost ones. While the queue
//! still has work for them, so few may miss for a while; an empty queue has no such excuse.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use chrono::{DateTime, Utc};
use farm::broker::SharedBroker;
use farm::clock::Clock;
use farm::message::QueueKey;
use farm::store::SharedStore;
use tokio::sync::Notify;
use tracing::warn;

use crate::loops::{Pace, Sweep};
use crate::metrics::Metrics;

/// The second look comes so much later: messages that workers held at the first one, about to be claimed, are
/// then claimed.
const SECOND_LOOK: Duration = Duration::from_millis(500);

/// Deliveries that a live worker may hold without having claimed them.
const UNCLAIMED_PER_WORKER: u64 = 64;

/// So many times the grace, a queue may miss no more messages than workers may hold.
const PATIENCE: i32 = 10;

/// Compares broker and store.
pub(crate) struct Reconciler {
    pub(crate) store: SharedStore,
    pub(crate) broker: SharedBroker,
    pub(crate) clock: Arc<dyn Clock>,
    /// How long a job may be queued before the broker is asked for it.
    pub(crate) grace: Duration,
    /// True until the first sweep. That one has no grace: a broker that lives in this process, or was restarted
    /// together with it, has nothing, and its jobs should not wait to be missed.
    pub(crate) just_started: bool,
    /// Queues that miss no more messages than workers may hold, and since when.
    pub(crate) short_since: HashMap<QueueKey, DateTime<Utc>>,
    /// Wakes the dispatcher.
    pub(crate) nudge: Arc<Notify>,
    pub(crate) metrics: Metrics,
}

#[async_trait]
impl Sweep for Reconciler {
    fn name(&self) -> &'static str {
        "reconciler"
    }

    async fn sweep(&mut self) -> anyhow::Result<Pace> {
        let grace = if self.just_started { Duration::ZERO } else { self.grace };
        let queued_before = self.clock.now() - grace;
        let demands = self.store.demand().await?;
        self.short_since.retain(|queue, _| demands.iter().any(|demand| demand.queue == *queue));
        let mut suspects = Vec::new();
        for demand in demands {
            if demand.queued > 0 && self.has_lost_some(&demand.queue, queued_before).await? {
                suspects.push(demand.queue);
            }
        }
        if suspects.is_empty() {
            self.just_started = false;
            return Ok(Pace::Rest);
        }
        tokio::time::sleep(SECOND_LOOK).await;
        for queue in suspects {
            if self.has_lost_some(&queue, queued_before).await? {
                self.short_since.remove(&queue);
                let requeued = self.store.requeue(&queue, queued_before).await?;
                warn!(
                    checkpoint = queue.model,
                    lane = queue.lane.as_str(),
                    jobs = requeued,
                    "the broker lost messages"
                );
                self.metrics.reconciled(&queue, requeued);
                self.nudge.notify_one();
            }
        }
        self.just_started = false;
        Ok(Pace::Rest)
    }
}

impl Reconciler {
    /// True if the broker holds fewer messages than jobs have been queued since before `queued_before`, and workers
    /// cannot be holding the rest.
    async fn has_lost_some(&mut self, queue: &QueueKey, queued_before: DateTime<Utc>) -> anyhow::Result<bool> {
        let ready = self.broker.depth(queue).await?;
        let expected = self.store.queued_since(queue, queued_before).await?;
        if ready >= expected {
            self.short_since.remove(queue);
            return Ok(false);
        }
        if ready == 0 {
            return Ok(true);
        }
        let workers = self.store.workers().await?;
        let serving =
            workers.iter().filter(|worker| worker.alive && worker.status.serving.as_ref() == Some(&queue.model));
        if expected - ready > serving.count() as u64 * UNCLAIMED_PER_WORKER {
            return Ok(true);
        }
        let now = self.clock.now();
        let since = *self.short_since.entry(queue.clone()).or_insert(now);
        let patience = chrono::Duration::from_std(self.grace)? * PATIENCE;
        Ok(now - since > patience)
    }
}
