//! Progress for those who watch. Transient: a full queue drops the oldest news, and a broker that is
//! away is not waited for.

use std::collections::{HashMap, VecDeque};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use farm::broker::SharedBroker;
use farm::id::{JobId, WorkerId};
use farm::job::Lane;
use farm::message::{Progress, ProgressEvent};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

/// Bulk jobs are announced at most this often, each.
const BULK_PAUSE: Duration = Duration::from_millis(500);

/// News kept while the broker is slower than the device.
const KEPT: usize = 4096;

#[derive(Default)]
struct News {
    queue: VecDeque<(JobId, Progress)>,
    last: HashMap<JobId, Instant>,
}

impl News {
    fn push(&mut self, job: JobId, progress: Progress) {
        if self.queue.len() == KEPT {
            self.queue.pop_front();
        }
        self.queue.push_back((job, progress));
    }
}

/// Collects news and sends them.
#[derive(Default)]
pub(crate) struct Announcer {
    news: Mutex<News>,
    wake: Notify,
}

impl Announcer {
    /// A job made a step: every one is news in the interactive lane; in the bulk lane the first, the
    /// last and some between.
    pub(crate) fn stepped(&self, job: JobId, lane: Lane, step: u32, total: u32, now: Instant) {
        let mut news = self.news.lock().expect("no holder of this lock panics");
        let paused = news.last.get(&job).is_none_or(|last| now.duration_since(*last) >= BULK_PAUSE);
        if lane == Lane::Interactive || step == total || paused {
            news.last.insert(job, now);
            news.push(job, Progress::Step { step, total });
            self.wake.notify_one();
        }
    }

    /// A job left the worker, and the store knows how.
    pub(crate) fn left(&self, job: JobId) {
        let mut news = self.news.lock().expect("no holder of this lock panics");
        news.last.remove(&job);
        news.push(job, Progress::Left);
        self.wake.notify_one();
    }

    /// A job is another's now: no news of it.
    pub(crate) fn forget(&self, job: JobId) {
        self.news.lock().expect("no holder of this lock panics").last.remove(&job);
    }

    fn take(&self) -> VecDeque<(JobId, Progress)> {
        std::mem::take(&mut self.news.lock().expect("no holder of this lock panics").queue)
    }

    /// Sends news until `stop`, and then what is left.
    pub(crate) async fn run(&self, broker: &SharedBroker, worker: &WorkerId, stop: CancellationToken) {
        loop {
            tokio::select! {
                () = self.wake.notified() => self.send(broker, worker).await,
                () = stop.cancelled() => return self.send(broker, worker).await,
            }
        }
    }

    async fn send(&self, broker: &SharedBroker, worker: &WorkerId) {
        for (job_id, progress) in self.take() {
            let event = ProgressEvent { job_id, worker: worker.clone(), progress };
            if let Err(error) = broker.announce(&event).await {
                tracing::debug!(%error, "progress could not be announced");
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn steps(announcer: &Announcer) -> Vec<u32> {
        let step = |(_, progress)| match progress {
            Progress::Step { step, .. } => step,
            Progress::Left => 0,
        };
        announcer.take().into_iter().map(step).collect()
    }

    #[test]
    fn every_step_of_an_interactive_job_is_announced() {
        let (announcer, job, now) = (Announcer::default(), JobId::new(), Instant::now());
        (1..=4).for_each(|step| announcer.stepped(job, Lane::Interactive, step, 4, now));
        assert_eq!(steps(&announcer), [1, 2, 3, 4]);
    }

    #[test]
    fn a_bulk_job_is_announced_first_last_and_now_and_then() {
        let (announcer, job, start) = (Announcer::default(), JobId::new(), Instant::now());
        for step in 1..=20 {
            announcer.stepped(job, Lane::Bulk, step, 20, start + Duration::from_millis(100) * step);
        }
        announcer.left(job);
        assert_eq!(steps(&announcer), [1, 6, 11, 16, 20, 0]);
    }

    #[test]
    fn a_broker_that_is_away_costs_the_oldest_news_and_no_memory() {
        let (announcer, now) = (Announcer::default(), Instant::now());
        let job = JobId::new();
        for step in 1..=5000 {
            announcer.stepped(job, Lane::Interactive, step, 10_000, now);
        }
        let kept = steps(&announcer);
        assert_eq!((kept.len(), kept.last()), (KEPT, Some(&5000)));
    }
}
