//! The dispatcher: moves pending jobs to the broker, so that each queue there is topped up to a bound.
//!
//! Everything beyond the bound waits in the store, where order and fairness can still be decided.

use async_trait::async_trait;
use farm::broker::SharedBroker;
use farm::store::{DEMAND_BOUND, Demand, SharedStore};

use crate::loops::{Pace, Sweep};
use crate::metrics::Metrics;

/// Jobs that are published and marked in one transaction.
const CHUNK: u64 = 500;

/// Tops up the queues.
pub(crate) struct Dispatcher {
    pub(crate) store: SharedStore,
    pub(crate) broker: SharedBroker,
    pub(crate) queue_bound: u64,
    pub(crate) metrics: Metrics,
}

#[async_trait]
impl Sweep for Dispatcher {
    fn name(&self) -> &'static str {
        "dispatcher"
    }

    /// One chunk for each queue with room, the urgent ones first: a long queue does not hold up the others.
    async fn sweep(&mut self) -> anyhow::Result<Pace> {
        let mut demands = self.store.demand().await?;
        demands.sort_by_key(|demand| (demand.queue.lane, demand.oldest));
        let mut pace = Pace::Rest;
        let mut failure = None;
        for demand in &demands {
            let room = room(demand, self.queue_bound);
            let chunk = room.min(CHUNK);
            if chunk == 0 {
                continue;
            }
            match self.store.dispatch(&demand.queue, chunk as u32, &*self.broker).await {
                Ok(dispatched) => {
                    self.metrics.dispatched(&demand.queue, dispatched);
                    if dispatched == chunk && room > chunk {
                        pace = Pace::Again;
                    }
                }
                // The other queues may be fine.
                Err(error) => failure = Some(anyhow::Error::new(error).context(format!("queue of {:?}", demand.queue))),
            }
        }
        match failure {
            Some(failure) => Err(failure),
            None => Ok(pace),
        }
    }
}

/// How many pending jobs the queue still takes. The store counts no further than [`DEMAND_BOUND`], so a
/// bound above it cannot be held.
fn room(demand: &Demand, queue_bound: u64) -> u64 {
    let pending = demand.waiting.saturating_sub(demand.queued);
    queue_bound.min(DEMAND_BOUND).saturating_sub(demand.queued).min(pending)
}

#[cfg(test)]
mod tests {
    use farm::job::Lane;
    use farm::message::QueueKey;

    use super::*;

    fn demand(waiting: u64, queued: u64) -> Demand {
        let queue = QueueKey { model: "demo".into(), lane: Lane::Bulk };
        Demand { queue, waiting, queued, oldest: chrono::DateTime::UNIX_EPOCH }
    }

    #[test]
    fn a_queue_takes_what_waits_up_to_the_bound() {
        assert_eq!(room(&demand(10, 0), 2000), 10);
        assert_eq!(room(&demand(10_000, 0), 2000), 2000);
        assert_eq!(room(&demand(10_000, 1990), 2000), 10);
        assert_eq!(room(&demand(10_000, 2400), 2000), 0);
        assert_eq!(room(&demand(7, 7), 2000), 0);
    }

    #[test]
    fn a_bound_beyond_what_the_store_counts_is_cut_to_that() {
        assert_eq!(room(&demand(DEMAND_BOUND, DEMAND_BOUND), u64::MAX), 0);
    }
}
