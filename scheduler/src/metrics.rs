//! What the scheduler counts about itself. One value, cloned to whoever counts; `/metrics` writes it out.

use std::fmt;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use farm::fleet::WorkerStatus;
use farm::job::JobState;
use farm::message::QueueKey;
use prometheus_client::encoding::{EncodeLabelSet, text};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};

/// Upper ends of the latency buckets in seconds.
const LATENCY_BUCKETS: [f64; 12] = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 5.0, 30.0, 300.0];

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct RequestLabels {
    method: String,
    route: String,
    status: u16,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct RouteLabels {
    method: String,
    route: String,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct QueueLabels {
    model: String,
    lane: String,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct StateLabels {
    state: String,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct WorkerLabels {
    worker: String,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct LoopLabels {
    name: String,
}

impl From<&QueueKey> for QueueLabels {
    fn from(queue: &QueueKey) -> Self {
        Self { model: queue.model.clone(), lane: queue.lane.as_str().to_owned() }
    }
}

/// Counters that grow while the process lives, and gauges that are set anew for each reading.
#[derive(Clone)]
pub(crate) struct Metrics {
    http_requests: Family<RequestLabels, Counter>,
    http_seconds: Family<RouteLabels, Histogram, fn() -> Histogram>,
    streams: Gauge,
    jobs_submitted: Counter,
    jobs_dispatched: Family<QueueLabels, Counter>,
    jobs_reaped: Family<StateLabels, Counter>,
    jobs_reconciled: Family<QueueLabels, Counter>,
    leftovers_deleted: Counter,
    loop_errors: Family<LoopLabels, Counter>,
    jobs: Family<StateLabels, Gauge>,
    queue_waiting: Family<QueueLabels, Gauge>,
    queue_queued: Family<QueueLabels, Gauge>,
    queue_ready: Family<QueueLabels, Gauge>,
    workers_alive: Gauge,
    embedding_hits: Family<WorkerLabels, Counter>,
    embedding_misses: Family<WorkerLabels, Counter>,
    embedding_bytes: Family<WorkerLabels, Gauge>,
    encoder_reads: Family<WorkerLabels, Counter>,
    encoder_bytes: Family<WorkerLabels, Gauge>,
    unread: Family<LoopLabels, Gauge>,
}

impl fmt::Debug for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Metrics").finish_non_exhaustive()
    }
}

/// What is true about a queue at the time of a reading.
#[derive(Clone, Debug)]
pub(crate) struct QueueReading {
    /// The queue.
    pub(crate) queue: QueueKey,
    /// Jobs waiting in the store, `queued` ones included.
    pub(crate) waiting: u64,
    /// Of those, `queued` ones.
    pub(crate) queued: u64,
    /// Messages ready on the broker, if it answered.
    pub(crate) ready: Option<u64>,
}

impl Metrics {
    pub(crate) fn new() -> Self {
        Self {
            http_requests: Family::default(),
            http_seconds: Family::new_with_constructor(|| Histogram::new(LATENCY_BUCKETS)),
            streams: Gauge::default(),
            jobs_submitted: Counter::default(),
            jobs_dispatched: Family::default(),
            jobs_reaped: Family::default(),
            jobs_reconciled: Family::default(),
            leftovers_deleted: Counter::default(),
            loop_errors: Family::default(),
            jobs: Family::default(),
            queue_waiting: Family::default(),
            queue_queued: Family::default(),
            queue_ready: Family::default(),
            workers_alive: Gauge::default(),
            embedding_hits: Family::default(),
            embedding_misses: Family::default(),
            embedding_bytes: Family::default(),
            encoder_reads: Family::default(),
            encoder_bytes: Family::default(),
            unread: Family::default(),
        }
    }

    /// An HTTP request has been answered.
    pub(crate) fn request_answered(&self, method: &str, route: &str, status: u16, after: Duration) {
        let (method, route) = (method.to_owned(), route.to_owned());
        let labels = RequestLabels { method: method.clone(), route: route.clone(), status };
        self.http_requests.get_or_create(&labels).inc();
        self.http_seconds.get_or_create(&RouteLabels { method, route }).observe(after.as_secs_f64());
    }

    /// A client has begun to watch a job; it stops when the guard is dropped.
    pub(crate) fn stream_opened(&self) -> OpenStream {
        self.streams.inc();
        OpenStream(self.streams.clone())
    }

    pub(crate) fn submitted(&self, jobs: u64) {
        self.jobs_submitted.inc_by(jobs);
    }

    pub(crate) fn dispatched(&self, queue: &QueueKey, jobs: u64) {
        self.jobs_dispatched.get_or_create(&queue.into()).inc_by(jobs);
    }

    /// Expired leases, by the state that their jobs went to.
    pub(crate) fn reaped(&self, state: JobState, jobs: u64) {
        self.jobs_reaped.get_or_create(&StateLabels { state: state.as_str().to_owned() }).inc_by(jobs);
    }

    pub(crate) fn reconciled(&self, queue: &QueueKey, jobs: u64) {
        self.jobs_reconciled.get_or_create(&queue.into()).inc_by(jobs);
    }

    pub(crate) fn leftovers_deleted(&self, leftovers: u64) {
        self.leftovers_deleted.inc_by(leftovers);
    }

    pub(crate) fn loop_failed(&self, name: &str) {
        self.loop_errors.get_or_create(&LoopLabels { name: name.to_owned() }).inc();
    }

    /// Sets the gauge of each state.
    pub(crate) fn read_jobs(&self, counters: impl IntoIterator<Item = (JobState, u64)>) {
        for (state, jobs) in counters {
            self.jobs.get_or_create(&StateLabels { state: state.as_str().to_owned() }).set(gauge(jobs));
        }
    }

    /// Sets the gauges of the queues; those that are not named have nothing waiting and vanish.
    pub(crate) fn read_queues(&self, queues: &[QueueReading]) {
        for family in [&self.queue_waiting, &self.queue_queued, &self.queue_ready] {
            family.clear();
        }
        for reading in queues {
            let labels = QueueLabels::from(&reading.queue);
            self.queue_waiting.get_or_create(&labels).set(gauge(reading.waiting));
            self.queue_queued.get_or_create(&labels).set(gauge(reading.queued));
            if let Some(ready) = reading.ready {
                self.queue_ready.get_or_create(&labels).set(gauge(ready));
            }
        }
    }

    /// Sets what is known of the workers that are alive; those of the others vanish.
    pub(crate) fn read_workers(&self, alive: &[WorkerStatus]) {
        self.workers_alive.set(gauge(alive.len() as u64));
        for family in [&self.embedding_hits, &self.embedding_misses, &self.encoder_reads] {
            family.clear();
        }
        for family in [&self.embedding_bytes, &self.encoder_bytes] {
            family.clear();
        }
        for WorkerStatus { worker_id, text, .. } in alive {
            let labels = WorkerLabels { worker: worker_id.0.clone() };
            // Counted by the worker; set here, so that readings at the same time agree.
            let count = |family: &Family<WorkerLabels, Counter>, value: u64| {
                family.get_or_create(&labels).inner().store(value, Relaxed);
            };
            count(&self.embedding_hits, text.embedding_hits);
            count(&self.embedding_misses, text.embedding_misses);
            count(&self.encoder_reads, text.encoder_reads);
            self.embedding_bytes.get_or_create(&labels).set(gauge(text.embedding_bytes));
            self.encoder_bytes.get_or_create(&labels).set(gauge(text.encoder_bytes));
        }
    }

    /// Whether the gauges that come from `name` could be read this time.
    pub(crate) fn read_from(&self, name: &str, ok: bool) {
        self.unread.get_or_create(&LoopLabels { name: name.to_owned() }).set(i64::from(!ok));
    }

    /// Everything in the OpenMetrics text format, which Prometheus reads.
    pub(crate) fn encode(&self) -> Result<String, fmt::Error> {
        let mut registry = Registry::with_prefix("kiln");
        registry.register("http_requests", "HTTP requests answered", self.http_requests.clone());
        registry.register("http_request_seconds", "Time until the answer began", self.http_seconds.clone());
        registry.register("http_streams", "Job streams open", self.streams.clone());
        registry.register("jobs_submitted", "Jobs accepted", self.jobs_submitted.clone());
        registry.register("jobs_dispatched", "Jobs put on the broker", self.jobs_dispatched.clone());
        registry.register(
            "jobs_reaped",
            "Jobs whose lease expired, by the state they went to",
            self.jobs_reaped.clone(),
        );
        registry.register(
            "jobs_reconciled",
            "Jobs that the broker had lost, back to pending",
            self.jobs_reconciled.clone(),
        );
        registry.register(
            "leftovers_deleted",
            "Attempts that did not win, whose objects were deleted",
            self.leftovers_deleted.clone(),
        );
        registry.register("loop_errors", "Sweeps of a loop that failed", self.loop_errors.clone());
        registry.register("jobs", "Jobs by state", self.jobs.clone());
        registry.register(
            "queue_waiting",
            "Jobs of a queue that wait (counted up to a bound)",
            self.queue_waiting.clone(),
        );
        registry.register("queue_queued", "Of those, jobs that are on the broker", self.queue_queued.clone());
        registry.register("queue_ready", "Messages of a queue that no worker holds", self.queue_ready.clone());
        registry.register("workers_alive", "Workers heard of lately", self.workers_alive.clone());
        self.register_text(&mut registry);
        registry.register("unread", "1 if the gauges from this source are stale", self.unread.clone());
        let mut out = String::new();
        text::encode(&mut out, &registry)?;
        Ok(out)
    }

    fn register_text(&self, registry: &mut Registry) {
        let hits = "Embeddings of prompts that a worker remembered";
        registry.register("worker_embedding_hits", hits, self.embedding_hits.clone());
        let misses = "Embeddings of prompts that a worker had to compute";
        registry.register("worker_embedding_misses", misses, self.embedding_misses.clone());
        let bytes = "Embeddings that a worker remembers";
        registry.register_with_unit("worker_embedding", bytes, Unit::Bytes, self.embedding_bytes.clone());
        let reads = "Times that a worker read a text encoder's weights";
        registry.register("worker_encoder_reads", reads, self.encoder_reads.clone());
        let bytes = "Weights of text encoders in a worker's memory, about";
        registry.register_with_unit("worker_encoder", bytes, Unit::Bytes, self.encoder_bytes.clone());
    }
}

fn gauge(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

/// Counts an open stream until dropped.
#[derive(Debug)]
pub(crate) struct OpenStream(Gauge);

impl Drop for OpenStream {
    fn drop(&mut self) {
        self.0.dec();
    }
}
