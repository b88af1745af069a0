//! All that was measured, as tables for people and as JSON for machines.

use std::fmt;

use chrono::{DateTime, Utc};
use serde::Serialize;

use super::bulk::Bulk;
use super::delivered::Delivered;
use super::loads::Loads;
use super::machine::Machine;
use super::origin::Origin;
use super::poll::Polls;
use super::site::Footing;

/// A bench's outcome; what was not asked for is absent.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    /// What measured, when and where.
    #[serde(flatten)]
    pub origin: Origin,
    /// What the farm stood on.
    pub footing: Footing,
    /// Pictures against the bare engine.
    pub delivered: Option<Delivered>,
    /// Loads of weights.
    pub loads: Option<Loads>,
    /// Bulk submissions.
    pub bulk: Option<Bulk>,
    /// Status polls.
    pub polls: Option<Polls>,
}

impl Report {
    /// A report without measurements.
    pub fn new(machine: Machine, footing: Footing, started_at: DateTime<Utc>) -> Self {
        Self {
            origin: Origin::new(machine, started_at),
            footing,
            delivered: None,
            loads: None,
            bulk: None,
            polls: None,
        }
    }

    fn heading(&self) -> String {
        let Footing { store, broker, artifacts, file_system } = &self.footing;
        let folder = file_system.as_ref().map_or_else(String::new, |kind| format!(", files on {kind}"));
        let farm = format!("farm: store {store}, broker {broker}, artifacts {artifacts}{folder}\n");
        self.origin.to_string() + &farm
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.heading())?;
        let tables = [
            self.delivered.as_ref().map(|delivered| delivered.table(self.origin.machine.cores)),
            self.loads.as_ref().map(Loads::table),
            self.bulk.as_ref().map(Bulk::table),
            self.polls.as_ref().map(Polls::table),
        ];
        tables.iter().flatten().try_for_each(|table| write!(f, "\n{table}"))
    }
}

#[cfg(test)]
mod tests {
    use super::super::loads::Run;
    use super::*;

    fn report() -> Report {
        let machine = Machine {
            cpu: Some("Fast One".into()),
            vectors: vec!["avx2".into()],
            cores: 2,
            memory_mib: Some(2048.0),
            system: "Linux 6.1".into(),
            load_average: Some([0.5, 0.25, 0.0]),
        };
        let footing =
            Footing { store: "sqlite", broker: "memory", artifacts: "folder", file_system: Some("ext4".into()) };
        let run = Run { workers: 1, jobs: 1000, loads: 2, seconds: 100.0 };
        let mut report = Report::new(machine, footing, "2026-03-01T10:00:00Z".parse().unwrap());
        report.loads = Some(Loads { runs: vec![run] });
        report
    }

    #[test]
    fn the_heading_says_what_it_ran_on_and_only_what_was_measured_follows() {
        let text = report().to_string();
        for words in
            ["2026-03-01 10:00 UTC", "Fast One, 2 cores, avx2, 2.0 GiB, Linux 6.1", "load average 0.50", "ext4"]
        {
            assert!(text.contains(words), "{words}: {text}");
        }
        assert!(text.contains("Loads:") && !text.contains("Bulk submission"), "{text}");
    }

    #[test]
    fn the_json_holds_the_raw_figures() {
        let value: serde_json::Value = serde_json::to_value(report()).unwrap();
        assert_eq!(value["loads"]["runs"][0]["loads"], 2);
        assert_eq!(value["machine"]["cores"], 2);
        assert!(value["bulk"].is_null());
    }
}
