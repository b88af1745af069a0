//! Loading a checkpoint, against nothing but reading its files.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use ::engine::{Checkpoint, Device, Precision, bench};
use anyhow::{Context, Result, ensure};
use memmap2::MmapMut;
use serde::Serialize;

use super::super::stats::Spread;
use super::super::table::Table;
use super::args::EngineArgs;
use super::timing::{Timed, in_turns, seconds};

/// Read at once by a thread, into the same memory each time.
const PIECE: usize = 4 << 20;
/// Empties the system's file cache, given a `1`; Linux, root only.
const DROP_CACHES: &str = "/proc/sys/vm/drop_caches";

/// What was measured.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Loading {
    /// Bytes of all weights' files, those of the VAE's encoder included, which is left on disk.
    pub bytes: u64,
    /// Threads of the engine.
    pub threads: usize,
    /// From the system's file cache, and with `--cold` from the disk.
    pub ways: Vec<Way>,
}

/// From one place.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Way {
    /// For people.
    pub from: &'static str,
    /// Until the checkpoint was ready.
    pub load: Timed,
    /// Reading all files on one thread.
    pub read_one: Timed,
    /// Reading all files on as many threads as the engine has.
    pub read_all: Timed,
    /// The same, each byte into memory of its own that the system has to find first: what any loader that
    /// keeps the weights needs at least.
    pub kept: Timed,
    /// The rate of loading to that of the faster of the two ways of reading, round by round.
    pub loaded_to_read: Spread,
    /// The same to reading and keeping.
    pub loaded_to_kept: Spread,
}

impl Way {
    fn of(from: &'static str, load: Timed, read_one: Timed, read_all: Timed, kept: Timed) -> Option<Self> {
        let faster: Vec<f64> = read_one.samples.iter().zip(&read_all.samples).map(|(one, all)| one.min(*all)).collect();
        let share = |of: &[f64]| {
            Spread::of(&of.iter().zip(&load.samples).map(|(other, load)| other / load).collect::<Vec<_>>())
        };
        let (loaded_to_read, loaded_to_kept) = (share(&faster)?, share(&kept.samples)?);
        Some(Self { from, load, read_one, read_all, kept, loaded_to_read, loaded_to_kept })
    }
}

/// Loads and reads the checkpoint in `folder` again and again.
pub fn measure(folder: &Path, device: &Device, precision: Precision, args: &EngineArgs) -> Result<Loading> {
    eprintln!("kiln: loading");
    let files = weight_files(folder)?;
    let pieces = Pieces::of(&files)?;
    let threads = bench::threads();
    let way = |from, before: fn() -> Result<()>| {
        let read = |threads, keep| {
            before()?;
            seconds(|| pieces.read(threads, keep))
        };
        let mut load = || {
            before()?;
            seconds(|| Ok(Checkpoint::load(folder, device, precision)?))
        };
        let works: [&mut dyn FnMut() -> Result<f64>; 4] =
            [&mut load, &mut || read(1, false), &mut || read(threads, false), &mut || read(threads, true)];
        let [load, read_one, read_all, kept] = in_turns(args.runs, works)?;
        Way::of(from, load, read_one, read_all, kept).context("nothing was timed")
    };
    let mut ways = vec![way("file cache", || Ok(()))?];
    if args.cold {
        ways.push(way("disk", empty_file_cache)?);
    }
    Ok(Loading { bytes: pieces.bytes, threads, ways })
}

fn empty_file_cache() -> Result<()> {
    let write = || File::options().write(true).open(DROP_CACHES)?.write_all(b"1");
    write().with_context(|| format!("--cold needs root and Linux: `{DROP_CACHES}` cannot be written"))
}

/// The weights' files of a diffusers folder.
fn weight_files(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = |folder: &Path| {
        let entries =
            folder.read_dir().with_context(|| format!("--model must be a folder, but is `{}`", folder.display()))?;
        entries.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()
    };
    let mut files = Vec::new();
    for part in entries(folder)?.into_iter().filter(|path| path.is_dir()) {
        files.extend(
            entries(&part)?.into_iter().filter(|file| file.extension().is_some_and(|end| end == "safetensors")),
        );
    }
    ensure!(
        !files.is_empty(),
        "--model must hold `.safetensors` files in its parts' folders, but `{}` has none",
        folder.display()
    );
    Ok(files)
}

/// Where to read.
struct Pieces {
    files: Vec<File>,
    /// File, start, length.
    pieces: Vec<(usize, u64, usize)>,
    bytes: u64,
}

