//! The broker of a farm: RabbitMQ 3.10 to 4.x through AMQP 0-9-1.
//!
//! Reading order: `topology` (names and declarations), `wire` (messages), `link` (connections), `publisher`,
//! `consumer`, `progress`.
//!
//! Two connections, since a broker short of memory stops reading from those that publish: one publishes, the other
//! consumes and asks. Both are made when first needed and made anew after they broke; calls meanwhile fail at once or
//! within seconds. Messages are hints: whatever the broker loses or gives twice, the store decides, and the
//! reconciler sends again what is missing.

mod consumer;
mod link;
mod progress;
mod publisher;
mod topology;
mod wire;

use std::sync::{Arc, OnceLock};

use async_trait::async_trait;
use lapin::options::{ExchangeDeleteOptions, QueueDeclareOptions, QueueDeleteOptions, QueuePurgeOptions};
use lapin::types::FieldTable;
use lapin::uri::AMQPUri;

use super::{Broker, BrokerError, Consumer, ProgressStream, Result};
use crate::id::JobId;
use crate::message::{JobMessage, ProgressEvent, QueueKey};
use consumer::AmqpConsumer;
use link::{Link, answered, is_not_found};
use progress::{Announcer, Receiver};
use publisher::Publisher;
use topology::Topology;

/// See the module.
pub struct AmqpBroker {
    publishing: Arc<Link>,
    consuming: Arc<Link>,
    topology: Arc<Topology>,
    announcer: OnceLock<Announcer>,
    receiver: OnceLock<Receiver>,
}

impl AmqpBroker {
    /// A broker that connects when it is first used. The URL is `amqp://` or `amqps://`, every name on the broker
    /// begins with `prefix`.
    pub fn new(url: &str, prefix: &str) -> Result<Self> {
        let is_absolute = url.starts_with("amqp://") || url.starts_with("amqps://");
        let parsed = if is_absolute { url.parse::<AMQPUri>() } else { Err("it has no `//`".into()) };
        // The URL holds a password: the message must not show it.
        let uri = parsed.map_err(|reason| {
            let form = "amqp://USER:PASSWORD@HOST[:PORT][/VHOST]";
            BrokerError::internal(format!("the broker's URL must have the form `{form}`, but {reason}"))
        })?;
        Ok(Self {
            publishing: Arc::new(Link::new(uri.clone(), format!("{prefix} publishing"))),
            consuming: Arc::new(Link::new(uri, format!("{prefix} consuming"))),
            topology: Arc::new(Topology::new(prefix)?),
            announcer: OnceLock::new(),
            receiver: OnceLock::new(),
        })
    }

    /// What a queue is called on the broker, for operators and tests.
    pub fn queue_name(&self, queue: &QueueKey) -> String {
        self.topology.queue(queue)
    }

    /// Deletes `queues`, with what is in them, and everything else below the prefix: for benches, tests and
    /// operators. It is fine if something does not exist.
    pub async fn dismantle(&self, queues: &[QueueKey]) -> Result<()> {
        let (channel, _) = self.consuming.new_channel().await?;
        let names = queues.iter().map(|queue| self.topology.queue(queue)).chain([self.topology.dead()]);
        for name in names {
            answered("deleting a queue", channel.queue_delete(name.into(), QueueDeleteOptions::default())).await?;
        }
        for name in [self.topology.jobs(), self.topology.dead(), self.topology.progress()] {
            let deleted = channel.exchange_delete(name.into(), ExchangeDeleteOptions::default());
            answered("deleting an exchange", deleted).await?;
        }
        self.publishing.declared().forget();
        self.consuming.declared().forget();
        answered("closing a channel", channel.close(200, "OK".into())).await
    }

    async fn subscribe(&self, queue: &QueueKey, prefetch: u16) -> Result<AmqpConsumer> {
        let (channel, generation) = self.consuming.new_channel().await?;
        let queue = self.topology.queue(queue);
        self.topology.ensure_queue(&channel, self.consuming.declared(), generation, &queue).await?;
        AmqpConsumer::open(channel, queue, prefetch).await
    }
}

#[async_trait]
impl Broker for AmqpBroker {
    async fn ping(&self) -> Result<()> {
        let (publishing, _) = self.publishing.connection().await?;
        if publishing.status().blocked() {
            return Err(BrokerError::unavailable("it accepts no messages: it is short of memory or disk space"));
        }
        // Something that the broker has to answer.
        let (channel, _) = self.consuming.new_channel().await?;
        answered("closing a channel", channel.close(200, "OK".into())).await
    }

    async fn publish(&self, queue: &QueueKey, messages: &[JobMessage]) -> Result<Vec<bool>> {
        Publisher { link: &self.publishing, topology: &self.topology }.publish(queue, messages).await
    }

    async fn depth(&self, queue: &QueueKey) -> Result<u64> {
        let (channel, _) = self.consuming.channel().await?;
        let passive = QueueDeclareOptions { passive: true, ..Default::default() };
        let declared = channel.queue_declare(self.topology.queue(queue).into(), passive, FieldTable::default());
        match answered("asking for a queue's depth", declared).await {
            Ok(queue) => {
                self.consuming.give_back(channel);
                Ok(u64::from(queue.message_count()))
            }
            // The answer closes the channel, so it is not given back.
            Err(error) if is_not_found(&error) => Ok(0),
            Err(error) => Err(error),
        }
    }

    async fn purge(&self, queue: &QueueKey) -> Result<u64> {
        let (channel, _) = self.consuming.channel().await?;
        let purged = channel.queue_purge(self.topology.queue(queue).into(), QueuePurgeOptions::default());
        match answered("purging a queue", purged).await {
            Ok(count) => {
                self.consuming.give_back(channel);
                Ok(u64::from(count))
            }
            Err(error) if is_not_found(&error) => Ok(0),
            Err(error) => Err(error),
        }
    }

    async fn consume(&self, queue: &QueueKey, prefetch: u16) -> Result<Box<dyn Consumer>> {
        match self.subscribe(queue, prefetch).await {
            Err(error) if is_not_found(&error) => {
                // Somebody deleted the queue since it was declared.
                self.consuming.declared().forget();
                Ok(Box::new(self.subscribe(queue, prefetch).await?))
            }
            subscribed => Ok(Box::new(subscribed?)),
        }
    }

    async fn announce(&self, event: &ProgressEvent) -> Result<()> {
        let start = || Announcer::start(self.publishing.clone(), self.topology.clone());
        self.announcer.get_or_init(start).announce(event.clone())
    }

    async fn watch(&self, job: JobId) -> Result<ProgressStream> {
        let start = || Receiver::start(self.consuming.clone(), self.topology.clone());
        self.receiver.get_or_init(start).watch(job).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_that_cannot_be_read_is_refused_without_showing_its_password() {
        for url in ["amqp:someone:secret@host", "amqp://someone:secret@host:notaport", "amqps://[secret"] {
            let error = AmqpBroker::new(url, "kiln").err().expect("it is refused").to_string();
            assert!(error.contains("amqp://USER:PASSWORD@HOST") && !error.contains("secret"), "{error}");
        }
    }
}
