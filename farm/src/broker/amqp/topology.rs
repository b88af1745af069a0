//! Exchanges, queues and bindings: their names, and the only place that declares them. Kept to what RabbitMQ 3.10 to
//! 4.x agree on.
//!
//! | name | what |
//! |---|---|
//! | `PREFIX.jobs` | direct exchange; the routing key is the queue's name |
//! | `PREFIX.jobs.LANE.MODEL` | durable quorum queue of one checkpoint and lane |
//! | `PREFIX.dead` | fanout exchange and durable quorum queue for messages that cannot be read |
//! | `PREFIX.progress` | topic exchange; the routing key is `job.ID` |
//! | `PREFIX.progress.ID` | a watching process's own queue, gone with it |

use std::collections::HashSet;
use std::sync::{Mutex, MutexGuard};

use lapin::options::{ExchangeDeclareOptions, QueueBindOptions, QueueDeclareOptions};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{Channel, ExchangeKind};
use sha2::{Digest, Sha256};
use uuid::Uuid;

use super::super::{BrokerError, Result};
use super::link::answered;
use crate::id::JobId;
use crate::message::QueueKey;

/// Deliveries after which the broker dead-letters a message. Not a count of attempts (those are the store's): every
/// message that a consumer held, if only prefetched, counts one delivery more when its connection breaks. Given
/// because RabbitMQ 4 would otherwise take 20, and finite because 3.10 knows no other way. A job whose message ends
/// there is not lost: its row stays queued, and the reconciler sends it again.
const DELIVERY_LIMIT: i32 = 100_000;

/// Dead messages kept for a look; the oldest go first.
const DEAD_LIMIT: i32 = 100_000;

/// Events that may wait for one watching process; the oldest go first.
const PROGRESS_LIMIT: i32 = 10_000;

/// Bytes of a prefix, and of a model's name within a queue's name. AMQP allows names of 255.
const PREFIX_BYTES: usize = 64;
const MODEL_BYTES: usize = 140;

/// The names below one prefix.
pub(super) struct Topology {
    prefix: String,
}

/// What was declared over one link's connection. Another connection may meet another broker: it starts anew.
#[derive(Default)]
pub(super) struct Declared(Mutex<(u64, HashSet<String>)>);

impl Declared {
    /// Somebody found that what was declared is gone.
    pub(super) fn forget(&self) {
        self.names().1.clear();
    }

    fn has(&self, generation: u64, name: &str) -> bool {
        let names = self.names();
        names.0 == generation && names.1.contains(name)
    }

    fn add(&self, generation: u64, name: &str) {
        let mut names = self.names();
        if names.0 != generation {
            *names = (generation, HashSet::new());
        }
        names.1.insert(name.to_owned());
    }

    fn names(&self) -> MutexGuard<'_, (u64, HashSet<String>)> {
        self.0.lock().expect("no thread panics while it holds this lock")
    }
}

impl Topology {
    /// The names below `prefix`.
    pub(super) fn new(prefix: &str) -> Result<Self> {
        let allowed = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
        if prefix.is_empty() || prefix.len() > PREFIX_BYTES || !prefix.chars().all(allowed) {
            return Err(BrokerError::internal(format!(
                "the broker's prefix must be 1 to {PREFIX_BYTES} letters, digits, `.`, `_` or `-`, but is `{prefix}`"
            )));
        }
        Ok(Self { prefix: prefix.to_owned() })
    }

    /// The exchange that jobs are published to.
    pub(super) fn jobs(&self) -> String {
        format!("{}.jobs", self.prefix)
    }

    /// The exchange that progress is published to.
    pub(super) fn progress(&self) -> String {
        format!("{}.progress", self.prefix)
    }

    /// The exchange and queue of messages that cannot be read.
    pub(super) fn dead(&self) -> String {
        format!("{}.dead", self.prefix)
    }

    /// A queue's name, which is also its routing key.
    pub(super) fn queue(&self, queue: &QueueKey) -> String {
        format!("{}.{}.{}", self.jobs(), queue.lane.as_str(), safe(&queue.model))
    }

    /// The routing key of a job's progress.
    pub(super) fn progress_key(job: JobId) -> String {
        format!("job.{job}")
    }

    /// Declares what every process needs. `generation` numbers the channel's connection.
    pub(super) async fn ensure_exchanges(&self, channel: &Channel, declared: &Declared, generation: u64) -> Result<()> {
        if declared.has(generation, &self.prefix) {
            return Ok(());
        }
        let kinds = [
            (self.jobs(), ExchangeKind::Direct),
            (self.dead(), ExchangeKind::Fanout),
            (self.progress(), ExchangeKind::Topic),
        ];
        for (name, kind) in kinds {
            let options = ExchangeDeclareOptions { durable: true, ..Default::default() };
            let answer = channel.exchange_declare(name.as_str().into(), kind, options, FieldTable::default());
            answered("declaring an exchange", answer).await?;
        }
        let arguments = table([("x-queue-type", text("quorum")), ("x-max-length", AMQPValue::LongInt(DEAD_LIMIT))]);
        self.declare_bound(channel, &self.dead(), &self.dead(), "", arguments).await?;
        declared.add(generation, &self.prefix);
        Ok(())
    }

