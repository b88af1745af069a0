//! How fast a long submission is accepted, durably, and in how much memory.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use futures_util::stream;
use serde::Serialize;
use tokio_util::task::AbortOnDropHandle;

use super::delivered::lines;
use super::machine::{self, Stopwatch};
use super::site::{Site, TWIN};
use super::stats::Spread;
use super::table::Table;
use super::{jobs, rig};

/// Jobs in a piece of the body.
const PIECE: u64 = 500;

/// Between two looks at the memory.
const LOOK_INTERVAL: Duration = Duration::from_millis(50);

/// What the scheduler should reach, in jobs a second.
const GOAL: f64 = 10_000.0;

/// What was measured.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Bulk {
    /// Jobs of a submission.
    pub jobs: u64,
    /// Bytes of its body.
    pub bytes: u64,
    /// Jobs a second from the first byte sent to the answer 202.
    pub rate: Option<Spread>,
    /// Every submission, one after the other to the same store.
    pub rounds: Vec<Round>,
}

/// One submission.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Round {
    /// From the first byte sent to the last.
    pub sent_seconds: f64,
    /// From the first byte sent to the answer 202.
    pub seconds: f64,
    /// Processor time of client and scheduler, in seconds over all cores.
    pub cpu_seconds: Option<f64>,
    /// This process's memory, which client, scheduler and the embedded ports share.
    pub memory: Option<Memory>,
}

/// Memory in MiB.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Memory {
    /// Before.
    pub start: f64,
    /// With a tenth of the jobs sent.
    pub at_a_tenth: f64,
    /// With the answer.
    pub end: f64,
    /// The most that was seen.
    pub peak: f64,
    /// Seconds since the start, and what was held.
    pub samples: Vec<(f64, f64)>,
}

/// Sends `rounds` submissions of `jobs` jobs. No worker runs.
pub async fn measure(site: &Site, jobs: u64, rounds: u32) -> Result<Bulk> {
    let mut rig = site.rig().await?;
    let client = rig.serve().await?;
    let sending = async {
        let mut measured = Vec::new();
        for round in 1..=rounds {
            eprintln!("kiln: bulk submissions, round {round} of {rounds}");
            measured.push(send(&client, jobs).await?);
        }
        Ok(measured)
    };
    let measured = rig.watch_over(sending).await?;
    rig.stop().await?;
    let rates: Vec<f64> = measured.iter().map(|(round, _)| jobs as f64 / round.seconds).collect();
    let bytes = measured.first().map_or(0, |(_, bytes)| *bytes);
    Ok(Bulk { jobs, bytes, rate: Spread::of(&rates), rounds: measured.into_iter().map(|(round, _)| round).collect() })
}

/// How far the body has been taken from us.
#[derive(Default)]
struct Sent {
    bytes: AtomicU64,
    /// Bits of an `f64`: MiB held with a tenth of the jobs sent, seconds at the end of the body.
    memory_at_a_tenth: AtomicU64,
    seconds: AtomicU64,
}

async fn send(client: &crate::client::Client, jobs: u64) -> Result<(Round, u64)> {
    let sent = Arc::new(Sent::default());
    let start = machine::resident_mib();
    let watch = Arc::new(Stopwatch::start());
    let sampler = sample_memory(Arc::clone(&watch));
    let body = reqwest::Body::wrap_stream(pieces(jobs, Arc::clone(&sent), Arc::clone(&watch)));
    let id = rig::submit(client, body).await?;
    let (seconds, cpu, end) = (watch.seconds(), watch.cpu(), machine::resident_mib());
    let samples = sampler.finish().await?;
    let stored = client.submission(id).await?.counters.total();
    ensure!(stored == jobs, "{stored} jobs were stored, not {jobs}");
    let memory = start.zip(end).map(|(start, end)| Memory {
        start,
        at_a_tenth: f64::from_bits(sent.memory_at_a_tenth.load(Ordering::Relaxed)),
        end,
        peak: samples.iter().map(|(_, held)| *held).fold(start.max(end), f64::max),
        samples,
    });
    let sent_seconds = f64::from_bits(sent.seconds.load(Ordering::Relaxed));
    let round = Round { sent_seconds, seconds, cpu_seconds: cpu.map(|cpu| cpu.own), memory };
    Ok((round, sent.bytes.load(Ordering::Relaxed)))
}

/// The body, made piece by piece as it is taken. The jobs are those of a checkpoint that nobody serves.
fn pieces(
    jobs: u64,
    sent: Arc<Sent>,
    watch: Arc<Stopwatch>,
) -> impl futures_util::Stream<Item = Result<Bytes, Infallible>> {
    stream::iter((0..jobs).step_by(PIECE as usize).map(move |first| {
        let last = (first + PIECE).min(jobs);
        let piece = lines((first..last).map(|index| jobs::request(index, TWIN)));
        sent.bytes.fetch_add(piece.len() as u64, Ordering::Relaxed);
        if (first..last).contains(&(jobs / 10)) {
            let held = machine::resident_mib().unwrap_or_default();
            sent.memory_at_a_tenth.store(held.to_bits(), Ordering::Relaxed);
        }
        if last == jobs {
            sent.seconds.store(watch.seconds().to_bits(), Ordering::Relaxed);
        }
        Ok(Bytes::from(piece))
    }))
}

