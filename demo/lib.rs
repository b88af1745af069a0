//! The demo checkpoint, carried inside the binary: a small Stable Diffusion 1.x in diffusers layout
//! that renders coloured shapes (its model card is this folder's README), so that a fresh machine
//! renders real pictures with nothing to download.
//!
//! Invariant: nothing here knows what the files mean.

use std::io::{self, Write};
use std::path::{Path, PathBuf};

macro_rules! files {
    ($($path:literal),* $(,)?) => { &[$(($path, include_bytes!(concat!("model/", $path)))),*] };
}

/// Every file of the checkpoint: its path inside the folder (with `/`) and its bytes.
pub const FILES: &[(&str, &[u8])] = files![
    "model_index.json",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "tokenizer/merges.txt",
    "tokenizer/tokenizer.json",
    "tokenizer/tokenizer_config.json",
    "tokenizer/vocab.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
];

/// The folder's name holds a fingerprint of [`FILES`] (a test keeps it true), so that a binary with
/// another checkpoint unpacks its own and two versions live side by side.
pub const FOLDER: &str = "demo-3c9746bc282c5774";

/// Unpacks the checkpoint to [`FOLDER`] in `data_dir` unless it lies there already, and returns that
/// folder. The folder appears whole or not at all, and any number of processes may do this at
/// once. A folder with missing or cut files is replaced.
pub fn unpack(data_dir: &Path) -> io::Result<PathBuf> {
    let folder = data_dir.join(FOLDER);
    if is_whole(&folder) {
        return Ok(folder);
    }
    std::fs::create_dir_all(data_dir)?;
    let fresh = data_dir.join(format!(".{FOLDER}.{}.{:?}", std::process::id(), std::thread::current().id()));
    let done = write_files(&fresh).and_then(|()| put_in_place(&fresh, &folder));
    let _gone_already = std::fs::remove_dir_all(&fresh);
    done?;
    Ok(folder)
}

fn is_whole(folder: &Path) -> bool {
    FILES.iter().all(|(path, bytes)| {
        std::fs::metadata(folder.join(path)).is_ok_and(|found| found.is_file() && found.len() == bytes.len() as u64)
    })
}

fn write_files(folder: &Path) -> io::Result<()> {
    for (path, bytes) in FILES {
        let path = folder.join(path);
        std::fs::create_dir_all(path.parent().expect("every file lies in the folder"))?;
        let mut file = std::fs::File::create(path)?;
        file.write_all(bytes)?;
        file.sync_all()?;
    }
    Ok(())
}

/// Renames `fresh` to `folder`. A damaged folder that is in the way is moved aside first; if another
/// process was quicker, its work is as good as ours.
fn put_in_place(fresh: &Path, folder: &Path) -> io::Result<()> {
    let aside = fresh.with_extension("damaged");
    loop {
        match std::fs::rename(fresh, folder) {
            Ok(()) => return Ok(()),
            Err(_) if is_whole(folder) => return Ok(()),
            Err(error) if !folder.exists() => return Err(error),
            Err(_) => match std::fs::rename(folder, &aside) {
                Ok(()) => std::fs::remove_dir_all(&aside)?,
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// FNV-1a over paths and bytes, 64 bits.
    fn fingerprint() -> u64 {
        let all = FILES.iter().flat_map(|(path, bytes)| path.bytes().chain([0]).chain(bytes.iter().copied()));
        all.fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
    }

    #[test]
    fn the_folder_is_named_after_its_content() {
        assert_eq!(FOLDER, format!("demo-{:016x}", fingerprint()), "put the right name into FOLDER");
    }

    #[test]
    fn every_file_of_the_model_folder_is_carried() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("model");
        let mut found = Vec::new();
        let mut folders = vec![root.clone()];
        while let Some(folder) = folders.pop() {
            for entry in std::fs::read_dir(folder).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    folders.push(path);
                } else {
                    found.push(path.strip_prefix(&root).unwrap().to_str().unwrap().to_owned());
                }
            }
        }
        found.sort();
        let carried: Vec<_> = FILES.iter().map(|(path, _)| (*path).to_owned()).collect();
        assert_eq!(found, carried);
    }

    #[test]
    fn unpacking_writes_every_byte_and_leaves_nothing_else() {
        let data_dir = tempfile::tempdir().unwrap();
        let folder = unpack(&data_dir.path().join("not/yet/there")).unwrap();
        for (path, bytes) in FILES {
            assert_eq!(&std::fs::read(folder.join(path)).unwrap(), bytes, "{path}");
        }
        assert_eq!(std::fs::read_dir(folder.parent().unwrap()).unwrap().count(), 1);
    }

    #[test]
    fn what_is_there_already_is_left_alone() {
        let data_dir = tempfile::tempdir().unwrap();
        let file = unpack(data_dir.path()).unwrap().join("unet/config.json");
        let written = std::fs::metadata(&file).unwrap().modified().unwrap();
        unpack(data_dir.path()).unwrap();
        assert_eq!(std::fs::metadata(&file).unwrap().modified().unwrap(), written);
    }

    #[test]
    fn a_folder_with_a_missing_or_a_cut_file_is_replaced() {
        let data_dir = tempfile::tempdir().unwrap();
        let folder = unpack(data_dir.path()).unwrap();
        std::fs::remove_file(folder.join("model_index.json")).unwrap();
        std::fs::write(folder.join("vae/diffusion_pytorch_model.safetensors"), b"cut").unwrap();
        assert_eq!(unpack(data_dir.path()).unwrap(), folder);
        assert!(is_whole(&folder));
        assert_eq!(std::fs::read_dir(data_dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn many_may_unpack_at_once() {
        let data_dir = tempfile::tempdir().unwrap();
        std::thread::scope(|scope| {
            let all: Vec<_> = (0..4).map(|_| scope.spawn(|| unpack(data_dir.path()).unwrap())).collect();
            for one in all {
                assert!(is_whole(&one.join().unwrap()));
            }
        });
        assert_eq!(std::fs::read_dir(data_dir.path()).unwrap().count(), 1);
    }
}
