//! Pictures per second through the farm over those of the bare engine, in turns.

use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use farm::catalog::DEMO;
use farm::spec::RenderRequest;
use serde::Serialize;

use super::alone::Alone;
use super::journey::Journey;
use super::machine::{self, CpuUse, Stopwatch};
use super::site::Site;
use super::stats::Spread;
use super::table::Table;
use super::{jobs, rig};

/// What the farm should reach.
const GOAL: f64 = 0.97;

/// Above this share the processor counts as the limit.
const BUSY: f64 = 0.95;

/// What was measured.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Delivered {
    /// Jobs of a round.
    pub jobs: u64,
    /// Rows of a batch at most.
    pub max_batch: u32,
    /// The device, for people.
    pub device: String,
    /// The number format.
    pub dtype: &'static str,
    /// Delivered over bare, over all rounds.
    pub ratio: Option<Spread>,
    /// Every round.
    pub rounds: Vec<Round>,
}

/// The same jobs both ways.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Round {
    /// The bare engine.
    pub bare: Stretch,
    /// The farm.
    pub farm: Stretch,
    /// What the farm says of its pictures.
    pub journey: Journey,
    /// Runnable processes over the last minute, at the round's end.
    pub load_average: Option<f64>,
}

/// One way.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Stretch {
    /// Pictures that came out.
    pub pictures: u64,
    /// In how many seconds.
    pub seconds: f64,
    /// Processor time meanwhile.
    pub cpu: Option<CpuUse>,
}

impl Stretch {
    /// Pictures a second.
    pub fn rate(&self) -> f64 {
        self.pictures as f64 / self.seconds
    }
}

impl Round {
    /// Delivered over bare.
    pub fn ratio(&self) -> f64 {
        self.farm.rate() / self.bare.rate()
    }
}

/// Measures `rounds` rounds of `jobs` jobs, after a warm-up of both.
pub async fn measure(site: &Site, jobs: u64, rounds: u32) -> Result<Delivered> {
    let config = &site.config().worker;
    let folder = site.catalog.find(Some(DEMO))?.1.source.clone();
    let alone = Alone::load(folder.as_ref(), config).context("the bare engine cannot be measured")?;
    let alone = Arc::new(alone);
    let mut rig = site.rig().await?;
    let client = rig.serve().await?;
    rig.add_worker().await?;

    let measuring = async {
        let warm_up = u64::from(config.max_batch);
        bare(&alone, 0, warm_up).await?;
        farm(&client, 0, warm_up).await?;
        let mut measured = Vec::new();
        for round in 0..u64::from(rounds) {
            let first = warm_up + round * jobs;
            eprintln!("kiln: delivered ÷ bare, round {} of {rounds}", round + 1);
            let bare = bare(&alone, first, jobs).await?;
            let (farm, journey) = farm(&client, first, jobs).await?;
            measured.push(Round { bare, farm, journey, load_average: machine::load_average().map(|load| load[0]) });
        }
        Ok(measured)
    };
    let measured = rig.watch_over(measuring).await?;
    rig.stop().await?;
    let ratios: Vec<f64> = measured.iter().map(Round::ratio).collect();
    Ok(Delivered {
        jobs,
        max_batch: config.max_batch,
        device: alone.device().to_owned(),
        dtype: alone.dtype(),
        ratio: Spread::of(&ratios),
        rounds: measured,
    })
}

async fn bare(alone: &Arc<Alone>, first: u64, count: u64) -> Result<Stretch> {
    let alone = Arc::clone(alone);
    let rendering = move || {
        let watch = Stopwatch::start();
        let pictures = alone.render(first, count)?;
        Ok(Stretch { pictures, seconds: watch.seconds(), cpu: watch.cpu() })
    };
    tokio::task::spawn_blocking(rendering).await.context("the bare engine panicked")?
}

