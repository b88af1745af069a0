//! Who watches which job, in this process. Both brokers hand news out through this.

use std::collections::HashMap;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};

use futures_util::Stream;
use tokio::sync::{broadcast, mpsc};
use tokio_stream::wrappers::BroadcastStream;
use tokio_stream::wrappers::errors::BroadcastStreamRecvError;

use super::ProgressStream;
use crate::id::JobId;
use crate::message::ProgressEvent;

/// Events a watcher may lag behind before the oldest are dropped. Events are hints: the newest one
/// tells the most.
const BACKLOG: usize = 256;

/// The watchers of a process.
#[derive(Debug)]
pub(super) struct Watchers {
    jobs: Mutex<HashMap<JobId, broadcast::Sender<ProgressEvent>>>,
    /// Told about each job whose last watcher has left.
    abandoned: Option<mpsc::UnboundedSender<JobId>>,
}

impl Watchers {
    /// Nobody yet.
    pub(super) fn new(abandoned: Option<mpsc::UnboundedSender<JobId>>) -> Arc<Self> {
        Arc::new(Self { jobs: Mutex::default(), abandoned })
    }

    /// One more watcher.
    pub(super) fn watch(self: &Arc<Self>, job: JobId) -> ProgressStream {
        let mut jobs = self.jobs.lock().expect("no thread panics while it holds this lock");
        let receiver = jobs.entry(job).or_insert_with(|| broadcast::Sender::new(BACKLOG)).subscribe();
        Box::pin(Watcher { job, events: Some(BroadcastStream::new(receiver)), watchers: self.clone() })
    }

    /// Hands an event to those who watch its job.
    pub(super) fn announce(&self, event: ProgressEvent) {
        let jobs = self.jobs.lock().expect("no thread panics while it holds this lock");
        if let Some(sender) = jobs.get(&event.job_id) {
            // An error says that nobody listens, which is fine.
            let _ = sender.send(event);
        }
    }

    /// True while anybody watches the job.
    pub(super) fn has(&self, job: JobId) -> bool {
        self.jobs.lock().expect("no thread panics while it holds this lock").contains_key(&job)
    }

    /// Ends every stream, after the events it still holds.
    pub(super) fn end_all(&self) {
        self.jobs.lock().expect("no thread panics while it holds this lock").clear();
    }

    fn left(&self, job: JobId) {
        let mut jobs = self.jobs.lock().expect("no thread panics while it holds this lock");
        if jobs.get(&job).is_some_and(|sender| sender.receiver_count() == 0) {
            jobs.remove(&job);
            if let Some(abandoned) = &self.abandoned {
                // An error says that the process is on its way out.
                let _ = abandoned.send(job);
            }
        }
    }
}

/// One watcher's stream.
struct Watcher {
    job: JobId,
    /// `None` only while it is dropped.
    events: Option<BroadcastStream<ProgressEvent>>,
    watchers: Arc<Watchers>,
}

impl Stream for Watcher {
    type Item = ProgressEvent;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<ProgressEvent>> {
        let Some(events) = self.events.as_mut() else { return Poll::Ready(None) };
        loop {
            match std::task::ready!(Pin::new(&mut *events).poll_next(context)) {
                Some(Ok(event)) => return Poll::Ready(Some(event)),
                Some(Err(BroadcastStreamRecvError::Lagged(_))) => {}
                None => return Poll::Ready(None),
            }
        }
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        // The receiver must be gone before the receivers are counted.
        self.events = None;
        self.watchers.left(self.job);
    }
}

#[cfg(test)]
mod tests {
    use futures_util::StreamExt;

    use super::*;
    use crate::id::WorkerId;
    use crate::message::Progress;

    fn step(job: JobId, step: u32) -> ProgressEvent {
        ProgressEvent { job_id: job, worker: WorkerId("w".into()), progress: Progress::Step { step, total: 1000 } }
    }

    #[tokio::test]
    async fn the_last_watcher_of_a_job_to_leave_is_told_about() {
        let (abandoned, mut told) = mpsc::unbounded_channel();
        let watchers = Watchers::new(Some(abandoned));
        let job = JobId::new();
        let (first, second) = (watchers.watch(job), watchers.watch(job));
        drop(first);
        assert!(told.try_recv().is_err());
        assert!(watchers.has(job));
        drop(second);
        assert_eq!(told.try_recv(), Ok(job));
        assert!(!watchers.has(job));
    }

    #[tokio::test]
    async fn a_watcher_that_lags_gets_the_newest_events() {
        let watchers = Watchers::new(None);
        let job = JobId::new();
        let mut stream = watchers.watch(job);
        for number in 0..1000 {
            watchers.announce(step(job, number));
        }
        watchers.end_all();
        let seen: Vec<_> = stream.by_ref().collect().await;
        assert_eq!(seen.len(), BACKLOG);
        assert_eq!(seen.last(), Some(&step(job, 999)));
    }

    #[tokio::test]
    async fn a_stream_ended_from_outside_does_not_disturb_a_later_watcher() {
        let watchers = Watchers::new(None);
        let job = JobId::new();
        let old = watchers.watch(job);
        watchers.end_all();
        let mut new = watchers.watch(job);
        drop(old);
        watchers.announce(step(job, 1));
        assert_eq!(new.next().await, Some(step(job, 1)));
    }
}
