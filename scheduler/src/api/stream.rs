//! `/v1/jobs/{id}/stream`: one job's news as server-sent events, until it is final.
//!
//! The broker's news are transient, so they are never trusted with the end: each reader subscribes first, then reads
//! the store, and goes on reading it now and then. A late reader, one that comes back, and one whose broker
//! has died all learn the end, from the store.

use std::convert::Infallible;
use std::time::Duration;

use axum::extract::State;
use axum::http::HeaderName;
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use farm::artifact::ArtifactError;
use farm::broker::ProgressStream;
use farm::id::JobId;
use farm::job::{Failure, FailureKind, JobState, JobView};
use farm::message::Progress;
use futures_util::StreamExt;
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc::Sender;
use tokio_stream::wrappers::ReceiverStream;
use tracing::warn;
use utoipa::ToSchema;

use super::SharedApi;
use super::error::ApiError;
use super::image::{image_path, presigned};
use super::openapi::Problems;
use super::query::Id;

/// A comment goes out after so much silence, so that nobody in between takes the connection for dead.
const KEEP_ALIVE: Duration = Duration::from_secs(10);
/// How often the store is read while the broker's news come in: they may be lost.
const POLL_WATCHING: Duration = Duration::from_secs(3);
/// How often the store is read without the broker's news.
const POLL_BLIND: Duration = Duration::from_secs(1);
/// The longest wait for a subscription; the store is read meanwhile all the same.
const WATCH_TIMEOUT: Duration = Duration::from_secs(2);
/// How often the image of a done job is asked for before the event goes out without it.
const IMAGE_TRIES: u32 = 10;
/// When a client should come back after an orderly stop.
const RETRY: Duration = Duration::from_secs(1);

/// What a reader of the stream gets, one JSON object in each event's `data`. After the last one comes `[DONE]`;
/// a stream that ends without it broke off: connect again.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum StreamEvent {
    /// A denoiser call ended.
    Progress {
        /// Calls so far.
        step: u32,
        /// Calls in all.
        total: u32,
    },
    /// The image is there.
    Complete {
        /// The PNG (or the latent) in base64. `null` if the artifact store did not hand it out; then the error says why.
        image: Option<String>,
        /// Where it can be read: a presigned URL, or an absolute path of this API.
        url: String,
        /// Why the image is not in this event.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        error: Option<Failure>,
    },
    /// The job was given up.
    Failed {
        /// Its last failure.
        error: Failure,
    },
    /// A client cancelled the job.
    Cancelled,
}

/// Follow a job. A late or returning reader gets the end, too.
///
/// `data: {"event":"progress","step":1,"total":20}` … `data: {"event":"complete","image":"BASE64","url":"…"}`, then
/// `data: [DONE]`. In front and in between, comments (`: state queued`) say where the job stands.
#[utoipa::path(
    get, path = "/v1/jobs/{id}/stream", tag = "jobs", params(("id" = JobId, Path, description = "The job")),
    responses((status = 200, body = StreamEvent, content_type = "text/event-stream"), Problems)
)]
pub(super) async fn follow(State(api): State<SharedApi>, Id(job): Id<JobId>) -> Result<Response, ApiError> {
    // An unknown job is answered as an error and not as a stream.
    api.job(job).await?;
    let (sender, events) = tokio::sync::mpsc::channel(16);
    let open = api.metrics.stream_opened();
    tokio::spawn(async move {
        let stop = api.stop.clone();
        let mut reader = Reader { api, job, sender, last_state: None };
        let gone = reader.sender.clone();
        tokio::select! {
            Err(Over) = reader.run() => {}
            () = gone.closed() => {}
            () = stop.cancelled() => {
                let farewell = Event::default().retry(RETRY).comment("the scheduler stops; connect again");
                // A reader that takes nothing must not hold up the stop.
                let _full_or_gone = gone.try_send(Ok(farewell));
            }
        }
        drop(open);
    });
    let stream =
        Sse::new(ReceiverStream::new(events)).keep_alive(KeepAlive::new().interval(KEEP_ALIVE).text("keep-alive"));
    // Proxies that collect answers would hold the news back.
    Ok(([(HeaderName::from_static("x-accel-buffering"), "no")], stream).into_response())
}

