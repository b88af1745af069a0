//! How a report reaches people and programs.

use std::fmt::Display;
use std::io::Write;
use std::path::Path;

use anyhow::{Context, Result};
use serde::Serialize;

use crate::output::write_whole;

/// The report's tables on standard output; with every sample as JSON to a file, or, for `-`, to standard
/// output in their place.
pub fn show(report: &(impl Display + Serialize), json: Option<&Path>) -> Result<()> {
    let whole = || serde_json::to_string(report).context("the report cannot be written as JSON");
    match json {
        Some(path) if path == Path::new("-") => {
            eprint!("{report}");
            println!("{}", whole()?);
        }
        Some(path) => {
            print!("{report}");
            write_whole(path, format!("{}\n", whole()?).as_bytes())?;
        }
        None => print!("{report}"),
    }
    std::io::stdout().flush().context("standard output is closed")
}
