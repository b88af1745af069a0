//! How often weights are loaded while jobs of two checkpoints come in turns.

use anyhow::Result;
use farm::catalog::DEMO;
use serde::Serialize;

use super::delivered::lines;
use super::site::{Site, TWIN};
use super::table::Table;
use super::{jobs, rig};

/// What was measured, once for each number of workers.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Loads {
    /// Each run.
    pub runs: Vec<Run>,
}

/// One run.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Run {
    /// Workers, all on this machine's device.
    pub workers: u32,
    /// Jobs, half of them of either checkpoint, in turns.
    pub jobs: u64,
    /// Loads of all workers, the first ones included.
    pub loads: u64,
    /// From acceptance to the last job's end.
    pub seconds: f64,
}

impl Run {
    /// Loads for each thousand jobs.
    pub fn per_thousand(&self) -> f64 {
        1000.0 * self.loads as f64 / self.jobs as f64
    }
}

/// Renders `jobs` jobs with one worker and with two.
pub async fn measure(site: &Site, jobs: u64) -> Result<Loads> {
    let mut runs = Vec::new();
    for workers in [1, 2] {
        eprintln!("kiln: loads, {workers} of 2 workers");
        runs.push(run(site, jobs, workers).await?);
    }
    Ok(Loads { runs })
}

async fn run(site: &Site, jobs: u64, workers: u32) -> Result<Run> {
    let mut rig = site.rig().await?;
    let client = rig.serve().await?;
    for _ in 0..workers {
        rig.add_worker().await?;
    }
    let body = lines((0..jobs).map(|index| jobs::request(index, if index % 2 == 0 { DEMO } else { TWIN })));
    let rendering = async {
        let id = rig::submit(&client, body).await?;
        let view = rig::all_done(&client, id).await?;
        let fleet = rig::workers_after(&client, jobs).await?;
        let loads = fleet.iter().map(|worker| worker.status.loads).sum();
        Ok(Run { workers, jobs, loads, seconds: rig::seconds_of(&view)? })
    };
    let run = rig.watch_over(rendering).await?;
    rig.stop().await?;
    Ok(run)
}

impl Loads {
    /// The figures for people.
    pub fn table(&self) -> Table {
        let title = "Loads: two checkpoints, their jobs in turns";
        let mut table = Table::new(title, ["workers", "jobs", "loads", "loads/1,000 jobs", "jobs/s"]);
        for run in &self.runs {
            table.row([
                run.workers.to_string(),
                run.jobs.to_string(),
                run.loads.to_string(),
                format!("{:.1}", run.per_thousand()),
                format!("{:.3}", run.jobs as f64 / run.seconds),
            ]);
        }
        table.note("Two loads are the least with one worker; in the order of submission it would be one a job.");
        table
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loads_are_given_for_a_thousand_jobs() {
        let run = Run { workers: 1, jobs: 400, loads: 3, seconds: 100.0 };
        assert_eq!(run.per_thousand(), 7.5);
        let text = Loads { runs: vec![run] }.table().to_string();
        assert!(text.contains("7.5") && text.contains("4.000"), "{text}");
    }
}