/// The seconds are those between the store's own times of acceptance and of the last job's end.
async fn farm(client: &crate::client::Client, first: u64, count: u64) -> Result<(Stretch, Journey)> {
    let requests = (first..first + count).map(|index| jobs::request(index, DEMO));
    let body = lines(requests);
    let watch = Stopwatch::start();
    let id = rig::submit(client, body).await?;
    let view = rig::all_done(client, id).await?;
    let cpu = watch.cpu();
    ensure!(view.counters.done == count, "{} jobs were done, not {count}", view.counters.done);
    let stretch = Stretch { pictures: count, seconds: rig::seconds_of(&view)?, cpu };
    Ok((stretch, Journey::of(client, &view).await?))
}

/// Jobs as JSON Lines.
pub fn lines(requests: impl Iterator<Item = RenderRequest>) -> String {
    let mut text = String::new();
    for request in requests {
        text.push_str(&serde_json::to_string(&request).expect("a request can be written as JSON"));
        text.push('\n');
    }
    text
}

impl Delivered {
    /// The figures for people.
    pub fn table(&self, cores: usize) -> Table {
        let title = format!(
            "Delivered ÷ bare: {} pictures a round, {side}×{side}, {} steps, guidance {}, at most {} rows a batch, {}, {}",
            self.jobs,
            jobs::STEPS,
            jobs::GUIDANCE_SCALE,
            self.max_batch,
            self.device,
            self.dtype,
            side = jobs::SIDE,
        );
        let headings = ["round", "bare/s", "farm/s", "ratio", "bare CPU s/picture", "farm CPU s/picture", "load"];
        let mut table = Table::new(title, headings);
        for (number, round) in self.rounds.iter().enumerate() {
            table.row([
                (number + 1).to_string(),
                format!("{:.3}", round.bare.rate()),
                format!("{:.3}", round.farm.rate()),
                format!("{:.3}", round.ratio()),
                cpu_per_picture(&round.bare),
                cpu_per_picture(&round.farm),
                round.load_average.map_or_else(|| "?".into(), |load| format!("{load:.1}")),
            ]);
        }
        if let Some(Spread { median, min, max }) = self.ratio {
            table.note(format!("The median ratio is {median:.3} ({min:.3} to {max:.3}); the goal is {GOAL}."));
        }
        if let Some(way) = way(&self.rounds) {
            table.note(way);
        }
        if let Some(limit) = limit(&self.rounds, cores) {
            table.note(limit);
        }
        table
    }
}

fn cpu_per_picture(stretch: &Stretch) -> String {
    stretch.cpu.map_or_else(|| "?".into(), |cpu| format!("{:.3}", cpu.own / stretch.pictures as f64))
}

/// Where the farm's pictures spent their time, the middle over all rounds.
fn way(rounds: &[Round]) -> Option<String> {
    let middle = |part: fn(&Journey) -> f64| {
        let samples: Vec<f64> = rounds.iter().map(|round| part(&round.journey)).collect();
        Spread::of(&samples).map(|spread| spread.median)
    };
    Some(format!(
        "The first job is claimed after {:.2} s, the last one done {:.2} s after its picture; {:.1} rows share a pass. A \
         picture waits {:.0} ms on the device, denoises {:.0}, decodes {:.0}; beside it the PNG takes {:.1}, its upload {:.1}.",
        middle(|journey| journey.head_seconds)?,
        middle(|journey| journey.tail_seconds)?,
        middle(|journey| journey.rows)?,
        middle(|journey| journey.wait_ms)?,
        middle(|journey| journey.denoise_ms)?,
        middle(|journey| journey.decode_ms)?,
        middle(|journey| journey.encode_ms)?,
        middle(|journey| journey.upload_ms)?,
    ))
}

