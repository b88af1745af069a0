//! Publishing with confirms: a sliding window of messages whose confirms are awaited while later ones are sent.

use std::collections::VecDeque;
use std::time::Duration;

use lapin::options::{BasicPublishOptions, ConfirmSelectOptions};
use lapin::{BasicProperties, Channel, Confirmation, PublisherConfirm};
use tokio::time::{Instant, timeout_at};

use super::super::{BrokerError, Result};
use super::link::{Link, answered, failed};
use super::topology::Topology;
use super::wire::encode_job;
use crate::message::{JobMessage, QueueKey};

/// Messages under way at once.
const WINDOW: usize = 1000;
/// The broker is given up on after so long without a single confirm.
const SILENCE: Duration = Duration::from_secs(10);
/// A whole call takes no longer; what is not confirmed by then is reported so.
const WHOLE_CALL: Duration = Duration::from_secs(60);

/// Publishes jobs over one link.
pub(super) struct Publisher<'a> {
    pub(super) link: &'a Link,
    pub(super) topology: &'a Topology,
}

/// What became of one message.
#[derive(Clone, Copy, PartialEq)]
enum Fate {
    Confirmed,
    /// No queue was bound to its key.
    Returned,
    Unconfirmed,
}

impl Publisher<'_> {
    /// See [`super::super::Broker::publish`]. An error only where nothing was confirmed.
    pub(super) async fn publish(&self, queue: &QueueKey, messages: &[JobMessage]) -> Result<Vec<bool>> {
        if messages.is_empty() {
            return Ok(Vec::new());
        }
        let queue = self.topology.queue(queue);
        let deadline = Instant::now() + WHOLE_CALL;
        let mut fates = vec![Fate::Unconfirmed; messages.len()];
        let mut wanted: Vec<usize> = (0..messages.len()).collect();
        // A second round, with the queue declared anew, for what came back because somebody had deleted it.
        for _ in 0..2 {
            if let Err(error) = self.round(&queue, messages, &wanted, &mut fates, deadline).await {
                if !fates.contains(&Fate::Confirmed) {
                    return Err(error);
                }
                tracing::warn!(%error, queue, "publishing broke off");
                break;
            }
            wanted.retain(|&index| fates[index] == Fate::Returned);
            if wanted.is_empty() {
                break;
            }
            self.link.declared().forget();
        }
        Ok(fates.into_iter().map(|fate| fate == Fate::Confirmed).collect())
    }

    /// Publishes the wanted messages in order, and waits for their confirms.
    async fn round(
        &self,
        queue: &str,
        messages: &[JobMessage],
        wanted: &[usize],
        fates: &mut [Fate],
        mut deadline: Instant,
    ) -> Result<()> {
        let channel = self.open(queue).await?;
        let exchange = self.topology.jobs();
        let mut under_way = VecDeque::with_capacity(WINDOW.min(wanted.len()));
        let mut outcome = async {
            for &index in wanted {
                if under_way.len() == WINDOW {
                    settle(&mut under_way, fates, deadline).await?;
                }
                let (body, properties) = encode_job(&messages[index]);
                let sent = send(&channel, &exchange, queue, &body, properties, deadline).await?;
                under_way.push_back((index, sent));
            }
            Ok(())
        }
        .await;
        while !under_way.is_empty() {
            if let Err(error) = settle(&mut under_way, fates, deadline).await {
                outcome = outcome.and(Err(error));
                // Confirms that have come still count, but nothing more is waited for.
                deadline = Instant::now();
            }
        }
        if outcome.is_ok() {
            self.link.give_back(channel);
        }
        outcome
    }

    /// A channel that confirms, with the queue declared.
    async fn open(&self, queue: &str) -> Result<Channel> {
        let (connection, _) = self.link.connection().await?;
        if connection.status().blocked() {
            let message = "the broker accepts no messages: it is short of memory or disk space";
            return Err(BrokerError::unavailable(message));
        }
        let (channel, generation) = self.link.channel().await?;
        self.topology.ensure_queue(&channel, self.link.declared(), generation, queue).await?;
        if !channel.status().confirm() {
            answered("asking for confirms", channel.confirm_select(ConfirmSelectOptions::default())).await?;
        }
        Ok(channel)
    }
}

/// Hands one message over.
async fn send(
    channel: &Channel,
    exchange: &str,
    queue: &str,
    body: &[u8],
    properties: BasicProperties,
    deadline: Instant,
) -> Result<PublisherConfirm> {
    let options = BasicPublishOptions { mandatory: true, ..Default::default() };
    let sent = channel.basic_publish(exchange.into(), queue.into(), options, body, properties);
    timeout_at(deadline.min(Instant::now() + SILENCE), sent).await.map_err(|_| silent())?.map_err(failed)
}

/// Waits for the oldest confirm.
async fn settle(
    under_way: &mut VecDeque<(usize, PublisherConfirm)>,
    fates: &mut [Fate],
    deadline: Instant,
) -> Result<()> {
    let Some((index, confirm)) = under_way.pop_front() else { return Ok(()) };
    let patience = deadline.min(Instant::now() + SILENCE);
    let confirmation = timeout_at(patience, confirm).await.map_err(|_| silent())?.map_err(failed)?;
    fates[index] = match confirmation {
        // An unroutable message is returned first and confirmed all the same.
        Confirmation::Ack(Some(_)) => Fate::Returned,
        Confirmation::Ack(None) => Fate::Confirmed,
        Confirmation::Nack(_) | Confirmation::NotRequested => Fate::Unconfirmed,
    };
    Ok(())
}

fn silent() -> BrokerError {
    BrokerError::unavailable(format!("the broker confirmed nothing for {} s", SILENCE.as_secs()))
}