impl Pieces {
    fn of(paths: &[PathBuf]) -> Result<Self> {
        let (mut files, mut pieces, mut bytes) = (Vec::new(), Vec::new(), 0);
        for path in paths {
            let cannot = || format!("`{}` cannot be read", path.display());
            let file = File::open(path).with_context(cannot)?;
            let length = file.metadata().with_context(cannot)?.len();
            let starts = (0..length).step_by(PIECE);
            pieces.extend(starts.map(|start| (files.len(), start, PIECE.min((length - start) as usize))));
            files.push(file);
            bytes += length;
        }
        Ok(Self { files, pieces, bytes })
    }

    /// Reads everything once on so many threads, into the same memory or into fresh memory that is kept.
    fn read(&self, threads: usize, keep: bool) -> Result<()> {
        let next = AtomicUsize::new(0);
        let work = || {
            let mut rooms = vec![room()?];
            while let Some((file, start, length)) = self.pieces.get(next.fetch_add(1, Ordering::Relaxed)) {
                if keep {
                    rooms.push(room()?);
                }
                let last = rooms.len() - 1;
                self.files[*file].read_exact_at(&mut rooms[last][..*length], *start)?;
            }
            Ok::<_, std::io::Error>(())
        };
        std::thread::scope(|scope| {
            let running: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
            running.into_iter().try_for_each(|thread| thread.join().unwrap_or(Ok(())))
        })
        .context("a weights' file cannot be read")
    }
}

/// Memory for a piece, in huge pages where the system has them, as the engine's.
fn room() -> std::io::Result<MmapMut> {
    let room = MmapMut::map_anon(PIECE)?;
    #[cfg(target_os = "linux")]
    // A wish, as the engine's own.
    let _ = room.advise(memmap2::Advice::HugePage);
    Ok(room)
}

impl Loading {
    /// For people.
    pub fn table(&self) -> Table {
        let mut table = Table::new(
            format!("Loading: {:.2} GB of weights", self.bytes as f64 / 1e9),
            [
                "from",
                "loaded, s",
                "GB/s",
                "read on 1 thread, GB/s",
                "read on all, GB/s",
                "read and kept, GB/s",
                "loaded ÷ read (the faster)",
                "loaded ÷ kept",
            ],
        );
        for way in &self.ways {
            let rate = |timed: &Timed| format!("{:.2}", self.bytes as f64 / timed.seconds.median / 1e9);
            table.row([
                way.from.to_owned(),
                format!("{:.2}", way.load.seconds.median),
                rate(&way.load),
                rate(&way.read_one),
                rate(&way.read_all),
                rate(&way.kept),
                way.loaded_to_read.shown(2),
                way.loaded_to_kept.shown(2),
            ]);
        }
        table.note("Read: into the same few MiB again and again, nothing done with them. Kept: on all threads, into");
        table.note("memory of its own that the system has to clear first, as any loader's. All take turns: medians");
        table.note("of the times and of the rounds' ratios.");
        table
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_of_the_same_round() {
        let timed = |samples: [f64; 3]| Timed::of(samples.to_vec()).unwrap();
        let (load, kept) = (timed([2.0, 4.0, 1.0]), timed([1.0, 4.0, 2.0]));
        let way = Way::of("disk", load, timed([1.0, 3.0, 1.0]), timed([3.0, 2.0, 2.0]), kept).unwrap();
        assert_eq!(way.loaded_to_read, Spread { median: 0.5, min: 0.5, max: 1.0 });
        assert_eq!(way.loaded_to_kept, Spread { median: 1.0, min: 0.5, max: 2.0 });
    }

    #[test]
    fn all_weights_of_a_folder_are_read() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join("unet")).unwrap();
        std::fs::write(folder.path().join("unet/a.safetensors"), vec![1; PIECE + 7]).unwrap();
        std::fs::write(folder.path().join("unet/config.json"), "{}").unwrap();
        let files = weight_files(folder.path()).unwrap();
        let pieces = Pieces::of(&files).unwrap();
        assert_eq!((files.len(), pieces.bytes, pieces.pieces.len()), (1, PIECE as u64 + 7, 2));
        for (threads, keep) in [(1, false), (3, false), (2, true)] {
            pieces.read(threads, keep).unwrap();
        }
    }

    #[test]
    fn a_folder_without_weights_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let error = weight_files(folder.path()).unwrap_err().to_string();
        assert!(error.starts_with("--model must hold") && error.contains(folder.path().to_str().unwrap()), "{error}");
        let missing = folder.path().join("missing");
        let error = weight_files(&missing).unwrap_err().to_string();
        assert_eq!(error, format!("--model must be a folder, but is `{}`", missing.display()));
    }
}