/// What the farm is limited by, as far as processor time tells.
fn limit(rounds: &[Round], cores: usize) -> Option<String> {
    let sum = |way: fn(&Round) -> &Stretch| {
        rounds.iter().map(way).try_fold([0.0; 3], |[own, machine, seconds], stretch| {
            let cpu = stretch.cpu?;
            Some([own + cpu.own, machine + cpu.machine, seconds + stretch.seconds])
        })
    };
    let [bare_own, ..] = sum(|round| &round.bare)?;
    let [own, machine, seconds] = sum(|round| &round.farm)?;
    let available = seconds * cores as f64;
    if own <= 0.0 || bare_own <= 0.0 || available <= 0.0 {
        return None;
    }
    let (busy, more) = ((machine / available).min(1.0), own / bare_own - 1.0);
    let others = ((machine - own) / available).max(0.0);
    Some(if busy >= BUSY {
        format!(
            "The processor is the limit: busy for {:.0} % of the farm's time, {:.0} % of it with other processes (servers \
             included). A picture costs this process {:+.1} % against the bare engine.",
            busy * 100.0,
            others * 100.0,
            more * 100.0
        )
    } else {
        format!(
            "The processor idles for {:.0} % of the farm's time: the rest of the gap is waiting. A picture costs this \
             process {:+.1} % against the bare engine.",
            (1.0 - busy) * 100.0,
            more * 100.0
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const JOURNEY: Journey = Journey {
        head_seconds: 0.05,
        tail_seconds: 0.02,
        rows: 7.5,
        wait_ms: 900.0,
        denoise_ms: 800.0,
        decode_ms: 70.0,
        encode_ms: 1.5,
        upload_ms: 0.5,
    };

    fn stretch(seconds: f64, own: f64, machine: f64) -> Stretch {
        Stretch { pictures: 10, seconds, cpu: Some(CpuUse { own, machine }) }
    }

    fn delivered(bare: Stretch, farm: Stretch) -> Delivered {
        let rounds = vec![Round { bare, farm, journey: JOURNEY, load_average: Some(1.0) }];
        let ratio = Spread::of(&[rounds[0].ratio()]);
        Delivered { jobs: 10, max_batch: 8, device: "cpu (2 threads)".into(), dtype: "f32", ratio, rounds }
    }

    #[test]
    fn the_ratio_is_the_farms_rate_over_the_engines() {
        let delivered = delivered(stretch(8.0, 16.0, 16.0), stretch(10.0, 18.0, 20.0));
        assert_eq!(delivered.ratio.unwrap().median, 0.8);
        let text = delivered.table(2).to_string();
        assert!(text.contains("1.250") && text.contains("1.000") && text.contains("0.800"), "{text}");
    }

    #[test]
    fn the_way_of_the_pictures_is_told() {
        let text = delivered(stretch(8.0, 16.0, 16.0), stretch(10.0, 18.0, 20.0)).table(2).to_string();
        assert!(text.contains("claimed after 0.05 s") && text.contains("7.5 rows share a pass"), "{text}");
    }

    #[test]
    fn a_busy_processor_is_named_as_the_limit() {
        let text = delivered(stretch(8.0, 16.0, 16.0), stretch(10.0, 18.0, 20.0)).table(2).to_string();
        assert!(text.contains("The processor is the limit: busy for 100 %") && text.contains("+12.5 %"), "{text}");
    }

    #[test]
    fn an_idle_processor_means_waiting() {
        let text = delivered(stretch(8.0, 16.0, 16.0), stretch(10.0, 16.0, 16.0)).table(2).to_string();
        assert!(text.contains("idles for 20 % of the farm's time") && text.contains("+0.0 %"), "{text}");
    }

    #[test]
    fn without_processor_times_no_limit_is_named() {
        let unknown = Stretch { pictures: 1, seconds: 1.0, cpu: None };
        assert_eq!(limit(&[Round { bare: unknown, farm: unknown, journey: JOURNEY, load_average: None }], 2), None);
    }

    #[test]
    fn each_job_is_a_line() {
        let text = lines((0..3).map(|index| jobs::request(index, DEMO)));
        assert_eq!(text.lines().count(), 3);
        assert!(text.lines().all(|line| serde_json::from_str::<RenderRequest>(line).is_ok()));
    }
}
