//! Ctrl-C and SIGTERM: the first asks for an orderly end, the second ends the process at once.

use std::process::ExitCode;

use anyhow::{Context, Result};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// Exit status of an interrupted command, as shells use it.
pub const INTERRUPTED: u8 = 130;

/// Exit status of an interrupted command.
pub fn interrupted() -> ExitCode {
    ExitCode::from(INTERRUPTED)
}

/// Listens for signals from now on; the token is cancelled by the first.
pub fn listen() -> Result<CancellationToken> {
    let mut interrupt = signal(SignalKind::interrupt()).context("signals cannot be listened for")?;
    let mut terminate = signal(SignalKind::terminate()).context("signals cannot be listened for")?;
    let token = CancellationToken::new();
    let asked = token.clone();
    tokio::spawn(async move {
        loop {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
            }
            if asked.is_cancelled() {
                std::process::exit(i32::from(INTERRUPTED));
            }
            asked.cancel();
        }
    });
    Ok(token)
}
