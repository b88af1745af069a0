//! News of running jobs: sent by workers without waiting, received by those who watch, each binding only the jobs it
//! watches to a queue of its own.

use std::collections::HashSet;
use std::sync::Arc;

use futures_util::StreamExt;
use lapin::Channel;
use lapin::options::{BasicConsumeOptions, BasicPublishOptions, QueueBindOptions};
use lapin::types::FieldTable;
use tokio::sync::{mpsc, oneshot};

use super::super::watchers::Watchers;
use super::super::{BrokerError, ProgressStream, Result};
use super::link::{Link, answered};
use super::topology::Topology;
use super::wire::{decode_event, encode_event};
use crate::id::JobId;
use crate::message::ProgressEvent;

/// Events that wait to be sent before further ones are dropped.
const OUTBOX: usize = 1024;

/// Sends events in the background.
pub(super) struct Announcer {
    events: mpsc::Sender<ProgressEvent>,
    link: Arc<Link>,
}

impl Announcer {
    /// Must be called on a runtime.
    pub(super) fn start(link: Arc<Link>, topology: Arc<Topology>) -> Self {
        let (events, inbox) = mpsc::channel(OUTBOX);
        tokio::spawn(announce_all(link.clone(), topology, inbox));
        Self { events, link }
    }

    /// Hands an event over, without waiting.
    pub(super) fn announce(&self, event: ProgressEvent) -> Result<()> {
        let sent = self.events.try_send(event);
        if self.link.is_down() {
            return Err(BrokerError::unavailable(format!("there is no connection to {}", self.link)));
        }
        sent.map_err(|_| BrokerError::unavailable(format!("{OUTBOX} events wait to be sent")))
    }
}

async fn announce_all(link: Arc<Link>, topology: Arc<Topology>, mut inbox: mpsc::Receiver<ProgressEvent>) {
    let mut channel: Option<Channel> = None;
    let exchange = topology.progress();
    while let Some(event) = inbox.recv().await {
        let sent = async {
            let open = match channel.take().filter(|channel| channel.status().connected()) {
                Some(open) => open,
                None => {
                    let (open, generation) = link.new_channel().await?;
                    topology.ensure_exchanges(&open, link.declared(), generation).await?;
                    open
                }
            };
            let (body, properties) = encode_event(&event);
            let key = Topology::progress_key(event.job_id);
            let options = BasicPublishOptions::default();
            let sent = open.basic_publish(exchange.as_str().into(), key.into(), options, &body, properties);
            answered("sending an event", sent).await?;
            Ok::<_, BrokerError>(open)
        };
        match sent.await {
            Ok(open) => channel = Some(open),
            Err(error) => tracing::debug!(job.id = %event.job_id, %error, "dropped an event"),
        }
    }
}

/// Receives the events of watched jobs.
pub(super) struct Receiver {
    requests: mpsc::UnboundedSender<Watch>,
    watchers: Arc<Watchers>,
}

/// Asks for a job's binding.
struct Watch {
    job: JobId,
    bound: oneshot::Sender<Result<()>>,
}

impl Receiver {
    /// Must be called on a runtime.
    pub(super) fn start(link: Arc<Link>, topology: Arc<Topology>) -> Self {
        let (requests, inbox) = mpsc::unbounded_channel();
        let (abandoned, left) = mpsc::unbounded_channel();
        let watchers = Watchers::new(Some(abandoned));
        let loop_ = ReceiverLoop { link, topology, watchers: watchers.clone(), session: None };
        tokio::spawn(loop_.run(inbox, left));
        Self { requests, watchers }
    }

    /// See [`super::super::Broker::watch`].
    pub(super) async fn watch(&self, job: JobId) -> Result<ProgressStream> {
        // The stream first: no event falls between the binding and the stream.
        let stream = self.watchers.watch(job);
        let (bound, answer) = oneshot::channel();
        let _ = self.requests.send(Watch { job, bound });
        let ended = |_| Err(BrokerError::internal("the task that receives events has ended"));
        answer.await.unwrap_or_else(ended)?;
        Ok(stream)
    }
}

struct ReceiverLoop {
    link: Arc<Link>,
    topology: Arc<Topology>,
    watchers: Arc<Watchers>,
    session: Option<Session>,
}

/// A queue of this process's own, for as long as its connection lives.
struct Session {
    channel: Channel,
    deliveries: lapin::Consumer,
    queue: String,
    bound: HashSet<JobId>,
}

impl ReceiverLoop {
    async fn run(mut self, mut requests: mpsc::UnboundedReceiver<Watch>, mut left: mpsc::UnboundedReceiver<JobId>) {
        loop {
            tokio::select! {
                request = requests.recv() => match request {
                    Some(Watch { job, bound }) => {
                        let outcome = self.bind(job).await;
                        if outcome.is_err() {
                            self.end();
                        }
                        // An error says that the caller has gone; its stream has, too.
                        let _ = bound.send(outcome);
                        self.tidy(job).await;
                    }
                    None => break,
                },
                Some(job) = left.recv() => self.tidy(job).await,
                delivery = next(&mut self.session) => match delivery {
                    Some(Ok(delivery)) => match decode_event(&delivery.data) {
                        Ok(event) => self.watchers.announce(event),
                        Err(error) => tracing::warn!(%error, "dropped an unreadable event"),
                    },
                    Some(Err(_)) | None => self.end(),
                },
            }
        }
        self.end();
    }

    async fn bind(&mut self, job: JobId) -> Result<()> {
        if self.session.is_none() {
            self.session = Some(Session::open(&self.link, &self.topology).await?);
        }
        let session = self.session.as_mut().expect("it was opened just now");
        if session.bound.contains(&job) {
            return Ok(());
        }
        let bound = session.channel.queue_bind(
            session.queue.as_str().into(),
            self.topology.progress().into(),
            Topology::progress_key(job).into(),
            QueueBindOptions::default(),
            FieldTable::default(),
        );
        answered("binding a job's progress", bound).await?;
        session.bound.insert(job);
        Ok(())
    }

    /// Unbinds a job that nobody watches any more.
    async fn tidy(&mut self, job: JobId) {
        let Some(session) = &mut self.session else { return };
        if self.watchers.has(job) || !session.bound.remove(&job) {
            return;
        }
        let unbound = session.channel.queue_unbind(
            session.queue.as_str().into(),
            self.topology.progress().into(),
            Topology::progress_key(job).into(),
            FieldTable::default(),
        );
        if answered("unbinding a job's progress", unbound).await.is_err() {
            self.end();
        }
    }

    /// The connection has gone: so do the streams.
    fn end(&mut self) {
        self.session = None;
        self.watchers.end_all();
    }
}

impl Session {
    async fn open(link: &Link, topology: &Topology) -> Result<Self> {
        let (channel, generation) = link.new_channel().await?;
        topology.ensure_exchanges(&channel, link.declared(), generation).await?;
        let queue = topology.declare_progress_queue(&channel).await?;
        let options = BasicConsumeOptions { no_ack: true, exclusive: true, ..Default::default() };
        let subscribed = channel.basic_consume(queue.as_str().into(), "".into(), options, FieldTable::default());
        let deliveries = answered("subscribing to progress", subscribed).await?;
        Ok(Self { channel, deliveries, queue, bound: HashSet::new() })
    }
}

/// The session's next delivery; never, while there is no session.
async fn next(session: &mut Option<Session>) -> Option<lapin::Result<lapin::message::Delivery>> {
    match session {
        Some(session) => session.deliveries.next().await,
        None => std::future::pending().await,
    }
}
