//! Where a bench's figures come from.

use std::fmt;

use chrono::{DateTime, Utc};
use serde::Serialize;

use super::machine::Machine;

/// What measured, when and where.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Origin {
    /// This build's version.
    pub kiln: &'static str,
    /// Whether the build is optimised.
    pub release: bool,
    /// When it began.
    pub started_at: DateTime<Utc>,
    /// What it ran on.
    pub machine: Machine,
}

impl Origin {
    /// Of this build's figures.
    pub fn new(machine: Machine, started_at: DateTime<Utc>) -> Self {
        Self { kiln: env!("CARGO_PKG_VERSION"), release: !cfg!(debug_assertions), started_at, machine }
    }
}

impl fmt::Display for Origin {
    /// Two lines.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { kiln, release, started_at, machine } = self;
        let Machine { cpu, vectors, cores, memory_mib, system, load_average } = machine;
        let memory = memory_mib.map_or_else(String::new, |mib| format!(", {:.1} GiB", mib / 1024.0));
        let load = load_average.map_or_else(String::new, |[one, five, fifteen]| {
            format!("; load average {one:.2} {five:.2} {fifteen:.2} at the start")
        });
        writeln!(
            f,
            "kiln {kiln} ({} build), {}\n{}, {cores} cores, {}{memory}, {system}{load}",
            if *release { "release" } else { "debug" },
            started_at.format("%Y-%m-%d %H:%M UTC"),
            cpu.as_deref().unwrap_or("unknown processor"),
            vectors.join(" "),
        )
    }
}
