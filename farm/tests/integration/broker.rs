//! The broker's conformance suite: each sentence holds for every implementation.

use std::sync::Mutex;
use std::time::Duration;

use farm::batch_key::BatchKey;
use farm::broker::amqp::AmqpBroker;
use farm::broker::{Consumer, Delivery, ProgressStream, SharedBroker, connect};
use farm::id::{JobId, WorkerId};
use farm::job::Lane;
use farm::message::{JobMessage, Progress, ProgressEvent, QueueKey, VERSION};
use farm::spec::RenderSpec;
use futures_util::StreamExt;
use tokio::time::timeout;

use crate::services;

/// Longer than any answer takes on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(30);
/// Long enough for a wrong delivery to show itself.
const MOMENT: Duration = Duration::from_millis(300);

/// A broker under test, with names of its own.
pub struct Subject {
    pub broker: SharedBroker,
    amqp: Option<Amqp>,
}

/// What it takes to tidy up on a real server.
struct Amqp {
    url: String,
    prefix: String,
    names: AmqpBroker,
    queues: Mutex<Vec<QueueKey>>,
}

impl Subject {
    pub fn memory() -> Option<Self> {
        Some(Self { broker: connect("", "test").unwrap(), amqp: None })
    }

    pub fn amqp() -> Option<Self> {
        let url = services::variable("KILN_BROKER_URL")?;
        let prefix = format!("test-{}", uuid::Uuid::now_v7());
        let names = AmqpBroker::new(&url, &prefix).unwrap();
        let broker = connect(&url, &prefix).unwrap();
        Some(Self { broker, amqp: Some(Amqp { url, prefix, names, queues: Mutex::default() }) })
    }

    /// A queue in the bulk lane.
    pub fn queue(&self, model: &str) -> QueueKey {
        let queue = QueueKey { model: model.into(), lane: Lane::Bulk };
        self.tidy_up_later(&queue);
        queue
    }

    fn on_amqp(&self) -> &Amqp {
        self.amqp.as_ref().expect("this test is about AMQP")
    }

    /// What every name on the server begins with.
    pub fn prefix(&self) -> &str {
        &self.on_amqp().prefix
    }

    /// What a queue is called on the server.
    pub fn queue_name(&self, queue: &QueueKey) -> String {
        self.on_amqp().names.queue_name(queue)
    }

    /// What the dead-letter queue is called on the server.
    pub fn dead_letters(&self) -> String {
        format!("{}.dead", self.prefix())
    }

    /// The server's host and port, and its URL with another in their place.
    pub fn through(&self, other: &str) -> (String, String) {
        let url = &self.on_amqp().url;
        let server = url.split('@').nth(1).unwrap().split('/').next().unwrap();
        (server.to_owned(), url.replace(server, other))
    }

    fn tidy_up_later(&self, queue: &QueueKey) {
        if let Some(amqp) = &self.amqp {
            amqp.queues.lock().unwrap().push(queue.clone());
        }
    }

    /// Removes what the test made on the server.
    pub async fn end(self) {
        if let Some(amqp) = self.amqp {
            amqp.names.dismantle(&amqp.queues.into_inner().unwrap()).await.unwrap();
        }
    }
}

/// A job whose seed tells it from the others.
pub fn message(queue: &QueueKey, seed: u64) -> JobMessage {
    let spec = RenderSpec {
        model: queue.model.clone(),
        prompt: "a small red star".into(),
        negative_prompt: String::new(),
        width: 128,
        height: 128,
        steps: 20,
        guidance_scale: 7.5,
        sampler: None,
        schedule: None,
        seed,
        init_image: None,
        lane: queue.lane,
        tags: vec!["tag".into()],
        metadata: serde_json::Map::new(),
        options: farm::spec::FamilyOptions::default(),
    };
    JobMessage { version: VERSION, job_id: JobId::new(), attempts: 0, batch_key: BatchKey::of(&spec), spec }
}

pub fn messages(queue: &QueueKey, seeds: std::ops::Range<u64>) -> Vec<JobMessage> {
    seeds.map(|seed| message(queue, seed)).collect()
}

