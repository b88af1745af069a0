//! One connection to the broker, made when it is first needed and again when it has broken. Nothing recovers
//! behind a caller's back: what hung on a broken connection ends with an error.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex as StdMutex};
use std::time::Duration;

use lapin::protocol::{AMQPErrorKind, AMQPHardError, AMQPSoftError};
use lapin::uri::AMQPUri;
use lapin::{Channel, Connection, ConnectionProperties, ErrorKind};
use tokio::sync::Mutex;
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout};

use super::super::{BrokerError, Result};
use super::topology::Declared;

/// A call waits this long for a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// An attempt to connect is given up after this long. Longer than a call waits: each attempt costs a thread until
/// its peer says something.
const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(30);
/// Any other answer of the broker is waited for this long.
pub(super) const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
/// The wait between two attempts: the shortest, and the longest after doubling.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(5));
/// Idle channels kept for the next call.
const IDLE_CHANNELS: usize = 8;
/// Seconds between heartbeats, where the URL names none. Two are missed before the connection counts as broken.
const HEARTBEAT: u16 = 10;

/// See the module.
pub(super) struct Link {
    uri: AMQPUri,
    name: String,
    state: Mutex<State>,
    down: AtomicBool,
    idle: StdMutex<Vec<Channel>>,
    declared: Declared,
}

#[derive(Default)]
struct State {
    connection: Option<Arc<Connection>>,
    /// Counts connections.
    generation: u64,
    attempt: Option<Attempt>,
    failures: u32,
    /// Why the last attempt failed, and when the next may begin.
    failure: Option<(lapin::Error, Instant)>,
}

/// Runs beside its callers, so that none of them has to wait for its end or takes it along when it is dropped.
struct Attempt {
    began: Instant,
    task: JoinHandle<lapin::Result<Connection>>,
}

impl Link {
    /// A link that has not connected yet. `name` is what the broker's management shows.
    pub(super) fn new(mut uri: AMQPUri, name: String) -> Self {
        if uri.vhost.is_empty() {
            // `amqp://host/` means the default host to people, though not to the letter of the URL.
            uri.vhost = "/".into();
        }
        uri.query.heartbeat.get_or_insert(HEARTBEAT);
        Self {
            uri,
            name,
            state: Mutex::default(),
            down: AtomicBool::new(false),
            idle: StdMutex::default(),
            declared: Declared::default(),
        }
    }

    /// True if the last attempt to connect failed.
    pub(super) fn is_down(&self) -> bool {
        self.down.load(Ordering::Relaxed)
    }

    /// What was declared over the connection.
    pub(super) fn declared(&self) -> &Declared {
        &self.declared
    }

    /// A channel of nobody else's, and the number of its connection.
    pub(super) async fn channel(&self) -> Result<(Channel, u64)> {
        let (connection, generation) = self.connection().await?;
        let idle = std::mem::take(&mut *self.idle());
        let mut usable = idle.into_iter().filter(|channel| channel.status().connected());
        let channel = usable.next();
        self.idle().extend(usable);
        match channel {
            Some(channel) => Ok((channel, generation)),
            None => Ok((answered("opening a channel", connection.create_channel()).await?, generation)),
        }
    }

    /// A new channel, for those who keep it or change its mode.
    pub(super) async fn new_channel(&self) -> Result<(Channel, u64)> {
        let (connection, generation) = self.connection().await?;
        Ok((answered("opening a channel", connection.create_channel()).await?, generation))
    }

    /// Keeps a channel for the next caller. Only for one whose every request was answered.
    pub(super) fn give_back(&self, channel: Channel) {
        let mut idle = self.idle();
        if idle.len() < IDLE_CHANNELS {
            idle.push(channel);
        }
    }

    /// The connection and its number; connects if there is none.
    pub(super) async fn connection(&self) -> Result<(Arc<Connection>, u64)> {
        timeout(CONNECT_TIMEOUT, self.connect()).await.unwrap_or_else(|_| {
            self.down.store(true, Ordering::Relaxed);
            let message = format!("no connection to {self} within {} s", CONNECT_TIMEOUT.as_secs());
            Err(BrokerError::unavailable(message))
        })
    }

