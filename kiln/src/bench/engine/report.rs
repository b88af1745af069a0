//! All that was measured of the engine, as tables for people and as JSON for machines.

use std::fmt;

use ::engine::bench;
use chrono::{DateTime, Utc};
use serde::Serialize;

use super::super::machine::Machine;
use super::super::origin::Origin;
use super::ceilings::Ceilings;
use super::loading::Loading;
use super::model::Model;
use super::ops::Ops;
use super::small::Small;
use super::whole::Whole;

/// The outcome; what was not asked for is absent.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    /// What measured, when and where.
    #[serde(flatten)]
    pub origin: Origin,
    /// The engine's device, for people.
    pub device: String,
    /// The instructions that its kernels use on a processor.
    pub instructions: &'static str,
    /// The number format computed in.
    pub dtype: &'static str,
    /// The machine's own limits.
    pub ceilings: Option<Ceilings>,
    /// Each operation.
    pub ops: Option<Ops>,
    /// The whole model.
    pub model: Option<Model>,
    /// Whole pictures.
    pub pictures: Option<Whole>,
    /// Small pictures.
    pub small: Option<Small>,
    /// Loading.
    pub loading: Option<Loading>,
    /// Runnable processes over the last 1, 5 and 15 minutes, at the end.
    pub load_average_after: Option<[f64; 3]>,
    /// The most memory that this process held, the bench's own buffers included.
    pub peak_resident_mib: Option<f64>,
}

impl Report {
    /// A report without measurements.
    pub fn new(machine: Machine, device: String, dtype: &'static str, started_at: DateTime<Utc>) -> Self {
        Self {
            origin: Origin::new(machine, started_at),
            device,
            instructions: bench::instructions(),
            dtype,
            ceilings: None,
            ops: None,
            model: None,
            pictures: None,
            small: None,
            loading: None,
            load_average_after: None,
            peak_resident_mib: None,
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.origin)?;
        writeln!(f, "engine: {}, {}, {}", self.device, self.instructions, self.dtype)?;
        let tables = [
            self.ceilings.as_ref().map(Ceilings::table),
            self.ops.as_ref().map(Ops::table),
            self.model.as_ref().map(Model::table),
            self.pictures.as_ref().map(Whole::table),
            self.small.as_ref().map(Small::table),
            self.loading.as_ref().map(Loading::table),
        ];
        tables.iter().flatten().try_for_each(|table| write!(f, "\n{table}"))?;
        if let Some([one, five, fifteen]) = self.load_average_after {
            writeln!(f, "\nload average {one:.2} {five:.2} {fifteen:.2} at the end, this bench included")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::ceilings::OneAndAll;
    use super::*;

    #[test]
    fn only_what_was_measured_is_shown_and_all_of_it_is_in_the_json() {
        let began = "2026-03-01T10:00:00Z".parse().unwrap();
        let mut report = Report::new(Machine::look(), "cpu (2 threads)".into(), "bf16", began);
        let rate = OneAndAll { one: 1e9, all: 2e9 };
        report.ceilings = Some(Ceilings { threads: 2, peaks: Vec::new(), read: rate, copy: rate });
        let text = report.to_string();
        assert!(
            text.contains("cpu (2 threads), ") && text.contains(", bf16\n") && text.contains("Ceilings:"),
            "{text}"
        );
        assert!(!text.contains("Loading:"), "{text}");
        let value: serde_json::Value = serde_json::to_value(&report).unwrap();
        assert_eq!(value["ceilings"]["read"]["all"], 2e9);
        assert!(value["loading"].is_null());
    }
}
