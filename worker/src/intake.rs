//! Takes jobs in: consumes both lanes of a checkpoint's queue, gathers deliveries into a window, and
//! claims the window in one statement. What the claim does not yield is stale, and acked at once.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use farm::broker::Delivery;
use farm::id::JobId;
use farm::job::{ClaimedJob, Failure, Lane};
use farm::message::QueueKey;
use futures_util::future::join_all;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::context::Context;
use crate::device::NewRow;
use crate::holdings::{Held, Receipt, Stage};
use crate::inputs::{self, NoInput};
use crate::settle;
use crate::subscription;

/// How long a window waits for more once it has one delivery.
const GATHER: Duration = Duration::from_millis(5);

/// What becomes of the jobs that are claimed.
#[derive(Clone, Debug)]
pub(crate) enum Fate {
    /// They go to the device.
    Render,
    /// The checkpoint cannot be loaded: they fail, all for this reason.
    Refuse(Failure),
}

/// A delivery and how to settle it.
pub(crate) struct Arrival {
    pub(crate) delivery: Delivery,
    pub(crate) receipt: Receipt,
}

/// Takes in jobs of `model` until `stop`; then gives back what has not been claimed.
pub(crate) async fn run(context: Arc<Context>, model: String, fate: Fate, stop: CancellationToken) {
    let intake = Intake::subscribe(&context, model, fate, stop);
    intake.run().await;
}

struct Intake<'a> {
    context: &'a Arc<Context>,
    model: String,
    fate: Fate,
    stop: CancellationToken,
    interactive: mpsc::Receiver<Arrival>,
    bulk: mpsc::Receiver<Arrival>,
}

/// Jobs that may be claimed now.
struct Room {
    interactive: usize,
    bulk: usize,
}

impl<'a> Intake<'a> {
    fn subscribe(context: &'a Arc<Context>, model: String, fate: Fate, stop: CancellationToken) -> Self {
        let lane = |lane, prefetch: usize| {
            let queue = QueueKey { model: model.clone(), lane };
            let (arrivals, inbox) = mpsc::channel(prefetch);
            let prefetch = u16::try_from(prefetch).unwrap_or(u16::MAX);
            let (broker, stop) = (Arc::clone(&context.broker), stop.clone());
            context.tasks.spawn(subscription::run(broker, queue, prefetch, arrivals, stop));
            inbox
        };
        let interactive = lane(Lane::Interactive, context.config.max_batch.max(1) as usize);
        let bulk = lane(Lane::Bulk, capacity(context));
        Self { context, model, fate, stop, interactive, bulk }
    }

    async fn run(mut self) {
        loop {
            let window = self.gather().await;
            if window.is_empty() {
                break;
            }
            self.claim(window).await;
        }
        for inbox in [&mut self.interactive, &mut self.bulk] {
            inbox.close();
            let mut unclaimed = Vec::new();
            while let Some(arrival) = inbox.recv().await {
                unclaimed.push(arrival);
            }
            // Each goes to the front of its queue: the first comes to lie before the others again.
            for arrival in unclaimed.iter().rev() {
                arrival.receipt.give_back().await;
            }
        }
    }

    /// Everything in hand counts, up to its delivery: where the artifact store or the store is away, the
    /// worker takes no more. Bulk jobs are claimed in portions, and interactive jobs have some room
    /// beyond theirs.
    fn room(&self) -> Room {
        let (held, capacity) = (self.context.holdings.len(), capacity(self.context));
        let portion = (self.context.config.window as usize / 2).max(1);
        let bulk = capacity.saturating_sub(held);
        let interactive = (capacity + self.context.config.max_batch.max(1) as usize).saturating_sub(held);
        Room { interactive, bulk: if bulk >= portion.min(capacity) { bulk } else { 0 } }
    }

    /// Waits for a delivery and room for it, then takes what else is there. Empty once stopped.
    async fn gather(&mut self) -> Vec<Arrival> {
        let mut window = Vec::new();
        let mut until = None;
        loop {
            let changed = self.context.holdings.changed();
            let room = self.room();
            let (urgent_room, bulk_room) = (room.interactive > window.len(), room.bulk > window.len());
            if until.is_some() && !urgent_room && !bulk_room {
                return window;
            }
            // Without a first delivery there is no deadline: that branch is off, and the time unused.
            let deadline = until.unwrap_or_else(Instant::now);
            tokio::select! {
                biased;
                () = self.stop.cancelled(), if until.is_none() => return window,
                Some(arrival) = self.interactive.recv(), if urgent_room => window.push(arrival),
                Some(arrival) = self.bulk.recv(), if bulk_room => window.push(arrival),
                () = tokio::time::sleep_until(deadline), if until.is_some() => return window,
                () = changed => {}
            }
            if !window.is_empty() {
                until.get_or_insert_with(|| Instant::now() + GATHER);
            }
        }
    }

