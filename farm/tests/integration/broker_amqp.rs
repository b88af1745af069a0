//! What only a broker that is a server can get wrong: connections, restarts, foreign messages, deleted queues.

use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use farm::broker::amqp::AmqpBroker;
use farm::broker::{BrokerError, SharedBroker, connect};
use farm::id::JobId;
use farm::job::Lane;
use farm::message::{QueueKey, VERSION};
use futures_util::StreamExt;
use lapin::options::{BasicGetOptions, BasicPublishOptions, QueueDeclareOptions, QueueDeleteOptions};
use lapin::types::FieldTable;
use lapin::{BasicProperties, Channel, Connection};
use tempfile::TempDir;
use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};

use crate::broker::{PATIENCE, Subject, depth_becomes, event, message, messages, next, publish, step};
use crate::services;

/// A channel past our own code.
async fn raw_channel() -> Channel {
    let url = services::variable("KILN_BROKER_URL").expect("the subject has it");
    let connection = Connection::connect(&url, Default::default()).await.unwrap();
    connection.create_channel().await.unwrap()
}

async fn raw_publish(channel: &Channel, queue: &str, body: &[u8]) {
    let sent = channel.basic_publish(
        "".into(),
        queue.into(),
        BasicPublishOptions::default(),
        body,
        BasicProperties::default(),
    );
    sent.await.unwrap().await.unwrap();
}

