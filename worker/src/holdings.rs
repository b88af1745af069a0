//! The jobs that this worker holds a lease of, and how far each has come. The one place that decides
//! who may settle a job, so that a cancellation, a lost lease and a result never cross.

use std::collections::HashMap;
use std::convert::Infallible;
use std::sync::{Arc, Mutex, MutexGuard};

use chrono::{DateTime, Utc};
use farm::broker::{Acker, DeliveryTag};
use farm::id::JobId;
use farm::job::Lease;
use farm::spec::RenderSpec;
use tokio::sync::{Notify, futures::Notified, mpsc};

/// How to settle a delivery. Keeps its subscription open until then.
#[derive(Clone)]
pub(crate) struct Receipt {
    pub(crate) acker: Arc<dyn Acker>,
    pub(crate) tag: DeliveryTag,
    pub(crate) _subscription: mpsc::Sender<Infallible>,
}

impl Receipt {
    /// Done with it. If the broker cannot be told it delivers again, and the next claim finds nothing.
    pub(crate) async fn ack(&self) {
        if let Err(error) = self.acker.ack(self.tag).await {
            tracing::debug!(%error, "a delivery could not be acked and will come again");
        }
    }

    /// Back to the queue. If the broker cannot be told, it takes it back with the connection.
    pub(crate) async fn give_back(&self) {
        if let Err(error) = self.acker.requeue(self.tag).await {
            tracing::debug!(%error, "a delivery could not be given back");
        }
    }
}

/// How far a held job has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stage {
    /// On the device, not in a batch yet.
    Waiting,
    /// In a running batch.
    Running,
    /// Rendered; being encoded and uploaded.
    Delivering,
    /// The store is being told how it ended.
    Settling,
}

/// A job in hand.
#[derive(Clone)]
pub(crate) struct Held {
    pub(crate) lease: Lease,
    pub(crate) spec: Arc<RenderSpec>,
    pub(crate) receipt: Receipt,
    pub(crate) claimed_at: DateTime<Utc>,
    pub(crate) stage: Stage,
    /// The store says that the lease is no longer ours.
    pub(crate) lost: bool,
    /// A client wants it stopped.
    pub(crate) cancelled: bool,
}

/// Every job in hand.
#[derive(Default)]
pub(crate) struct Holdings {
    jobs: Mutex<HashMap<JobId, Held>>,
    left: Notify,
}

impl Holdings {
    fn jobs(&self) -> MutexGuard<'_, HashMap<JobId, Held>> {
        self.jobs.lock().expect("no holder of this lock panics")
    }

    pub(crate) fn add(&self, held: impl IntoIterator<Item = Held>) {
        self.jobs().extend(held.into_iter().map(|held| (held.lease.job_id, held)));
    }

    /// Moves a job on; what is known of it, or `None` if it is no longer in hand or is being settled.
    pub(crate) fn advance(&self, job: JobId, stage: Stage) -> Option<Held> {
        let mut jobs = self.jobs();
        let held = jobs.get_mut(&job).filter(|held| held.stage != Stage::Settling)?;
        held.stage = stage;
        Some(held.clone())
    }

    /// Takes the right to settle a job: only the first caller gets it.
    pub(crate) fn begin_settling(&self, job: JobId) -> Option<Held> {
        self.advance(job, Stage::Settling)
    }

    /// What is known of a job in hand.
    pub(crate) fn get(&self, job: JobId) -> Option<Held> {
        self.jobs().get(&job).cloned()
    }

    /// Lets go of a job.
    pub(crate) fn remove(&self, job: JobId) {
        self.jobs().remove(&job);
        self.left.notify_waiters();
    }

    /// The lease was lost: true if the job should be dropped because of it. A job that is being settled
    /// learns it from the store's answer, and a lease that has been replaced since does not count.
    pub(crate) fn mark_lost(&self, lease: &Lease) -> bool {
        self.mark(lease, |held| held.lost = true)
    }

    /// A client wants the job stopped: true if it should be dropped because of it.
    pub(crate) fn mark_cancelled(&self, lease: &Lease) -> bool {
        self.mark(lease, |held| held.cancelled = true)
    }

    fn mark(&self, lease: &Lease, mark: impl FnOnce(&mut Held)) -> bool {
        let mut jobs = self.jobs();
        let held = jobs.get_mut(&lease.job_id);
        held.filter(|held| held.lease.token == lease.token && held.stage != Stage::Settling).map(mark).is_some()
    }

    /// Every lease in hand.
    pub(crate) fn leases(&self) -> Vec<Lease> {
        self.jobs().values().map(|held| held.lease.clone()).collect()
    }

    /// Every job in hand.
    pub(crate) fn job_ids(&self) -> Vec<JobId> {
        self.jobs().keys().copied().collect()
    }

    /// How many jobs are in hand.
    pub(crate) fn len(&self) -> usize {
        self.jobs().len()
    }

    /// How many jobs have come to `stage`.
    pub(crate) fn count(&self, stage: Stage) -> usize {
        self.jobs().values().filter(|held| held.stage == stage).count()
    }

    /// Resolves when a job has been let go of after this call.
    pub(crate) fn changed(&self) -> Notified<'_> {
        self.left.notified()
    }

    /// Returns once nothing is in hand.
    pub(crate) async fn empty(&self) {
        loop {
            let changed = self.changed();
            if self.len() == 0 {
                return;
            }
            changed.await;
        }
    }
}