/// Looks at the memory until told to finish.
struct Sampler {
    task: AbortOnDropHandle<Vec<(f64, f64)>>,
    finish: tokio::sync::oneshot::Sender<()>,
}

fn sample_memory(watch: Arc<Stopwatch>) -> Sampler {
    let (finish, mut finished) = tokio::sync::oneshot::channel();
    let task = tokio::spawn(async move {
        let mut samples = Vec::new();
        loop {
            samples.extend(machine::resident_mib().map(|held| (watch.seconds(), held)));
            tokio::select! {
                _ = &mut finished => return samples,
                () = tokio::time::sleep(LOOK_INTERVAL) => {}
            }
        }
    });
    Sampler { task: AbortOnDropHandle::new(task), finish }
}

impl Sampler {
    async fn finish(self) -> Result<Vec<(f64, f64)>> {
        let _ended_already = self.finish.send(());
        self.task.await.context("looking at the memory panicked")
    }
}

impl Bulk {
    /// The figures for people.
    pub fn table(&self) -> Table {
        let bytes = self.bytes as f64 / self.jobs as f64;
        let title =
            format!("Bulk submission: {} jobs of {bytes:.0} bytes as JSON Lines, until the answer 202", self.jobs);
        let headings =
            ["round", "jobs/s", "seconds", "of which sending", "CPU µs/job", "MiB start", "at 10 %", "end", "peak"];
        let mut table = Table::new(title, headings);
        for (number, round) in self.rounds.iter().enumerate() {
            let memory = |part: fn(&Memory) -> f64| {
                round.memory.as_ref().map_or_else(|| "?".into(), |memory| format!("{:.1}", part(memory)))
            };
            table.row([
                (number + 1).to_string(),
                format!("{:.0}", self.jobs as f64 / round.seconds),
                format!("{:.2}", round.seconds),
                format!("{:.2}", round.sent_seconds),
                round.cpu_seconds.map_or_else(|| "?".into(), |cpu| format!("{:.1}", cpu * 1e6 / self.jobs as f64)),
                memory(|memory| memory.start),
                memory(|memory| memory.at_a_tenth),
                memory(|memory| memory.end),
                memory(|memory| memory.peak),
            ]);
        }
        if let Some(Spread { median, min, max }) = self.rate {
            table.note(format!("The median is {median:.0} jobs/s ({min:.0} to {max:.0}); the goal is {GOAL:.0}."));
        }
        let growth = |memory: &Memory| memory.peak - memory.at_a_tenth;
        let growths: Vec<f64> = self.rounds.iter().filter_map(|round| round.memory.as_ref()).map(growth).collect();
        if let Some(Spread { max, .. }) = Spread::of(&growths) {
            table.note(format!(
                "After the first tenth the memory grew by at most {max:.1} MiB (an embedded store's page cache fills first)."
            ));
        }
        table
    }
}

#[cfg(test)]
mod tests {
    use futures_util::StreamExt;

    use super::*;

    #[tokio::test]
    async fn the_body_holds_every_job_once_and_notes_its_way() {
        let sent = Arc::new(Sent::default());
        let body = pieces(1203, Arc::clone(&sent), Arc::new(Stopwatch::start()));
        let text: Vec<u8> = body.map(|piece| piece.unwrap().to_vec()).concat().await;
        let text = String::from_utf8(text).unwrap();
        assert_eq!(text.lines().count(), 1203);
        assert!(text.lines().last().unwrap().contains("\"seed\":1202"));
        assert_eq!(sent.bytes.load(Ordering::Relaxed), text.len() as u64);
        assert!(f64::from_bits(sent.seconds.load(Ordering::Relaxed)) > 0.0);
    }

    #[test]
    fn memory_is_judged_by_its_growth_after_the_first_tenth() {
        let memory = Memory { start: 20.0, at_a_tenth: 41.0, end: 42.0, peak: 43.5, samples: vec![] };
        let round = Round { sent_seconds: 1.0, seconds: 2.0, cpu_seconds: Some(3.0), memory: Some(memory) };
        let bulk = Bulk { jobs: 30_000, bytes: 3_000_000, rate: Spread::of(&[15_000.0]), rounds: vec![round] };
        let text = bulk.table().to_string();
        assert!(text.contains("grew by at most 2.5 MiB") && text.contains("15000") && text.contains("100.0"), "{text}");
    }
}