/// Publishes and expects every confirm.
pub async fn publish(broker: &SharedBroker, queue: &QueueKey, messages: &[JobMessage]) {
    let confirmed = broker.publish(queue, messages).await.unwrap();
    assert_eq!(confirmed, vec![true; messages.len()]);
}

/// The next delivery, which must come.
pub async fn next(consumer: &mut Box<dyn Consumer>) -> Delivery {
    let delivery = timeout(PATIENCE, consumer.next()).await.expect("a delivery comes in time");
    delivery.unwrap().expect("the consumer is not stopped")
}

/// Takes and acks so many.
async fn take(consumer: &mut Box<dyn Consumer>, count: usize) -> Vec<JobMessage> {
    let acker = consumer.acker();
    let mut taken = Vec::new();
    for _ in 0..count {
        let delivery = next(consumer).await;
        assert!(acker.ack(delivery.tag).await.unwrap());
        taken.push(delivery.message);
    }
    taken
}

async fn nothing_comes(consumer: &mut Box<dyn Consumer>) {
    let delivery = timeout(MOMENT, consumer.next()).await;
    assert!(delivery.is_err(), "nothing should come, but {delivery:?} did");
}

/// Waits for a queue to hold so many; a broker takes a moment to put unacked messages back.
pub async fn depth_becomes(broker: &SharedBroker, queue: &QueueKey, wanted: u64) {
    let settled = async {
        while broker.depth(queue).await.unwrap() != wanted {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    if timeout(PATIENCE, settled).await.is_err() {
        panic!("the queue holds {} messages, not {wanted}", broker.depth(queue).await.unwrap());
    }
}

fn seeds(messages: &[JobMessage]) -> Vec<u64> {
    messages.iter().map(|message| message.spec.seed).collect()
}

async fn a_published_message_arrives_whole_and_is_gone_once_acked(subject: &Subject) {
    let (broker, queue) = (&subject.broker, subject.queue("demo"));
    let sent = message(&queue, 7);
    publish(broker, &queue, std::slice::from_ref(&sent)).await;
    assert_eq!(broker.depth(&queue).await.unwrap(), 1);
    let mut consumer = broker.consume(&queue, 4).await.unwrap();
    assert_eq!(take(&mut consumer, 1).await, [sent]);
    drop(consumer);
    depth_becomes(broker, &queue, 0).await;
    let mut consumer = broker.consume(&queue, 4).await.unwrap();
    nothing_comes(&mut consumer).await;
}

async fn a_consumer_may_wait_for_the_first_message(subject: &Subject) {
    let (broker, queue) = (&subject.broker, subject.queue("demo"));
    let mut consumer = broker.consume(&queue, 4).await.unwrap();
    let sent = message(&queue, 7);
    let (delivery, ()) = tokio::join!(next(&mut consumer), async {
        tokio::time::sleep(Duration::from_millis(50)).await;
        publish(broker, &queue, std::slice::from_ref(&sent)).await;
    });
    assert_eq!(delivery.message, sent);
}

async fn messages_arrive_in_the_order_they_were_published(subject: &Subject) {
    let (broker, queue) = (&subject.broker, subject.queue("demo"));
    publish(broker, &queue, &messages(&queue, 0..40)).await;
    publish(broker, &queue, &messages(&queue, 40..60)).await;
    let mut consumer = broker.consume(&queue, 16).await.unwrap();
    assert_eq!(seeds(&take(&mut consumer, 60).await), (0..60).collect::<Vec<_>>());
}

async fn five_thousand_messages_of_one_call_are_confirmed_and_in_order(subject: &Subject) {
    let (broker, queue) = (&subject.broker, subject.queue("demo"));
    publish(broker, &queue, &messages(&queue, 0..5000)).await;
    assert_eq!(broker.depth(&queue).await.unwrap(), 5000);
    let mut consumer = broker.consume(&queue, 256).await.unwrap();
    assert_eq!(seeds(&take(&mut consumer, 5000).await), (0..5000).collect::<Vec<_>>());
}

async fn publishing_nothing_is_fine(subject: &Subject) {
    let queue = subject.queue("demo");
    assert!(subject.broker.publish(&queue, &[]).await.unwrap().is_empty());
    assert_eq!(subject.broker.depth(&queue).await.unwrap(), 0);
}

async fn a_consumer_holds_at_most_its_prefetch(subject: &Subject) {
    let (broker, queue) = (&subject.broker, subject.queue("demo"));
    publish(broker, &queue, &messages(&queue, 0..10)).await;
    let mut consumer = broker.consume(&queue, 3).await.unwrap();
    let first = next(&mut consumer).await;
    next(&mut consumer).await;
    next(&mut consumer).await;
    nothing_comes(&mut consumer).await;
    assert!(consumer.acker().ack(first.tag).await.unwrap());
    assert_eq!(next(&mut consumer).await.message.spec.seed, 3);
    nothing_comes(&mut consumer).await;
}

async fn two_consumers_share_a_queue(subject: &Subject) {
    let (broker, queue) = (&subject.broker, subject.queue("demo"));
    let mut one = broker.consume(&queue, 2).await.unwrap();
    let mut other = broker.consume(&queue, 2).await.unwrap();
    publish(broker, &queue, &messages(&queue, 0..4)).await;
    let mut seen = Vec::new();
    for consumer in [&mut one, &mut other] {
        seen.extend([next(consumer).await.message.spec.seed, next(consumer).await.message.spec.seed]);
    }
    seen.sort_unstable();
    assert_eq!(seen, [0, 1, 2, 3]);
}

async fn what_is_unacked_goes_back_when_its_consumer_is_dropped(subject: &Subject) {
    let (broker, queue) = (&subject.broker, subject.queue("demo"));
    publish(broker, &queue, &messages(&queue, 0..6)).await;
    let mut consumer = broker.consume(&queue, 4).await.unwrap();
    let first = next(&mut consumer).await;
    next(&mut consumer).await;
    assert!(consumer.acker().ack(first.tag).await.unwrap());
    drop(consumer);
    depth_becomes(broker, &queue, 5).await;
    let mut consumer = broker.consume(&queue, 8).await.unwrap();
    // A broker may put what goes back in another order.
    let mut rest = seeds(&take(&mut consumer, 5).await);
    rest.sort_unstable();
    assert_eq!(rest, [1, 2, 3, 4, 5]);
}

async fn a_requeued_message_comes_again(subject: &Subject) {
    let (broker, queue) = (&subject.broker, subject.queue("demo"));
    publish(broker, &queue, &messages(&queue, 0..1)).await;
    let mut consumer = broker.consume(&queue, 1).await.unwrap();
    let delivery = next(&mut consumer).await;
    assert!(consumer.acker().requeue(delivery.tag).await.unwrap());
    let again = next(&mut consumer).await;
    assert_eq!(again.message, delivery.message);
    assert_ne!(again.tag, delivery.tag);
    assert!(consumer.acker().ack(again.tag).await.unwrap());
    nothing_comes(&mut consumer).await;
}

async fn an_ack_counts_once_and_an_unknown_one_never(subject: &Subject) {
    let (broker, queue) = (&subject.broker, subject.queue("demo"));
    publish(broker, &queue, &messages(&queue, 0..2)).await;
    let mut consumer = broker.consume(&queue, 1).await.unwrap();
    let delivery = next(&mut consumer).await;
    let acker = consumer.acker();
    assert!(acker.ack(delivery.tag).await.unwrap());
    assert!(!acker.ack(delivery.tag).await.unwrap());
    assert!(!acker.requeue(delivery.tag).await.unwrap());
    assert!(!acker.ack(farm::broker::DeliveryTag(99)).await.unwrap());
    assert_eq!(next(&mut consumer).await.message.spec.seed, 1, "the subscription is unharmed");
}

async fn an_ack_after_its_consumer_was_dropped_answers_false(subject: &Subject) {
    let (broker, queue) = (&subject.broker, subject.queue("demo"));
    publish(broker, &queue, &messages(&queue, 0..2)).await;
    let mut consumer = broker.consume(&queue, 2).await.unwrap();
    let (first, second) = (next(&mut consumer).await, next(&mut consumer).await);
    let acker = consumer.acker();
    drop(consumer);
    assert!(!acker.ack(first.tag).await.unwrap());
    assert!(!acker.requeue(second.tag).await.unwrap());
    depth_becomes(broker, &queue, 2).await;
}

async fn a_stopped_consumer_ends_and_what_it_did_not_ack_goes_back(subject: &Subject) {
    let (broker, queue) = (&subject.broker, subject.queue("demo"));
    publish(broker, &queue, &messages(&queue, 0..20)).await;
    let mut consumer = broker.consume(&queue, 5).await.unwrap();
    let first = next(&mut consumer).await;
    consumer.stop().await.unwrap();
    consumer.stop().await.unwrap();
    let mut rest = 0;
    while timeout(PATIENCE, consumer.next()).await.unwrap().unwrap().is_some() {
        rest += 1;
    }
    assert!(rest <= 4, "no more than was prefetched, but {rest}");
    assert!(timeout(PATIENCE, consumer.next()).await.unwrap().unwrap().is_none(), "it stays ended");
    assert!(consumer.acker().ack(first.tag).await.unwrap(), "what it holds can be acked");
    drop(consumer);
    depth_becomes(broker, &queue, 19).await;
}

async fn waiting_for_the_next_can_be_broken_off_without_losing_any(subject: &Subject) {
    let (broker, queue) = (subject.broker.clone(), subject.queue("demo"));
    let mut consumer = broker.consume(&queue, 8).await.unwrap();
    let publisher = tokio::spawn({
        let (broker, queue) = (broker.clone(), queue.clone());
        async move {
            for seed in 0..100 {
                publish(&broker, &queue, &messages(&queue, seed..seed + 1)).await;
            }
        }
    });
    let mut seen = Vec::new();
    let all = async {
        while seen.len() < 100 {
            if let Ok(delivery) = timeout(Duration::from_micros(300), consumer.next()).await {
                let delivery = delivery.unwrap().unwrap();
                assert!(consumer.acker().ack(delivery.tag).await.unwrap());
                seen.push(delivery.message.spec.seed);
            }
        }
    };
    timeout(PATIENCE, all).await.expect("every message arrives");
    publisher.await.unwrap();
    assert_eq!(seen, (0..100).collect::<Vec<_>>());
}

async fn purging_throws_the_ready_messages_away_and_counts_them(subject: &Subject) {
    let (broker, queue) = (&subject.broker, subject.queue("demo"));
    publish(broker, &queue, &messages(&queue, 0..7)).await;
    assert_eq!(broker.purge(&queue).await.unwrap(), 7);
    assert_eq!(broker.depth(&queue).await.unwrap(), 0);
    publish(broker, &queue, &messages(&queue, 7..8)).await;
    let mut consumer = broker.consume(&queue, 1).await.unwrap();
    assert_eq!(seeds(&take(&mut consumer, 1).await), [7]);
}

async fn an_unknown_queue_is_empty(subject: &Subject) {
    let (broker, queue) = (&subject.broker, subject.queue("demo"));
    let unknown = QueueKey { model: "never published".into(), lane: Lane::Bulk };
    for _ in 0..3 {
        assert_eq!(broker.depth(&unknown).await.unwrap(), 0);
        assert_eq!(broker.purge(&unknown).await.unwrap(), 0);
    }
    publish(broker, &queue, &messages(&queue, 0..1)).await;
    assert_eq!(broker.depth(&queue).await.unwrap(), 1);
}

async fn each_model_and_lane_has_a_queue_of_its_own(subject: &Subject) {
    let broker = &subject.broker;
    let long = "ü".repeat(150);
    let almost = format!("{}x", &long[..298]);
    let mut queues = Vec::new();
    for model in ["demo", "org/name", "org%2Fname", "with space", "größe ★", "a.*.#", &long, &almost] {
        for lane in Lane::ALL {
            queues.push(QueueKey { model: model.into(), lane });
            subject.tidy_up_later(queues.last().unwrap());
        }
    }
    for (seed, queue) in queues.iter().enumerate() {
        publish(broker, queue, &[message(queue, seed as u64)]).await;
    }
    for (seed, queue) in queues.iter().enumerate() {
        assert_eq!(broker.depth(queue).await.unwrap(), 1, "{queue:?}");
        let mut consumer = broker.consume(queue, 1).await.unwrap();
        let taken = take(&mut consumer, 1).await;
        assert_eq!((taken[0].spec.seed, &taken[0].spec.model), (seed as u64, &queue.model));
    }
}

pub fn step(job: JobId, step: u32) -> ProgressEvent {
    let progress = Progress::Step { step, total: 20 };
    ProgressEvent { job_id: job, worker: WorkerId("worker-1".into()), progress }
}

pub async fn event(stream: &mut ProgressStream) -> ProgressEvent {
    timeout(PATIENCE, stream.next()).await.expect("an event comes in time").expect("the stream goes on")
}

async fn a_watcher_gets_the_events_of_its_job_alone_and_in_order(subject: &Subject) {
    let broker = &subject.broker;
    let (job, other) = (JobId::new(), JobId::new());
    let mut stream = broker.watch(job).await.unwrap();
    for number in 1..=20 {
        broker.announce(&step(other, number)).await.unwrap();
        broker.announce(&step(job, number)).await.unwrap();
    }
    broker.announce(&ProgressEvent { progress: Progress::Left, ..step(job, 0) }).await.unwrap();
    for number in 1..=20 {
        assert_eq!(event(&mut stream).await, step(job, number));
    }
    assert_eq!(event(&mut stream).await.progress, Progress::Left);
}

async fn two_watchers_of_one_job_both_get_its_events(subject: &Subject) {
    let broker = &subject.broker;
    let job = JobId::new();
    let mut one = broker.watch(job).await.unwrap();
    let mut other = broker.watch(job).await.unwrap();
    broker.announce(&step(job, 1)).await.unwrap();
    assert_eq!(event(&mut one).await, step(job, 1));
    assert_eq!(event(&mut other).await, step(job, 1));
    drop(one);
    broker.announce(&step(job, 2)).await.unwrap();
    assert_eq!(event(&mut other).await, step(job, 2), "the other goes on when one leaves");
}

async fn a_watcher_that_left_can_come_back(subject: &Subject) {
    let broker = &subject.broker;
    let job = JobId::new();
    for number in 0..20 {
        let mut stream = broker.watch(job).await.unwrap();
        broker.announce(&step(job, number)).await.unwrap();
        assert_eq!(event(&mut stream).await, step(job, number), "only what came after it began to watch");
    }
}

async fn news_that_nobody_watches_is_fine(subject: &Subject) {
    let broker = &subject.broker;
    for number in 0..20 {
        broker.announce(&step(JobId::new(), number)).await.unwrap();
    }
    broker.ping().await.unwrap();
}

/// One test per sentence and implementation.
macro_rules! conformance {
    ($($sentence:ident)*) => {
        mod memory {
            $(#[tokio::test]
            async fn $sentence() {
                super::$sentence(&super::Subject::memory().unwrap()).await;
            })*
        }
        mod amqp {
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $sentence() {
                let Some(subject) = super::Subject::amqp() else { return };
                super::$sentence(&subject).await;
                subject.end().await;
            })*
        }
    };
}

conformance! {
    a_published_message_arrives_whole_and_is_gone_once_acked
    a_consumer_may_wait_for_the_first_message
    messages_arrive_in_the_order_they_were_published
    five_thousand_messages_of_one_call_are_confirmed_and_in_order
    publishing_nothing_is_fine
    a_consumer_holds_at_most_its_prefetch
    two_consumers_share_a_queue
    what_is_unacked_goes_back_when_its_consumer_is_dropped
    a_requeued_message_comes_again
    an_ack_counts_once_and_an_unknown_one_never
    an_ack_after_its_consumer_was_dropped_answers_false
    a_stopped_consumer_ends_and_what_it_did_not_ack_goes_back
    waiting_for_the_next_can_be_broken_off_without_losing_any
    purging_throws_the_ready_messages_away_and_counts_them
    an_unknown_queue_is_empty
    each_model_and_lane_has_a_queue_of_its_own
    a_watcher_gets_the_events_of_its_job_alone_and_in_order
    two_watchers_of_one_job_both_get_its_events
    a_watcher_that_left_can_come_back
    news_that_nobody_watches_is_fine
}
