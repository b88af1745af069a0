//! How an attempt ends: pure decisions, the same on every database.

use std::time::Duration;

use serde::Serialize;

use super::StoreSettings;
use crate::id::{JobId, SubmissionId, WorkerId};
use crate::job::{Failure, FailureKind, JobState};

/// A leased job as it stands, its row locked.
#[derive(Clone, Debug, sqlx::FromRow)]
pub(super) struct LeasedJob {
    pub(super) job_id: JobId,
    pub(super) submission_id: SubmissionId,
    pub(super) attempts: i32,
    pub(super) max_attempts: i32,
    pub(super) last_attempt: i32,
    pub(super) cancel_requested: bool,
    pub(super) worker: String,
    #[sqlx(json)]
    pub(super) failed_workers: Vec<String>,
}

/// Why an attempt ends without a picture.
#[derive(Clone, Debug)]
pub(super) enum Ending<'a> {
    /// The worker says so.
    Failed(&'a WorkerId, &'a Failure),
    /// The lease was not renewed in time.
    Expired,
    /// The worker gives it back; it does not count.
    Released,
    /// The worker has dropped the row of a cancelled job.
    Cancelled,
}

/// What a job becomes when its attempt has ended.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(super) struct EndedAttempt {
    pub(super) job_id: JobId,
    #[serde(skip)]
    pub(super) submission_id: SubmissionId,
    /// The attempt, whose objects may have to be deleted.
    #[serde(skip)]
    pub(super) attempt: i32,
    pub(super) state: JobState,
    pub(super) attempts: i32,
    /// Microseconds until it is due again.
    pub(super) delay: i64,
    pub(super) error_kind: Option<FailureKind>,
    pub(super) error_message: Option<String>,
    pub(super) failed_workers: Vec<String>,
}

/// What becomes of `job`. A cancellation that a client has asked for wins over another attempt and over
/// a failure; a release gives the attempt back.
pub(super) fn end_attempt(job: LeasedJob, ending: &Ending<'_>, settings: &StoreSettings) -> EndedAttempt {
    let error = match ending {
        Ending::Failed(_, failure) => Some((*failure).clone()),
        Ending::Expired if !job.cancel_requested => Some(Failure {
            kind: FailureKind::Retryable,
            message: format!("worker `{}` went silent: its lease expired", job.worker),
        }),
        Ending::Expired | Ending::Released | Ending::Cancelled => None,
    };
    let is_spent = job.attempts >= job.max_attempts;
    let state = match ending {
        Ending::Cancelled => JobState::Cancelled,
        _ if job.cancel_requested => JobState::Cancelled,
        Ending::Released => JobState::Pending,
        Ending::Failed(_, failure) if is_spent || !failure.kind.is_retryable() => JobState::Failed,
        Ending::Expired if is_spent => JobState::Failed,
        Ending::Failed(..) | Ending::Expired => JobState::Pending,
    };
    let delay = match ending {
        Ending::Released => Duration::ZERO,
        _ => backoff(settings, job.attempts),
    };
    let mut failed_workers = job.failed_workers;
    if let Ending::Failed(worker, _) = ending
        && !failed_workers.contains(&worker.0)
    {
        failed_workers.push(worker.0.clone());
    }
    EndedAttempt {
        job_id: job.job_id,
        submission_id: job.submission_id,
        attempt: job.last_attempt,
        state,
        attempts: if matches!(ending, Ending::Released) { job.attempts - 1 } else { job.attempts },
        delay: delay.as_micros() as i64,
        error_kind: error.as_ref().map(|error| error.kind),
        // Postgres cannot hold U+0000 in text, and a renderer's message may hold anything.
        error_message: error.map(|error| error.message.replace('\0', "\u{fffd}")),
        failed_workers,
    }
}