    /// Declares a queue of jobs.
    pub(super) async fn ensure_queue(
        &self,
        channel: &Channel,
        declared: &Declared,
        generation: u64,
        queue: &str,
    ) -> Result<()> {
        self.ensure_exchanges(channel, declared, generation).await?;
        if declared.has(generation, queue) {
            return Ok(());
        }
        let arguments = table([
            ("x-queue-type", text("quorum")),
            ("x-delivery-limit", AMQPValue::LongInt(DELIVERY_LIMIT)),
            ("x-dead-letter-exchange", text(&self.dead())),
        ]);
        self.declare_bound(channel, queue, &self.jobs(), queue, arguments).await?;
        declared.add(generation, queue);
        Ok(())
    }

    /// Declares this process's own queue for progress, and its name. It goes when the connection does.
    pub(super) async fn declare_progress_queue(&self, channel: &Channel) -> Result<String> {
        let name = format!("{}.{}", self.progress(), Uuid::now_v7());
        // Named, since a virtual host may make quorum queues by default, and those cannot be exclusive.
        let arguments =
            table([("x-queue-type", text("classic")), ("x-max-length", AMQPValue::LongInt(PROGRESS_LIMIT))]);
        let options = QueueDeclareOptions { exclusive: true, auto_delete: true, ..Default::default() };
        let declared = channel.queue_declare(name.as_str().into(), options, arguments);
        answered("declaring the progress queue", declared).await?;
        Ok(name)
    }

    async fn declare_bound(
        &self,
        channel: &Channel,
        queue: &str,
        exchange: &str,
        key: &str,
        arguments: FieldTable,
    ) -> Result<()> {
        let options = QueueDeclareOptions { durable: true, ..Default::default() };
        let declared = channel.queue_declare(queue.into(), options, arguments);
        answered("declaring a queue", declared).await?;
        let bound = channel.queue_bind(
            queue.into(),
            exchange.into(),
            key.into(),
            QueueBindOptions::default(),
            FieldTable::default(),
        );
        answered("binding a queue", bound).await
    }
}

/// Writes any name with letters, digits and `._-%` alone, no two names alike: other bytes become `%XX`, and a
/// long name is cut and gets its hash.
fn safe(name: &str) -> String {
    let mut escaped = String::new();
    for byte in name.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'.' | b'_' | b'-' => escaped.push(char::from(byte)),
            _ => escaped.push_str(&format!("%{byte:02X}")),
        }
    }
    if escaped.len() <= MODEL_BYTES {
        return escaped;
    }
    let hash: String = Sha256::digest(name).iter().take(16).map(|byte| format!("{byte:02x}")).collect();
    // `~` occurs in no escaped name, so a cut name never equals a whole one.
    format!("{}~{hash}", &escaped[..MODEL_BYTES - hash.len() - 1])
}

fn table<const N: usize>(entries: [(&str, AMQPValue); N]) -> FieldTable {
    let mut table = FieldTable::default();
    for (key, value) in entries {
        table.insert(key.into(), value);
    }
    table
}

fn text(value: &str) -> AMQPValue {
    AMQPValue::LongString(value.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::job::Lane;

    fn name(model: &str) -> String {
        let topology = Topology::new("kiln").unwrap();
        topology.queue(&QueueKey { model: model.into(), lane: Lane::Bulk })
    }

    #[test]
    fn ordinary_names_stay_readable() {
        assert_eq!(name("demo"), "kiln.jobs.bulk.demo");
        assert_eq!(name("org/name-v1.5"), "kiln.jobs.bulk.org%2Fname-v1.5");
    }

    #[test]
    fn no_two_names_share_a_queue_and_none_is_too_long() {
        let long = "ü".repeat(300);
        let models = ["a/b", "a%2Fb", "a b", "a_b", "", "~", "größe", "*.#", &long, &long[2..], &"x".repeat(300)];
        let names: HashSet<_> = models.iter().map(|model| name(model)).collect();
        assert_eq!(names.len(), models.len());
        for name in &names {
            assert!(name.len() <= 255, "{name}");
            assert!(name.chars().all(|c| c.is_ascii_alphanumeric() || "._-%~".contains(c)), "{name}");
        }
    }

    #[test]
    fn a_prefix_that_cannot_be_part_of_every_name_is_refused() {
        for prefix in ["", "a b", "a/b", "ä", &"x".repeat(PREFIX_BYTES + 1)] {
            let error = Topology::new(prefix).err().expect("it is refused").to_string();
            assert!(error.contains("prefix") && error.contains("64"), "{error}");
        }
    }
}
