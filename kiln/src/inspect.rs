//! `kiln models inspect`: what a checkpoint's file or folder is.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};
use engine::{InspectedFile, Inspection, inspect};
use farm::config::{Config, WorkerConfig};
use serde::Serialize;
use sha2::{Digest, Sha256};
use tokio_util::sync::CancellationToken;
use worker::resolve::resolve;

use crate::cli::InspectArgs;
use crate::{progress, stdout};

/// Bytes hashed at a time.
const BLOCK: usize = 1 << 20;

/// Hexadecimal digits of a file's SHA-256 that CivitAI calls AutoV2.
const AUTOV2: usize = 10;

/// What is printed.
#[derive(Debug, Serialize)]
struct Report {
    path: PathBuf,
    /// Bytes of all files with tensors.
    bytes: u64,
    tensors: usize,
    files: Vec<File>,
    #[serde(flatten)]
    inspection: Inspection,
}

/// A file's hashes.
#[derive(Debug, Serialize)]
struct File {
    path: PathBuf,
    bytes: u64,
    sha256: String,
    autov2: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    tensors: Option<Vec<engine::InspectedTensor>>,
}

/// Tells what it is.
pub async fn run(config: &Config, args: InspectArgs) -> Result<ExitCode> {
    // A hub id is looked for in the cache; nothing is downloaded for a look.
    let at_hand = WorkerConfig { offline: true, ..config.worker.clone() };
    let path = resolve(&args.path, &at_hand, &CancellationToken::new()).await?;
    let report = tokio::task::spawn_blocking(move || report(path)).await.context("inspecting")??;
    if args.json {
        stdout::line(serde_json::to_string(&shown(report, args.tensors))?)?;
    } else {
        stdout::text(text(&shown(report, args.tensors)))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// The report with each file's tensors, or without.
fn shown(mut report: Report, tensors: bool) -> Report {
    if !tensors {
        report.files.iter_mut().for_each(|file| file.tensors = None);
    }
    report
}

fn report(path: PathBuf) -> Result<Report> {
    let mut inspection = inspect(&path)?;
    let found = std::mem::take(&mut inspection.files);
    let bytes = found.iter().map(|file| file.bytes).sum();
    let tensors = found.iter().map(|file| file.tensors.len()).sum();
    let bar = progress::bytes(bytes).with_message("hashing");
    let files = found.into_iter().map(|InspectedFile { path, bytes, tensors }| {
        let sha256 = sha256(&path, |read| bar.inc(read as u64))
            .with_context(|| format!("`{}` cannot be read", path.display()))?;
        Ok(File { path, bytes, autov2: sha256[..AUTOV2].to_owned(), sha256, tensors: Some(tensors) })
    });
    let files = files.collect::<Result<_>>()?;
    bar.finish_and_clear();
    Ok(Report { path, bytes, tensors, files, inspection })
}

fn sha256(path: &Path, mut on_read: impl FnMut(usize)) -> std::io::Result<String> {
    let (mut file, mut hasher, mut block) = (std::fs::File::open(path)?, Sha256::new(), vec![0; BLOCK]);
    loop {
        match file.read(&mut block)? {
            0 => break,
            read => {
                hasher.update(&block[..read]);
                on_read(read);
            }
        }
    }
    Ok(hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}

fn text(report: &Report) -> String {
    let Report { path, bytes, tensors, files, inspection } = report;
    let family = inspection.family.and_then(|word| word.parse::<engine::FamilyKind>().ok());
    let family = family.map_or_else(
        || "none that is known".to_owned(),
        |family| format!("{family} ({}; {})", family.facts().name, family.facts().licence),
    );
    let mut text = format!("{}\nlayout   {}\nfamily   {family}\n", path.display(), inspection.layout);
    text.push_str(&format!(
        "size     {bytes} bytes ({:.2} GiB)\ntensors  {tensors}\n",
        *bytes as f64 / f64::from(1 << 30)
    ));
    for File { path, bytes, sha256, autov2, .. } in files {
        text.push_str(&format!("\nfile     {}\nsize     {bytes} bytes\n", path.display()));
        text.push_str(&format!("sha256   {sha256}\nautov2   {autov2}\n"));
    }
    text.push_str(&format!("\n{:<16}  {:>7}  {:>14}  formats\n", "part", "tensors", "bytes"));
    for part in &inspection.parts {
        let formats = part.formats.iter().map(|(word, count)| format!("{word} {count}")).collect::<Vec<_>>().join(", ");
        let formats = part.problem.as_ref().unwrap_or(&formats);
        text.push_str(&format!("{:<16}  {:>7}  {:>14}  {formats}\n", part.name, part.tensors, part.bytes));
    }
    for tensor in files.iter().flat_map(|file| file.tensors.iter().flatten()) {
        text.push_str(&format!("{}  {:?}  {}\n", tensor.name, tensor.shape, tensor.format));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hash_is_that_of_the_whole_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x");
        std::fs::write(&path, vec![7u8; BLOCK + 3]).unwrap();
        let mut read = 0;
        let expected: String = Sha256::digest(vec![7u8; BLOCK + 3]).iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(sha256(&path, |more| read += more).unwrap(), expected);
        assert_eq!(read, BLOCK + 3);
    }

    #[test]
    fn the_demo_checkpoint_is_told_with_and_without_its_tensors() {
        let folder = tempfile::tempdir().unwrap();
        let path = demo::unpack(folder.path()).unwrap();
        let report = report(path).unwrap();
        assert_eq!((report.inspection.family, report.files.len()), (Some("sd1"), 3));
        let brief = text(&shown(report, false));
        assert!(brief.contains("family   sd1 (Stable Diffusion 1.x; CreativeML OpenRAIL-M)"), "{brief}");
        assert!(brief.contains("autov2") && !brief.contains("conv_in.weight"), "{brief}");
        let report = super::report(demo::unpack(folder.path()).unwrap()).unwrap();
        let long = text(&shown(report, true));
        assert!(long.contains("conv_in.weight  [") && long.len() > brief.len(), "{long}");
    }
}
