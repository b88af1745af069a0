//! The broker of one process: queues in memory, under the same contract as the AMQP broker. What it holds
//! dies with the process; the reconciler sends those jobs again.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard};

use async_trait::async_trait;
use tokio::sync::Notify;

use super::watchers::Watchers;
use super::{Acker, Broker, Consumer, Delivery, DeliveryTag, ProgressStream, Result};
use crate::id::JobId;
use crate::message::{JobMessage, ProgressEvent, QueueKey};

/// Queues and watchers in this process's memory.
pub struct MemoryBroker {
    queues: Mutex<HashMap<QueueKey, Arc<Queue>>>,
    watchers: Arc<Watchers>,
}

impl MemoryBroker {
    /// No queue, no watcher.
    pub fn new() -> Self {
        Self { queues: Mutex::default(), watchers: Watchers::new(None) }
    }

    fn queue(&self, key: &QueueKey) -> Arc<Queue> {
        let mut queues = self.queues.lock().expect("no thread panics while it holds this lock");
        queues.entry(key.clone()).or_default().clone()
    }
}

impl Default for MemoryBroker {
    fn default() -> Self {
        Self::new()
    }
}

#[async_trait]
impl Broker for MemoryBroker {
    async fn ping(&self) -> Result<()> {
        Ok(())
    }

    async fn publish(&self, queue: &QueueKey, messages: &[JobMessage]) -> Result<Vec<bool>> {
        let queue = self.queue(queue);
        queue.ready().extend(messages.iter().cloned());
        queue.changed.notify_waiters();
        Ok(vec![true; messages.len()])
    }

    async fn depth(&self, queue: &QueueKey) -> Result<u64> {
        Ok(self.queue(queue).ready().len() as u64)
    }

    async fn purge(&self, queue: &QueueKey) -> Result<u64> {
        Ok(self.queue(queue).ready().drain(..).count() as u64)
    }

    async fn consume(&self, queue: &QueueKey, prefetch: u16) -> Result<Box<dyn Consumer>> {
        let subscription = Subscription {
            queue: self.queue(queue),
            prefetch: usize::from(prefetch.max(1)),
            loans: Mutex::new(Loans { next_tag: 1, unacked: BTreeMap::new() }),
        };
        Ok(Box::new(MemoryConsumer { subscription: Arc::new(subscription), stopped: false }))
    }

    async fn announce(&self, event: &ProgressEvent) -> Result<()> {
        self.watchers.announce(event.clone());
        Ok(())
    }

    async fn watch(&self, job: JobId) -> Result<ProgressStream> {
        Ok(self.watchers.watch(job))
    }
}

/// One queue.
#[derive(Default)]
struct Queue {
    ready: Mutex<VecDeque<JobMessage>>,
    /// Something arrived or somebody may take more.
    changed: Notify,
}

impl Queue {
    fn ready(&self) -> MutexGuard<'_, VecDeque<JobMessage>> {
        self.ready.lock().expect("no thread panics while it holds this lock")
    }

    /// Puts messages back in front, in the order given.
    fn give_back(&self, messages: impl DoubleEndedIterator<Item = JobMessage>) {
        let mut ready = self.ready();
        for message in messages.rev() {
            ready.push_front(message);
        }
        drop(ready);
        self.changed.notify_waiters();
    }
}

/// What a consumer and its ackers share.
struct Subscription {
    queue: Arc<Queue>,
    prefetch: usize,
    loans: Mutex<Loans>,
}

/// What a consumer holds.
struct Loans {
    next_tag: u64,
    unacked: BTreeMap<DeliveryTag, JobMessage>,
}

impl Subscription {
    fn loans(&self) -> MutexGuard<'_, Loans> {
        self.loans.lock().expect("no thread panics while it holds this lock")
    }

    /// Lends the next message, if there is one and the prefetch bound allows it.
    fn lend(&self) -> Option<Delivery> {
        let mut loans = self.loans();
        if loans.unacked.len() >= self.prefetch {
            return None;
        }
        let message = self.queue.ready().pop_front()?;
        let tag = DeliveryTag(loans.next_tag);
        loans.next_tag += 1;
        loans.unacked.insert(tag, message.clone());
        Some(Delivery { tag, message })
    }

    fn settle(&self, tag: DeliveryTag) -> Option<JobMessage> {
        let message = self.loans().unacked.remove(&tag)?;
        self.queue.changed.notify_waiters();
        Some(message)
    }
}

#[async_trait]
impl Acker for Subscription {
    async fn ack(&self, tag: DeliveryTag) -> Result<bool> {
        Ok(self.settle(tag).is_some())
    }

    async fn requeue(&self, tag: DeliveryTag) -> Result<bool> {
        let message = self.settle(tag);
        let held = message.is_some();
        self.queue.give_back(message.into_iter());
        Ok(held)
    }
}

/// A subscription; dropping it gives back what is unacked.
struct MemoryConsumer {
    subscription: Arc<Subscription>,
    stopped: bool,
}

#[async_trait]
impl Consumer for MemoryConsumer {
    async fn next(&mut self) -> Result<Option<Delivery>> {
        if self.stopped {
            return Ok(None);
        }
        loop {
            let mut changed = std::pin::pin!(self.subscription.queue.changed.notified());
            // Listening before looking: what arrives in between is not missed.
            changed.as_mut().enable();
            if let Some(delivery) = self.subscription.lend() {
                return Ok(Some(delivery));
            }
            changed.await;
        }
    }

    fn acker(&self) -> Arc<dyn Acker> {
        self.subscription.clone()
    }

    async fn stop(&mut self) -> Result<()> {
        self.stopped = true;
        Ok(())
    }
}

impl Drop for MemoryConsumer {
    fn drop(&mut self) {
        let unacked = std::mem::take(&mut self.subscription.loans().unacked);
        self.subscription.queue.give_back(unacked.into_values());
    }
}
