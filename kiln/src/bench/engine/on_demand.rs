//! Timed runs whenever a script says so.

use std::io::{BufRead, Write};
use std::sync::Arc;

use ::engine::{Checkpoint, Device, Precision, bench};
use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use super::args::EngineArgs;
use super::subject::{Pictures, Subject};
use super::timing::seconds;

/// Loads, says so, and runs until standard input ends.
pub fn serve(args: &EngineArgs, device: &Device, precision: Precision) -> Result<()> {
    let folder = args.model.as_deref().context("--on-demand needs --model")?;
    let mut loaded = None;
    let load_seconds = seconds(|| {
        loaded = Some(Arc::new(Checkpoint::load(folder, device, precision)?));
        Ok(())
    })?;
    let checkpoint = loaded.context("nothing was loaded")?;
    let pictures = Pictures::new(&checkpoint, args.size, args.batch, args.steps);
    let mut subject = Subject::new(&checkpoint, args.part, pictures)?;
    let ready = json!({
        "ready": true,
        "kiln": env!("CARGO_PKG_VERSION"),
        "device": device.describe(),
        "instructions": bench::instructions(),
        "dtype": precision.as_str(),
        "size": pictures.size,
        "batch": pictures.batch,
        "load_seconds": load_seconds,
    });
    converse(ready, std::io::stdin().lock(), std::io::stdout().lock(), || subject.run(args.out.as_deref()))
}

/// Says `ready`, and the seconds of a run for each line of input.
fn converse(
    ready: Value,
    input: impl BufRead,
    mut output: impl Write,
    mut run: impl FnMut() -> Result<f64>,
) -> Result<()> {
    let mut say =
        |value: Value| writeln!(output, "{value}").and_then(|()| output.flush()).context("standard output is closed");
    say(ready)?;
    for line in input.lines() {
        match line.context("standard input cannot be read")?.trim() {
            "run" => say(json!({ "seconds": run()? }))?,
            other => bail!("a line on standard input must be `run`, but is `{other}`"),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_line_is_a_run() {
        let (mut output, mut runs) = (Vec::new(), 0);
        let ready = json!({"ready": true});
        converse(ready, "run\nrun\n".as_bytes(), &mut output, || {
            runs += 1;
            Ok(f64::from(runs))
        })
        .unwrap();
        assert_eq!(String::from_utf8(output).unwrap(), "{\"ready\":true}\n{\"seconds\":1.0}\n{\"seconds\":2.0}\n");
    }

    #[test]
    fn another_word_is_refused_by_name() {
        let error = converse(json!({}), "runs\n".as_bytes(), Vec::new(), || Ok(1.0)).unwrap_err().to_string();
        assert_eq!(error, "a line on standard input must be `run`, but is `runs`");
    }
}
