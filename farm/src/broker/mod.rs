//! The broker: carries jobs from the scheduler to the workers, and news back. Two implementations,
//! [`amqp`] for a farm and [`memory`] for one process, held together by one conformance suite.

pub mod amqp;
pub mod memory;
mod watchers;

use std::pin::Pin;
use std::sync::Arc;

use async_trait::async_trait;
use futures_util::Stream;

use crate::id::JobId;
use crate::message::{JobMessage, ProgressEvent, QueueKey};

/// What can go wrong with a broker.
#[derive(Debug, thiserror::Error)]
pub enum BrokerError {
    /// Nobody answers, or the connection broke: try again later.
    #[error("the broker is unavailable: {0}")]
    Unavailable(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// An error that trying again will not mend.
    #[error("the broker failed: {0}")]
    Internal(#[source] Box<dyn std::error::Error + Send + Sync>),
}

impl BrokerError {
    /// Something that time may mend.
    pub fn unavailable(reason: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        Self::Unavailable(reason.into())
    }

    /// Something that time will not mend.
    pub fn internal(reason: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        Self::Internal(reason.into())
    }
}

/// Shorthand.
pub type Result<T, E = BrokerError> = std::result::Result<T, E>;

/// A delivery's handle on its consumer. Means nothing once that consumer's stream has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct DeliveryTag(pub u64);

/// A message on loan to a worker.
#[derive(Clone, Debug, PartialEq)]
pub struct Delivery {
    /// How to ack or give it back.
    pub tag: DeliveryTag,
    /// The job.
    pub message: JobMessage,
}

/// A worker's subscription to one queue. Deliveries that are not acked when it is dropped go back
/// to the queue.
#[async_trait]
pub trait Consumer: Send + Sync {
    /// The next delivery. `Ok(None)` once [`Consumer::stop`] was called and nothing is left; an error
    /// means that the subscription is gone, and every unacked delivery with it: subscribe anew. A
    /// message that cannot be read goes to the dead-letter queue and is logged, never returned.
    /// Cancel-safe.
    async fn next(&mut self) -> Result<Option<Delivery>>;

    /// A handle that acks from other tasks.
    fn acker(&self) -> Arc<dyn Acker>;

    /// Asks the broker for no more.
    async fn stop(&mut self) -> Result<()>;
}

/// Settles deliveries of one consumer.
#[async_trait]
pub trait Acker: Send + Sync {
    /// Done with it. False if the subscription it came by is gone (it will be delivered again).
    async fn ack(&self, tag: DeliveryTag) -> Result<bool>;

    /// Gives it back to the queue.
    async fn requeue(&self, tag: DeliveryTag) -> Result<bool>;
}

/// News of running jobs.
pub type ProgressStream = Pin<Box<dyn Stream<Item = ProgressEvent> + Send>>;

/// Carries jobs to workers and news back. Reconnects by itself; while it cannot, calls fail with
/// [`BrokerError::Unavailable`] within a bounded time.
#[async_trait]
pub trait Broker: Send + Sync + 'static {
    /// Answers if the broker can be reached.
    async fn ping(&self) -> Result<()>;

    /// Publishes jobs durably, each to its queue, which is declared if it does not exist. Returns for each
    /// message, in order, whether the broker has confirmed it; what is not confirmed may or may not
    /// have arrived.
    async fn publish(&self, queue: &QueueKey, messages: &[JobMessage]) -> Result<Vec<bool>>;

    /// Messages ready in a queue (0 if it does not exist).
    async fn depth(&self, queue: &QueueKey) -> Result<u64>;

    /// Throws a queue's ready messages away; how many. For tests and operators.
    async fn purge(&self, queue: &QueueKey) -> Result<u64>;

    /// Subscribes to a queue with at most `prefetch` unacked deliveries.
    async fn consume(&self, queue: &QueueKey, prefetch: u16) -> Result<Box<dyn Consumer>>;

    /// Sends news to whoever watches the job; nobody watching is fine. Never waits for the network
    /// longer than to hand the message over.
    async fn announce(&self, event: &ProgressEvent) -> Result<()>;

    /// Watches one job, from now on. The stream ends when the connection does (subscribe anew and
    /// read the store in between).
    async fn watch(&self, job: JobId) -> Result<ProgressStream>;
}

/// A shared broker.
pub type SharedBroker = Arc<dyn Broker>;

/// The broker that a URL names: `amqp://…` or `amqps://…`, or empty or `memory:` for one in this process.
/// Every exchange and queue name begins with `prefix`. Returns at once, whether or not the broker can be
/// reached: [`Broker::ping`] tells. Connecting happens on the runtime that first uses it.
pub fn connect(url: &str, prefix: &str) -> Result<SharedBroker> {
    match url.split_once(':').map_or(url, |(scheme, _)| scheme) {
        "" | "memory" => Ok(Arc::new(memory::MemoryBroker::new())),
        "amqp" | "amqps" => Ok(Arc::new(amqp::AmqpBroker::new(url, prefix)?)),
        scheme => Err(BrokerError::internal(format!(
            "the broker's URL must begin with `amqp://` or `amqps://`, or be empty, but begins with `{scheme}`"
        ))),
    }
}