    async fn connect(&self) -> Result<(Arc<Connection>, u64)> {
        let mut state = self.state.lock().await;
        if let Some(connection) = &state.connection {
            if connection.status().connected() {
                return Ok((connection.clone(), state.generation));
            }
            tracing::warn!(broker = %self, connection = %self.name, "the connection to the broker broke");
            state.connection = None;
            self.idle().clear();
        }
        if let Some((error, until)) = &state.failure
            && Instant::now() < *until
        {
            return Err(failed(error.clone()));
        }
        state.attempt.take_if(|attempt| {
            let hopeless = attempt.began.elapsed() > ATTEMPT_TIMEOUT;
            if hopeless {
                attempt.task.abort();
            }
            hopeless
        });
        let attempt = state.attempt.get_or_insert_with(|| self.attempt());
        let outcome = (&mut attempt.task).await.unwrap_or_else(|error| Err(std::io::Error::other(error).into()));
        state.attempt = None;
        match outcome {
            Ok(connection) => {
                tracing::info!(broker = %self, connection = %self.name, "connected to the broker");
                let connection = Arc::new(connection);
                let generation = state.generation + 1;
                *state = State { connection: Some(connection.clone()), generation, ..State::default() };
                self.down.store(false, Ordering::Relaxed);
                Ok((connection, generation))
            }
            Err(error) => {
                state.failures += 1;
                let wait = backoff(state.failures, rand::random_range(0.5..1.0));
                tracing::warn!(broker = %self, connection = %self.name, %error, "could not connect to the broker");
                state.failure = Some((error.clone(), Instant::now() + wait));
                self.down.store(true, Ordering::Relaxed);
                Err(failed(error))
            }
        }
    }

    fn attempt(&self) -> Attempt {
        let properties = ConnectionProperties::default().with_connection_name(self.name.as_str().into());
        let uri = self.uri.clone();
        Attempt { began: Instant::now(), task: tokio::spawn(Connection::connect_uri(uri, properties)) }
    }

    fn idle(&self) -> std::sync::MutexGuard<'_, Vec<Channel>> {
        self.idle.lock().expect("no thread panics while it holds this lock")
    }
}

/// The address without the credentials.
impl fmt::Display for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}://{}:{}", self.uri.scheme, self.uri.authority.host, self.uri.authority.port)
    }
}

/// The wait after so many failures in a row; `jitter` is a factor.
fn backoff(failures: u32, jitter: f64) -> Duration {
    let doubled = BACKOFF.0.saturating_mul(1 << failures.saturating_sub(1).min(16));
    doubled.min(BACKOFF.1).mul_f64(jitter)
}

/// Waits for the broker's answer, but not forever.
pub(super) async fn answered<T>(what: &str, request: impl Future<Output = lapin::Result<T>>) -> Result<T> {
    match timeout(ANSWER_TIMEOUT, request).await {
        Ok(answer) => answer.map_err(failed),
        Err(_) => Err(BrokerError::unavailable(format!("no answer to {what} within {} s", ANSWER_TIMEOUT.as_secs()))),
    }
}

/// The one place where the client's errors become the port's.
pub(super) fn failed(error: lapin::Error) -> BrokerError {
    use AMQPHardError::{NOTALLOWED, NOTIMPLEMENTED};
    use AMQPSoftError::{ACCESSREFUSED, NOTFOUND, PRECONDITIONFAILED};
    let lasting = match error.kind() {
        ErrorKind::ProtocolError(error) => matches!(
            error.kind(),
            AMQPErrorKind::Soft(ACCESSREFUSED | NOTFOUND | PRECONDITIONFAILED)
                | AMQPErrorKind::Hard(NOTALLOWED | NOTIMPLEMENTED)
        ),
        ErrorKind::InvalidProtocolVersion(_) | ErrorKind::AuthProviderError(_) | ErrorKind::NoDefaultRuntime => true,
        _ => false,
    };
    if lasting { BrokerError::internal(error) } else { BrokerError::unavailable(error) }
}

/// True if the broker says that there is no such queue or exchange.
pub(super) fn is_not_found(error: &BrokerError) -> bool {
    let (BrokerError::Internal(source) | BrokerError::Unavailable(source)) = error;
    let Some(error) = source.downcast_ref::<lapin::Error>() else { return false };
    matches!(error.kind(), ErrorKind::ProtocolError(error)
        if matches!(error.kind(), AMQPErrorKind::Soft(AMQPSoftError::NOTFOUND)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_wait_doubles_up_to_its_bound() {
        assert_eq!(backoff(1, 1.0), Duration::from_millis(200));
        assert_eq!(backoff(2, 1.0), Duration::from_millis(400));
        assert_eq!(backoff(6, 1.0), Duration::from_secs(5));
        assert_eq!(backoff(u32::MAX, 1.0), Duration::from_secs(5));
        assert_eq!(backoff(u32::MAX, 0.5), Duration::from_millis(2500));
    }

    #[test]
    fn the_address_shows_no_credentials() {
        let link = Link::new("amqp://someone:secret@rabbit:5673/farm".parse().unwrap(), "test".into());
        assert_eq!(link.to_string(), "amqp://rabbit:5673");
    }
}
