//! `kiln up`: a farm in one process, kept in the data folder.

use std::fs::{File, TryLockError};
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use farm::config::Config;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::catalog;
use crate::cli::UpArgs;
use crate::embedded::Farm;
use crate::ports::Ports;
use crate::scheduler::bind;

/// Runs until `stop`.
pub async fn run(mut config: Config, args: UpArgs, stop: CancellationToken) -> Result<ExitCode> {
    config.data_dir = args.data_dir.or(config.data_dir);
    config.worker.device = args.device.or(config.worker.device);
    config.worker.dtype = args.dtype.or(config.worker.dtype);
    config.api.listen = args.listen.unwrap_or(config.api.listen);
    config.check().context("the command line is not right")?;
    let data_dir = catalog::data_dir(&config)?;
    let _lock = lock(&data_dir)?;
    let listener: TcpListener = bind(config.api.listen).await?;
    let catalog = Arc::new(catalog::build(&config).await?);
    let ports = Ports::open(&config).await?;
    let mut farm = Farm::start(&config, &ports, &catalog, listener)?;
    eprintln!("kiln: the farm is up, its API at http://{}, its data in {}", farm.address, data_dir.display());
    eprintln!("kiln: in another terminal: kiln submit FILE.jsonl --wait; Ctrl-C ends the farm, nothing is lost");
    tokio::select! {
        () = stop.cancelled() => {}
        error = farm.broken() => return Err(error),
    }
    eprintln!("kiln: finishing what is being rendered; Ctrl-C again ends at once");
    farm.stop().await?;
    Ok(ExitCode::SUCCESS)
}

/// Takes the data folder for this process. The lock goes with the process, however it ends.
fn lock(data_dir: &Path) -> Result<File> {
    std::fs::create_dir_all(data_dir).with_context(|| {
        format!("the data folder {} cannot be made; name another with --data-dir", data_dir.display())
    })?;
    let path = data_dir.join("up.lock");
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .with_context(|| format!("{} cannot be written; name another folder with --data-dir", path.display()))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => bail!(
            "another `kiln up` runs on the data folder {}; use that one, or name another folder with --data-dir",
            data_dir.display()
        ),
        Err(TryLockError::Error(error)) => Err(error).with_context(|| format!("{} cannot be locked", path.display())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_data_folder_belongs_to_one_process_at_a_time() {
        let folder = tempfile::tempdir().unwrap();
        let data_dir = folder.path().join("new");
        let first = lock(&data_dir).unwrap();
        let error = lock(&data_dir).unwrap_err().to_string();
        assert!(error.contains("another `kiln up`") && error.contains("--data-dir"), "{error}");
        drop(first);
        assert!(lock(&data_dir).is_ok());
    }
}