/// The wait after so many attempts: doubles with each, up to a bound.
pub(super) fn backoff(settings: &StoreSettings, attempts: i32) -> Duration {
    let doublings = attempts.saturating_sub(1).clamp(0, 31) as u32;
    settings.backoff.saturating_mul(1 << doublings).min(settings.backoff_max)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leased(attempts: i32, max_attempts: i32) -> LeasedJob {
        LeasedJob {
            job_id: JobId::new(),
            submission_id: SubmissionId::new(),
            attempts,
            max_attempts,
            last_attempt: attempts + 3,
            cancel_requested: false,
            worker: "ann".into(),
            failed_workers: vec!["bob".into()],
        }
    }

    fn failure(kind: FailureKind) -> Failure {
        Failure { kind, message: "no\0 luck".into() }
    }

    fn settings() -> StoreSettings {
        StoreSettings { backoff: Duration::from_secs(2), backoff_max: Duration::from_secs(10), ..Default::default() }
    }

    #[test]
    fn the_wait_doubles_with_each_attempt_up_to_its_bound() {
        let waits: Vec<u64> = (1..=5).map(|attempts| backoff(&settings(), attempts).as_secs()).collect();
        assert_eq!(waits, [2, 4, 8, 10, 10]);
        assert_eq!(backoff(&settings(), i32::MAX), Duration::from_secs(10));
    }

    #[test]
    fn a_failure_with_attempts_left_goes_back_to_pending_and_remembers_the_worker() {
        let worker = WorkerId("ann".into());
        let failure = failure(FailureKind::Poison);
        let ended = end_attempt(leased(2, 4), &Ending::Failed(&worker, &failure), &settings());
        assert_eq!((ended.state, ended.attempts, ended.delay), (JobState::Pending, 2, 4_000_000));
        assert_eq!(ended.failed_workers, ["bob", "ann"]);
        assert_eq!(ended.error_message.as_deref(), Some("no\u{fffd} luck"));
        assert_eq!(ended.attempt, 5);
    }

    #[test]
    fn a_failure_is_final_when_attempts_are_spent_or_the_job_is_invalid() {
        let worker = WorkerId("ann".into());
        let retryable = failure(FailureKind::Retryable);
        let invalid = failure(FailureKind::Invalid);
        let spent = end_attempt(leased(4, 4), &Ending::Failed(&worker, &retryable), &settings());
        let refused = end_attempt(leased(1, 4), &Ending::Failed(&worker, &invalid), &settings());
        assert_eq!((spent.state, refused.state), (JobState::Failed, JobState::Failed));
        assert_eq!(refused.error_kind, Some(FailureKind::Invalid));
    }

    #[test]
    fn an_expired_lease_is_tried_again_until_attempts_are_spent() {
        let again = end_attempt(leased(3, 4), &Ending::Expired, &settings());
        let spent = end_attempt(leased(4, 4), &Ending::Expired, &settings());
        assert_eq!((again.state, spent.state), (JobState::Pending, JobState::Failed));
        assert_eq!(again.error_message.as_deref(), Some("worker `ann` went silent: its lease expired"));
        assert_eq!(again.failed_workers, ["bob"], "a worker that died has not failed the job");
    }

    #[test]
    fn a_release_gives_the_attempt_back_at_once() {
        let ended = end_attempt(leased(1, 4), &Ending::Released, &settings());
        assert_eq!((ended.state, ended.attempts, ended.delay), (JobState::Pending, 0, 0));
        assert_eq!(ended.error_kind, None);
    }

    #[test]
    fn a_requested_cancellation_wins_however_the_attempt_ends() {
        let worker = WorkerId("ann".into());
        let failure = failure(FailureKind::Retryable);
        let asked = |ending: &Ending<'_>| {
            end_attempt(LeasedJob { cancel_requested: true, ..leased(1, 4) }, ending, &settings()).state
        };
        assert_eq!(asked(&Ending::Failed(&worker, &failure)), JobState::Cancelled);
        assert_eq!(asked(&Ending::Expired), JobState::Cancelled);
        assert_eq!(asked(&Ending::Released), JobState::Cancelled);
        assert_eq!(asked(&Ending::Cancelled), JobState::Cancelled);
    }
}
