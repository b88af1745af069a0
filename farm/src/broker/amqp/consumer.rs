//! A subscription on a channel of its own. When the channel goes, for whatever reason, so does the subscription.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard};

use async_trait::async_trait;
use futures_util::StreamExt;
use lapin::Channel;
use lapin::options::{BasicAckOptions, BasicCancelOptions, BasicConsumeOptions, BasicQosOptions, BasicRejectOptions};
use lapin::types::FieldTable;
use tokio::time::timeout;

use super::super::{Acker, BrokerError, Consumer, Delivery, DeliveryTag, Result};
use super::link::{ANSWER_TIMEOUT, answered};
use super::wire::decode_job;

/// See the module. Dropping it closes the channel, so that the broker gives unacked messages to others.
pub(super) struct AmqpConsumer {
    channel: Channel,
    deliveries: lapin::Consumer,
    queue: String,
    loans: Arc<Loans>,
    phase: Phase,
}

enum Phase {
    Open,
    /// No more is asked for; what was prefetched may still come.
    Stopping,
    Finished,
    Broken(String),
}

/// What the broker has lent and wants settled: also what makes a second ack harmless, for which the broker would close
/// the channel.
#[derive(Default)]
struct Loans {
    unacked: Mutex<HashMap<DeliveryTag, lapin::Acker>>,
}

impl AmqpConsumer {
    /// Subscribes. The queue must exist.
    pub(super) async fn open(channel: Channel, queue: String, prefetch: u16) -> Result<Self> {
        answered("setting the prefetch", channel.basic_qos(prefetch.max(1), BasicQosOptions::default())).await?;
        let subscribed = channel.basic_consume(
            queue.as_str().into(),
            "".into(),
            BasicConsumeOptions::default(),
            FieldTable::default(),
        );
        let deliveries = answered("subscribing", subscribed).await?;
        Ok(Self { channel, deliveries, queue, loans: Arc::default(), phase: Phase::Open })
    }

    /// Ends the subscription: nothing of it can be settled any more.
    fn end(&mut self, phase: Phase) {
        self.loans.unacked().clear();
        self.phase = phase;
    }

    /// Registers a delivery, or sends what cannot be read to the dead-letter queue.
    async fn accept(&self, delivery: lapin::message::Delivery) -> Option<Delivery> {
        match decode_job(&delivery.data) {
            Ok(message) => {
                let tag = DeliveryTag(delivery.delivery_tag);
                self.loans.unacked().insert(tag, delivery.acker);
                Some(Delivery { tag, message })
            }
            Err(reason) => {
                let id = delivery.properties.message_id().as_ref().map(|id| id.as_str());
                tracing::error!(queue = self.queue, message.id = id, reason, "dead-lettered an unreadable message");
                // The request leaves with the first poll, so that it is not lost if this future is dropped. If it
                // fails, the channel has gone, and the message comes again.
                let rejected = delivery.acker.reject(BasicRejectOptions { requeue: false });
                let _ = timeout(ANSWER_TIMEOUT, rejected).await;
                None
            }
        }
    }
}

#[async_trait]
impl Consumer for AmqpConsumer {
    async fn next(&mut self) -> Result<Option<Delivery>> {
        loop {
            match &self.phase {
                Phase::Finished => return Ok(None),
                Phase::Broken(reason) => return Err(BrokerError::unavailable(reason.as_str())),
                Phase::Open | Phase::Stopping => {}
            }
            match self.deliveries.next().await {
                Some(Ok(delivery)) => {
                    if let Some(delivery) = self.accept(delivery).await {
                        return Ok(Some(delivery));
                    }
                }
                // Polling again would wait forever.
                None if matches!(self.phase, Phase::Stopping) => self.phase = Phase::Finished,
                None => self.end(Phase::Broken(format!("the broker ended the subscription to `{}`", self.queue))),
                Some(Err(error)) => {
                    self.end(Phase::Broken(format!("the subscription to `{}` broke: {error}", self.queue)));
                }
            }
        }
    }

    fn acker(&self) -> Arc<dyn Acker> {
        self.loans.clone()
    }

    async fn stop(&mut self) -> Result<()> {
        if !matches!(self.phase, Phase::Open) {
            return Ok(());
        }
        self.phase = Phase::Stopping;
        let cancelled = self.channel.basic_cancel(self.deliveries.tag(), BasicCancelOptions::default());
        let cancelled = answered("ending a subscription", cancelled).await;
        if let Err(error) = &cancelled {
            self.end(Phase::Broken(error.to_string()));
        }
        cancelled
    }
}

impl Drop for AmqpConsumer {
    fn drop(&mut self) {
        self.loans.unacked().clear();
    }
}

impl Loans {
    fn unacked(&self) -> MutexGuard<'_, HashMap<DeliveryTag, lapin::Acker>> {
        self.unacked.lock().expect("no thread panics while it holds this lock")
    }

    /// Sends a settlement; false if the delivery is not ours to settle or the channel has gone.
    async fn settle(&self, settled: impl Future<Output = lapin::Result<bool>>) -> Result<bool> {
        match timeout(ANSWER_TIMEOUT, settled).await {
            Ok(answer) => Ok(answer.unwrap_or(false)),
            Err(_) => Err(BrokerError::unavailable("the broker takes no acknowledgements")),
        }
    }
}

#[async_trait]
impl Acker for Loans {
    async fn ack(&self, tag: DeliveryTag) -> Result<bool> {
        let Some(acker) = self.unacked().remove(&tag) else { return Ok(false) };
        self.settle(acker.ack(BasicAckOptions::default())).await
    }

    async fn requeue(&self, tag: DeliveryTag) -> Result<bool> {
        let Some(acker) = self.unacked().remove(&tag) else { return Ok(false) };
        self.settle(acker.reject(BasicRejectOptions { requeue: true })).await
    }
}
