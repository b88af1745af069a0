//! Which checkpoint a worker should serve next: a pure function of the demand and the fleet.
//!
//! 1. A worker stays on its checkpoint while that has work.
//! 2. It is called away when another checkpoint's oldest job has waited longer than its lane's bound
//!    and nobody serves that checkpoint, or too few do for its backlog. Who can be spared goes first.
//!    A worker serves for as long as that bound before it is called away, so that checkpoints that are
//!    all overdue take turns, the longest waiting first, instead of chasing each other off the device.
//! 3. A worker without work goes where nobody serves yet, else where the wait per serving worker is
//!    longest, and rather where its weights are warm than not.
//!
//! So all workers never gather on one checkpoint while another waits, and no checkpoint waits for
//! ever. Answers are only right one after the other: the store asks while nobody else can decide.

use std::collections::BTreeMap;
use std::time::Duration;

use chrono::{DateTime, Utc};

use crate::fleet::{Demand, WorkerView};
use crate::id::WorkerId;
use crate::job::Lane;

/// Waiting jobs per serving worker from which another worker is worth a load of the weights.
const WORTH_JOINING: u64 = 8;

/// How long jobs of another checkpoint may wait for a warm worker.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Bounds {
    /// For the interactive lane.
    pub interactive: Duration,
    /// For the bulk lane.
    pub bulk: Duration,
}

impl Bounds {
    fn of(&self, lane: Lane) -> Duration {
        match lane {
            Lane::Interactive => self.interactive,
            Lane::Bulk => self.bulk,
        }
    }
}

/// The worker that asks, as it knows itself at this moment.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Asker<'a> {
    /// Its name in the fleet.
    pub worker: &'a WorkerId,
    /// The checkpoint it serves.
    pub serving: Option<&'a str>,
    /// Since when it serves it.
    pub since: DateTime<Utc>,
    /// The checkpoint whose weights are on its device.
    pub warm: Option<&'a str>,
    /// Whether it holds jobs that have not joined its running batch yet.
    pub has_waiting: bool,
}

/// What waits of one checkpoint, and who serves it beside the asker.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Backlog {
    waiting: u64,
    /// The oldest job's wait over its lane's bound, the worse of the lanes: overdue above 1.
    lateness: f64,
    /// The bound of that lane.
    bound: Duration,
    servers: u64,
}

impl Backlog {
    fn is_overdue(&self) -> bool {
        self.lateness > 1.0
    }
}

/// What `asker` should serve next; `None` if it serves nothing and nothing waits.
pub fn choose(
    asker: &Asker<'_>,
    demand: &[Demand],
    fleet: &[WorkerView],
    now: DateTime<Utc>,
    bounds: &Bounds,
) -> Option<String> {
    let servers = count_servers(asker.worker, fleet);
    let backlogs = sum_up(demand, &servers, now, bounds);
    let next = match asker.serving {
        Some(own) if asker.has_waiting || backlogs.contains_key(own) => {
            called_away(asker, own, &backlogs, &servers, now)
        }
        _ => most_in_need(asker, &backlogs),
    };
    next.or(asker.serving).map(str::to_owned)
}

/// Workers other than the asker that serve each checkpoint.
fn count_servers<'a>(asker: &WorkerId, fleet: &'a [WorkerView]) -> BTreeMap<&'a str, u64> {
    let mut servers = BTreeMap::new();
    for view in fleet {
        let status = &view.status;
        if view.alive
            && !status.draining
            && status.worker_id != *asker
            && let Some(model) = &status.serving
        {
            *servers.entry(model.as_str()).or_default() += 1;
        }
    }
    servers
}

fn sum_up<'a>(
    demand: &'a [Demand],
    servers: &BTreeMap<&str, u64>,
    now: DateTime<Utc>,
    bounds: &Bounds,
) -> BTreeMap<&'a str, Backlog> {
    let mut backlogs: BTreeMap<&str, Backlog> = BTreeMap::new();
    for Demand { queue, waiting, oldest, .. } in demand {
        if *waiting == 0 {
            continue;
        }
        let bound = bounds.of(queue.lane).max(Duration::from_millis(1));
        let wait = (now - *oldest).to_std().unwrap_or_default();
        let lateness = wait.as_secs_f64() / bound.as_secs_f64();
        let backlog = backlogs.entry(&queue.model).or_default();
        backlog.waiting += waiting;
        backlog.servers = servers.get(queue.model.as_str()).copied().unwrap_or(0);
        if lateness >= backlog.lateness {
            (backlog.lateness, backlog.bound) = (lateness, bound);
        }
    }
    backlogs
}

/// The overdue checkpoint, if any, that a worker with work of its own should leave it for.
fn called_away<'a>(
    asker: &Asker<'_>,
    own: &str,
    backlogs: &BTreeMap<&'a str, Backlog>,
    servers: &BTreeMap<&str, u64>,
    now: DateTime<Utc>,
) -> Option<&'a str> {
    let mates = servers.get(own).copied().unwrap_or(0);
    let own_waiting = backlogs.get(own).map_or(0, |backlog| backlog.waiting);
    let served_for = (now - asker.since).to_std().unwrap_or_default();
    let others_can_spare_one = servers.values().any(|&servers| servers > 1);
    let deserves_me = |backlog: &Backlog| {
        if backlog.servers == 0 {
            // Leave it to those who can be spared, unless they do not come.
            mates > 0 || !others_can_spare_one || backlog.lateness > 2.0
        } else {
            // Twice the backlog per worker that stays behind here.
            mates > 0 && backlog.waiting * (mates + 1) > 2 * own_waiting * backlog.servers
        }
    };
    backlogs
        .iter()
        .filter(|(model, backlog)| {
            **model != own && backlog.is_overdue() && served_for >= backlog.bound && deserves_me(backlog)
        })
        .max_by(|(_, a), (_, b)| (a.servers == 0).cmp(&(b.servers == 0)).then(a.lateness.total_cmp(&b.lateness)))
        .map(|(model, _)| *model)
}

/// Where a worker without work is needed most, if anywhere.
fn most_in_need<'a>(asker: &Asker<'_>, backlogs: &BTreeMap<&'a str, Backlog>) -> Option<&'a str> {
    let is_warm = |model: &str| asker.warm == Some(model);
    let rank = |model: &str, backlog: &Backlog| {
        let unserved = backlog.servers == 0;
        // Warm weights outweigh any wait that is within its bound.
        let at_hand = is_warm(model) && unserved;
        let urgency = (backlog.is_overdue() && unserved, at_hand, unserved);
        let share = (backlog.servers + 1) as f64;
        (urgency, backlog.lateness / share, is_warm(model), backlog.waiting as f64 / share)
    };
    backlogs
        .iter()
        .filter(|(model, backlog)| {
            let worth_a_load = backlog.waiting > WORTH_JOINING * backlog.servers || backlog.is_overdue();
            backlog.servers == 0 || is_warm(model) || worth_a_load
        })
        .map(|(model, backlog)| (*model, rank(model, backlog)))
        .max_by(|(_, a), (_, b)| a.0.cmp(&b.0).then(a.1.total_cmp(&b.1)).then(a.2.cmp(&b.2)).then(a.3.total_cmp(&b.3)))
        .map(|(model, _)| model)
}

#[cfg(test)]
mod tests;