    /// Claims a window; on a store that is away, for as long as it takes.
    async fn claim(&self, window: Vec<Arrival>) {
        let mut arrivals: HashMap<JobId, Arrival> = HashMap::new();
        let mut jobs = Vec::new();
        let mut settled = Vec::new();
        for arrival in window {
            let job = arrival.delivery.message.job_id;
            match arrivals.insert(job, arrival) {
                None => jobs.push(job),
                // Published twice.
                Some(twin) => settled.push(twin),
            }
        }
        let lease = self.context.lease_time();
        let ask = || self.context.store.claim(&self.context.id, &jobs, lease);
        let claim = match self.context.until_stored("claim", &self.stop, ask).await {
            Ok(claim) => claim,
            Err(error) => {
                tracing::error!(worker.id = %self.context.id, %error, jobs = jobs.len(), "a window could not be claimed: it goes back");
                join_all(arrivals.values().map(|arrival| arrival.receipt.give_back())).await;
                self.stop.run_until_cancelled(tokio::time::sleep(Duration::from_secs(1))).await;
                return;
            }
        };
        let claimed_at = self.context.clock.now();
        let held: Vec<_> = claim
            .claimed
            .into_iter()
            .filter_map(|ClaimedJob { lease, spec }| {
                let receipt = arrivals.remove(&lease.job_id)?.receipt;
                let (spec, stage) = (Arc::new(spec), Stage::Waiting);
                Some(Held { lease, spec, receipt, claimed_at, stage, lost: false, cancelled: false })
            })
            .collect();
        settled.extend(arrivals.into_values());
        if !settled.is_empty() {
            let deferred = claim.deferred.len();
            tracing::debug!(worker.id = %self.context.id, deliveries = settled.len(), deferred, "deliveries that are not ours to render");
        }
        let (ours, strays): (Vec<_>, Vec<_>) = held.into_iter().partition(|held| self.is_ours(held));
        self.give_up(strays).await;
        self.send_on(ours).await;
        join_all(settled.iter().map(|arrival| arrival.receipt.ack())).await;
    }

    /// The store knows best where a job belongs: another checkpoint's must not be rendered with this one.
    /// And a job whose earlier lease was lost may be back before that attempt has been cleared away.
    fn is_ours(&self, held: &Held) -> bool {
        held.spec.model == self.model && self.context.holdings.get(held.lease.job_id).is_none()
    }

    async fn give_up(&self, strays: Vec<Held>) {
        if strays.is_empty() {
            return;
        }
        let leases: Vec<_> = strays.iter().map(|held| held.lease.clone()).collect();
        let release = || self.context.store.release(&leases);
        if let Err(error) = self.context.until_stored("release strays", &self.stop, release).await {
            tracing::error!(%error, "leases could not be released: they will expire");
        }
        join_all(strays.iter().map(|held| held.receipt.ack())).await;
    }

    async fn send_on(&self, ours: Vec<Held>) {
        self.context.holdings.add(ours.iter().cloned());
        match &self.fate {
            Fate::Render => {
                // What starts from noise alone waits for nothing.
                let (fetching, ready): (Vec<_>, Vec<_>) =
                    ours.into_iter().partition(|held| held.spec.init_image.is_some());
                let row = |held: Held| NewRow { job_id: held.lease.job_id, spec: held.spec, init: None };
                self.add(ready.into_iter().map(row).collect()).await;
                let rows = join_all(fetching.into_iter().map(|held| self.fetch(held))).await;
                self.add(rows.into_iter().flatten().collect()).await;
            }
            Fate::Refuse(failure) => {
                let fail = |held: &Held| settle::fail_quietly(self.context, held.lease.job_id, failure);
                join_all(ours.iter().map(fail)).await;
            }
        }
    }
}

impl Intake<'_> {
    async fn add(&self, rows: Vec<NewRow>) {
        if !rows.is_empty() && self.context.device.add(rows).await.is_err() {
            self.context.stop.cancel();
        }
    }

    /// A row with the pictures that it starts from; `None` where that did not come about, which is settled then.
    async fn fetch(&self, held: Held) -> Option<NewRow> {
        let job_id = held.lease.job_id;
        match inputs::fetch(self.context, &held.spec).await {
            Ok(init) => {
                // Nobody could take the row from the device while it was not there.
                let held = self.context.holdings.get(job_id)?;
                match (held.lost, held.cancelled) {
                    (true, _) => settle::lost(self.context, job_id).await,
                    (_, true) => settle::cancelled(self.context, job_id).await,
                    _ => return Some(NewRow { job_id, spec: held.spec, init }),
                }
            }
            Err(NoInput::Failed(failure)) => settle::failed(self.context, job_id, failure).await,
            Err(NoInput::Stopped) => settle::released(self.context, vec![job_id]).await,
        }
        None
    }
}

/// Leases of bulk jobs that this worker holds at most.
fn capacity(context: &Context) -> usize {
    (context.config.max_batch.max(1) + context.config.window) as usize
}