fn is_unavailable<T>(outcome: &Result<T, BrokerError>) -> bool {
    matches!(outcome, Err(BrokerError::Unavailable(_)))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_be_read_goes_to_the_dead_letters_and_the_rest_is_delivered() {
    let Some(subject) = Subject::amqp() else { return };
    let queue = subject.queue("demo");
    let sent = message(&queue, 1);
    publish(&subject.broker, &queue, &[]).await;
    let mut consumer = subject.broker.consume(&queue, 1).await.unwrap();

    let channel = raw_channel().await;
    let name = subject.queue_name(&queue);
    let mut newer = serde_json::to_value(&sent).unwrap();
    newer["version"] = (VERSION + 1).into();
    let unreadable = [&b"rubbish"[..], b"", b"{\"version\":1}", &newer.to_string().into_bytes()];
    for body in unreadable {
        raw_publish(&channel, &name, body).await;
    }
    publish(&subject.broker, &queue, std::slice::from_ref(&sent)).await;
    let delivery = next(&mut consumer).await;
    assert_eq!(delivery.message, sent);
    assert!(consumer.acker().ack(delivery.tag).await.unwrap());

    let mut dead = Vec::new();
    let collected = async {
        while dead.len() < unreadable.len() {
            let got = channel.basic_get(subject.dead_letters().into(), BasicGetOptions { no_ack: true }).await.unwrap();
            match got {
                Some(got) => dead.push(got.delivery.data),
                None => sleep(Duration::from_millis(20)).await,
            }
        }
    };
    timeout(PATIENCE, collected).await.expect("every unreadable message is kept for a look");
    dead.sort();
    let mut wanted = unreadable.map(<[u8]>::to_vec);
    wanted.sort();
    assert_eq!(dead, wanted);
    subject.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_queue_deleted_behind_our_back_is_declared_anew() {
    let Some(subject) = Subject::amqp() else { return };
    let (broker, queue) = (&subject.broker, subject.queue("demo"));
    publish(broker, &queue, &messages(&queue, 0..3)).await;
    let mut consumer = broker.consume(&queue, 4).await.unwrap();
    let delivery = next(&mut consumer).await;

    let channel = raw_channel().await;
    channel.queue_delete(subject.queue_name(&queue).into(), QueueDeleteOptions::default()).await.unwrap();
    let ended = async { while matches!(consumer.next().await, Ok(Some(_))) {} };
    timeout(PATIENCE, ended).await.expect("the subscription ends");
    assert!(is_unavailable(&consumer.next().await), "with an error, again and again");
    assert!(!consumer.acker().ack(delivery.tag).await.unwrap());
    // RabbitMQ may hand a new queue's messages to a subscription that the old queue of that name still had.
    drop(consumer);

    // Unroutable, returned, and then published to the new queue.
    publish(broker, &queue, &messages(&queue, 10..2010)).await;
    assert_eq!(broker.depth(&queue).await.unwrap(), 2000);
    let mut consumer = broker.consume(&queue, 4).await.unwrap();
    for seed in 10..14 {
        assert_eq!(next(&mut consumer).await.message.spec.seed, seed);
    }
    drop(consumer);

    channel.queue_delete(subject.queue_name(&queue).into(), QueueDeleteOptions::default()).await.unwrap();
    assert_eq!(broker.depth(&queue).await.unwrap(), 0);
    let mut consumer = broker.consume(&queue, 4).await.unwrap();
    publish(broker, &queue, &messages(&queue, 3000..3001)).await;
    assert_eq!(next(&mut consumer).await.message.spec.seed, 3000);
    drop(consumer);
    subject.end().await;
}

/// Stands between a client and the server, and can cut the line.
struct Proxy {
    address: String,
    lines: Arc<Mutex<Vec<JoinHandle<()>>>>,
    down: Arc<AtomicBool>,
}

impl Proxy {
    async fn start(server: String) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let proxy = Self { address, lines: Arc::default(), down: Arc::default() };
        let (lines, down) = (proxy.lines.clone(), proxy.down.clone());
        tokio::spawn(async move {
            loop {
                let (mut client, _) = listener.accept().await.unwrap();
                if down.load(Ordering::Relaxed) {
                    continue;
                }
                let mut server = TcpStream::connect(&server).await.unwrap();
                let line = tokio::spawn(async move {
                    let _ = copy_bidirectional(&mut client, &mut server).await;
                });
                lines.lock().unwrap().push(line);
            }
        });
        proxy
    }

    /// Breaks every connection, and lets none through until [`Proxy::mend`].
    fn cut(&self) {
        self.down.store(true, Ordering::Relaxed);
        for line in self.lines.lock().unwrap().drain(..) {
            line.abort();
        }
    }

    fn mend(&self) {
        self.down.store(false, Ordering::Relaxed);
    }
}

/// Retries what a broker that comes back may refuse for a while.
async fn eventually<T>(mut call: impl AsyncFnMut() -> Result<T, BrokerError>) -> T {
    let began = Instant::now();
    loop {
        match call().await {
            Ok(value) => return value,
            Err(BrokerError::Unavailable(error)) => assert!(began.elapsed() < 2 * PATIENCE, "{error}"),
            Err(error) => panic!("{error}"),
        }
        sleep(Duration::from_millis(100)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_broken_connection_ends_subscriptions_and_streams_and_mends_by_itself() {
    let Some(subject) = Subject::amqp() else { return };
    let (server, proxied) = subject.through("placeholder");
    let proxy = Proxy::start(server).await;
    let broker = connect(&proxied.replace("placeholder", &proxy.address), subject.prefix()).unwrap();
    let queue = subject.queue("demo");
    publish(&broker, &queue, &messages(&queue, 0..5)).await;
    let mut consumer = broker.consume(&queue, 3).await.unwrap();
    let (held, job) = (next(&mut consumer).await, JobId::new());
    let mut stream = broker.watch(job).await.unwrap();
    broker.announce(&step(job, 1)).await.unwrap();
    assert_eq!(event(&mut stream).await, step(job, 1));

    proxy.cut();
    let ended = async { while matches!(consumer.next().await, Ok(Some(_))) {} };
    timeout(PATIENCE, ended).await.expect("the subscription ends");
    assert!(is_unavailable(&consumer.next().await));
    assert!(!consumer.acker().ack(held.tag).await.unwrap());
    assert!(timeout(PATIENCE, stream.next()).await.unwrap().is_none(), "the stream ends with the connection");
    let began = Instant::now();
    assert!(is_unavailable(&broker.publish(&queue, &messages(&queue, 5..6)).await));
    assert!(is_unavailable(&broker.consume(&queue, 1).await));
    assert!(is_unavailable(&broker.depth(&queue).await));
    assert!(is_unavailable(&broker.watch(job).await));
    assert!(is_unavailable(&broker.ping().await));
    assert!(is_unavailable(&broker.announce(&step(job, 2)).await));
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
    // Over the direct line: what was unacked has gone back.
    depth_becomes(&subject.broker, &queue, 5).await;

    proxy.mend();
    eventually(async || broker.ping().await).await;
    publish(&broker, &queue, &messages(&queue, 5..6)).await;
    let mut consumer = broker.consume(&queue, 16).await.unwrap();
    let mut seeds = Vec::new();
    for _ in 0..6 {
        seeds.push(next(&mut consumer).await.message.spec.seed);
    }
    seeds.sort_unstable();
    assert_eq!(seeds, [0, 1, 2, 3, 4, 5]);
    let mut stream = broker.watch(job).await.unwrap();
    broker.announce(&step(job, 3)).await.unwrap();
    assert_eq!(event(&mut stream).await, step(job, 3));
    drop((broker, consumer, stream));
    subject.end().await;
}

/// Every call, which must fail as unavailable, and how long the slowest took.
async fn slowest_refusal(broker: SharedBroker) -> Duration {
    let queue = QueueKey { model: "demo".into(), lane: Lane::Bulk };
    let timed = async |call: &mut (dyn Future<Output = bool> + Unpin + Send)| {
        let began = Instant::now();
        assert!(call.await, "it says that the broker is unavailable");
        began.elapsed()
    };
    let sent = messages(&queue, 0..3);
    let mut slowest = Duration::ZERO;
    let calls: [&mut (dyn Future<Output = bool> + Unpin + Send); 6] = [
        &mut Box::pin(async { is_unavailable(&broker.ping().await) }),
        &mut Box::pin(async { is_unavailable(&broker.publish(&queue, &sent).await) }),
        &mut Box::pin(async { is_unavailable(&broker.depth(&queue).await) }),
        &mut Box::pin(async { is_unavailable(&broker.purge(&queue).await) }),
        &mut Box::pin(async { is_unavailable(&broker.consume(&queue, 1).await) }),
        &mut Box::pin(async { is_unavailable(&broker.watch(JobId::new()).await) }),
    ];
    for call in calls {
        slowest = slowest.max(timed(call).await);
    }
    let began = Instant::now();
    while !is_unavailable(&broker.announce(&step(JobId::new(), 1)).await) {
        assert!(began.elapsed() < PATIENCE, "news is refused once it is known that nobody takes it");
        sleep(Duration::from_millis(20)).await;
    }
    slowest
}

#[tokio::test]
async fn a_dead_broker_is_unavailable_at_once() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("amqp://{}", listener.local_addr().unwrap());
    drop(listener);
    let slowest = slowest_refusal(connect(&url, "test").unwrap()).await;
    assert!(slowest < Duration::from_secs(5), "{slowest:?}");
}

#[tokio::test]
async fn a_silent_broker_is_unavailable_within_seconds() {
    // Connections wait in the listener's backlog, and nobody ever answers.
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let broker = connect(&format!("amqp://{}", listener.local_addr().unwrap()), "test").unwrap();
    let slowest = slowest_refusal(broker).await;
    assert!(slowest < Duration::from_secs(12), "{slowest:?}");
}

#[tokio::test]
async fn a_wrong_password_will_not_mend_and_is_not_shown() {
    let Some(subject) = Subject::amqp() else { return };
    let (server, _) = subject.through("unused");
    let broker = connect(&format!("amqp://kiln:wrongsecret@{server}/%2f"), "test").unwrap();
    let error = broker.ping().await.unwrap_err();
    assert!(matches!(error, BrokerError::Internal(_)), "{error}");
    assert!(error.to_string().contains("ACCESS_REFUSED") && !error.to_string().contains("wrongsecret"), "{error}");
}

/// A RabbitMQ of this test's own, which it may kill.
struct PrivateServer {
    script: PathBuf,
    folder: TempDir,
}

impl PrivateServer {
    fn start() -> Self {
        let script = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../infra/services.sh");
        let server = Self { script, folder: tempfile::tempdir().unwrap() };
        server.run("start");
        server
    }

    fn run(&self, verb: &str) -> String {
        let mut command = Command::new(&self.script);
        command.arg(verb).env("KILN_SERVICES_DIR", self.folder.path());
        if ["start", "stop", "kill"].contains(&verb) {
            command.arg("rabbitmq");
        }
        let output = command.output().unwrap();
        assert!(output.status.success(), "{verb}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    fn url(&self) -> String {
        let environment = self.run("env");
        let line = environment.lines().find(|line| line.contains("KILN_BROKER_URL")).unwrap();
        line.split('\'').nth(1).unwrap().to_owned()
    }
}

impl Drop for PrivateServer {
    fn drop(&mut self) {
        self.run("stop");
    }
}

/// Publishes without pause; returns the seeds that were confirmed.
async fn publish_until(broker: SharedBroker, queue: QueueKey, stop: Arc<AtomicBool>) -> Vec<u64> {
    let (mut confirmed, mut seed) = (Vec::new(), 0);
    while !stop.load(Ordering::Relaxed) {
        let batch = messages(&queue, seed..seed + 50);
        match broker.publish(&queue, &batch).await {
            Ok(fates) => {
                let sure = batch.iter().zip(fates).filter(|(_, sure)| *sure);
                confirmed.extend(sure.map(|(message, _)| message.spec.seed));
            }
            Err(error) => assert!(matches!(error, BrokerError::Unavailable(_)), "{error}"),
        }
        seed += 50;
        sleep(Duration::from_millis(5)).await;
    }
    confirmed
}

/// Consumes and acks, subscribing anew whenever the subscription ends; notes the seeds before it acks them.
async fn consume_until(broker: SharedBroker, queue: QueueKey, stop: Arc<AtomicBool>) -> Vec<u64> {
    let mut seen = Vec::new();
    while !stop.load(Ordering::Relaxed) {
        let Ok(mut consumer) = broker.consume(&queue, 20).await else {
            sleep(Duration::from_millis(100)).await;
            continue;
        };
        let acker = consumer.acker();
        while !stop.load(Ordering::Relaxed) {
            match timeout(Duration::from_millis(200), consumer.next()).await {
                Ok(Ok(Some(delivery))) => {
                    seen.push(delivery.message.spec.seed);
                    if !acker.ack(delivery.tag).await.unwrap_or(false) {
                        break;
                    }
                }
                Ok(_) => break,
                Err(_) => {}
            }
        }
    }
    seen
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_server_loses_nothing_that_it_confirmed_and_the_broker_mends_by_itself() {
    if services::variable("KILN_BROKER_URL").is_none() {
        return;
    }
    let server = tokio::task::spawn_blocking(PrivateServer::start).await.unwrap();
    let url = server.url();
    let broker = connect(&url, "test").unwrap();
    let queue = QueueKey { model: "demo".into(), lane: Lane::Bulk };
    eventually(async || broker.ping().await).await;
    let (no_more_jobs, no_more_takers) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
    let publisher = tokio::spawn(publish_until(broker.clone(), queue.clone(), no_more_jobs.clone()));
    let taker = tokio::spawn(consume_until(broker.clone(), queue.clone(), no_more_takers.clone()));
    sleep(Duration::from_secs(2)).await;
    let server = tokio::task::spawn_blocking(move || {
        server.run("kill");
        server.run("start");
        server
    });
    let server = server.await.unwrap();
    eventually(async || broker.ping().await).await;
    sleep(Duration::from_secs(3)).await;
    no_more_jobs.store(true, Ordering::Relaxed);
    let confirmed = publisher.await.unwrap();
    assert!(confirmed.last().unwrap() > &200, "it went on after the restart");
    depth_becomes(&broker, &queue, 0).await;
    sleep(Duration::from_secs(1)).await;
    no_more_takers.store(true, Ordering::Relaxed);
    let seen: std::collections::HashSet<_> = taker.await.unwrap().into_iter().collect();
    let lost: Vec<_> = confirmed.iter().filter(|seed| !seen.contains(seed)).collect();
    assert!(lost.is_empty(), "{} of {} confirmed messages are lost: {lost:?}", lost.len(), confirmed.len());
    drop(broker);
    tokio::task::spawn_blocking(move || drop(server)).await.unwrap();
}

#[tokio::test]
async fn a_queue_that_exists_with_other_properties_is_an_error_that_names_it() {
    let Some(subject) = Subject::amqp() else { return };
    let queue = subject.queue("demo");
    let name = subject.queue_name(&queue);
    let options = QueueDeclareOptions { durable: true, ..Default::default() };
    raw_channel().await.queue_declare(name.as_str().into(), options, FieldTable::default()).await.unwrap();
    let error = subject.broker.publish(&queue, &messages(&queue, 0..1)).await.unwrap_err();
    assert!(matches!(error, BrokerError::Internal(_)) && error.to_string().contains(&name), "{error}");
    subject.end().await;
}

#[test]
fn a_url_of_another_kind_is_refused() {
    let error = connect("redis://localhost", "test").err().expect("it is refused").to_string();
    assert!(error.contains("amqp://") && error.contains("redis"), "{error}");
    assert!(AmqpBroker::new("amqp://localhost", "no spaces").is_err());
}