/// Nothing more is to be sent: the end has been told, or the reader has gone.
struct Over;

/// One client that follows one job.
struct Reader {
    api: SharedApi,
    job: JobId,
    sender: Sender<Result<Event, Infallible>>,
    last_state: Option<JobState>,
}

impl Reader {
    /// Sends news until it is over.
    async fn run(&mut self) -> Result<Infallible, Over> {
        loop {
            // Subscribed before the store is read: what happens in between comes through the subscription.
            let news = self.subscribe().await;
            self.read_store().await?;
            match news {
                Some(news) => self.pass_on(news).await?,
                None => tokio::time::sleep(POLL_BLIND).await,
            }
        }
    }

    async fn subscribe(&self) -> Option<ProgressStream> {
        let watching = tokio::time::timeout(WATCH_TIMEOUT, self.api.broker.watch(self.job)).await;
        watching.ok().and_then(Result::ok)
    }

    /// Passes progress on until the store should be read again.
    async fn pass_on(&mut self, mut news: ProgressStream) -> Result<(), Over> {
        let mut poll = tokio::time::interval(POLL_WATCHING);
        poll.tick().await;
        loop {
            tokio::select! {
                event = news.next() => match event.map(|event| event.progress) {
                    Some(Progress::Step { step, total }) => self.send(&StreamEvent::Progress { step, total }).await?,
                    // The job has left its worker; whether for good, the next reading tells.
                    Some(Progress::Left) => self.read_store().await?,
                    None => {
                        tokio::time::sleep(POLL_BLIND).await;
                        return Ok(());
                    }
                },
                _tick = poll.tick() => self.read_store().await?,
            }
        }
    }

    /// Reads the store and says what is new; it is over once that was the end.
    async fn read_store(&mut self) -> Result<(), Over> {
        let view = match self.api.store.job(self.job).await {
            Ok(Some(view)) => view,
            Ok(None) => return Err(Over),
            // It comes back; until then the reader gets the broker's news and keep-alives.
            Err(error) => {
                warn!(job.id = %self.job, "a stream cannot read the store: {error}");
                return Ok(());
            }
        };
        if !view.state.is_final() {
            if self.last_state.replace(view.state) != Some(view.state) {
                // A comment, since a reader waits for progress and the end alone.
                let comment = Event::default().comment(format!("state {}", view.state.as_str()));
                self.sender.send(Ok(comment)).await.map_err(|_closed| Over)?;
            }
            return Ok(());
        }
        let end = self.end_of(view).await;
        self.send(&end).await?;
        self.send_data("[DONE]").await?;
        Err(Over)
    }

    async fn end_of(&self, view: JobView) -> StreamEvent {
        match view.state {
            JobState::Done => self.complete(&view).await,
            JobState::Cancelled => StreamEvent::Cancelled,
            _ => StreamEvent::Failed { error: view.error.unwrap_or_else(|| retryable("the job failed".into())) },
        }
    }

    async fn complete(&self, view: &JobView) -> StreamEvent {
        let path = view.image_key.as_deref().unwrap_or_default();
        let (mut image, mut error) = (None, None);
        for attempt in 1..=IMAGE_TRIES {
            match self.api.artifacts.get(path).await {
                Ok(bytes) => {
                    (image, error) = (Some(STANDARD.encode(bytes)), None);
                    break;
                }
                Err(problem) => {
                    warn!(job.id = %self.job, attempt, "a stream cannot read the image: {problem}");
                    error = Some(retryable(problem.to_string()));
                    if !matches!(problem, ArtifactError::Unavailable(_)) {
                        break;
                    }
                    tokio::time::sleep(POLL_BLIND).await;
                }
            }
        }
        let url = presigned(&self.api, path).await.ok().flatten().unwrap_or_else(|| image_path(self.job));
        StreamEvent::Complete { image, url, error }
    }

    async fn send(&self, event: &StreamEvent) -> Result<(), Over> {
        self.send_data(&serde_json::to_string(event).expect("an event can be written as JSON")).await
    }

    async fn send_data(&self, data: &str) -> Result<(), Over> {
        self.sender.send(Ok(Event::default().data(data))).await.map_err(|_closed| Over)
    }
}

fn retryable(message: String) -> Failure {
    Failure { kind: FailureKind::Retryable, message }
}
