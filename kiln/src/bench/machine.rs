//! What a bench ran on, and what it used of it. Read from `/proc`; elsewhere than on Linux those figures are left
//! out.

use std::path::Path;
use std::time::Instant;

use serde::Serialize;

/// Ticks in which the kernel counts processor time for user space: a constant of Linux's interface, whatever rate
/// the kernel itself runs at.
const TICKS_PER_SECOND: f64 = 100.0;

/// The machine.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Machine {
    /// The processor's model, as it calls itself.
    pub cpu: Option<String>,
    /// Its widest vector instructions that matter here.
    pub vectors: Vec<String>,
    /// Processors that this process may use.
    pub cores: usize,
    /// Memory in MiB.
    pub memory_mib: Option<f64>,
    /// The operating system.
    pub system: String,
    /// Runnable processes over the last 1, 5 and 15 minutes, before the bench began.
    pub load_average: Option<[f64; 3]>,
}

impl Machine {
    /// Looks at this machine.
    pub fn look() -> Self {
        let cpuinfo = read("/proc/cpuinfo").unwrap_or_default();
        let flags = field(&cpuinfo, "flags").unwrap_or_default();
        let known = ["avx2", "avx512f", "avx512_bf16", "amx_bf16"];
        Self {
            cpu: field(&cpuinfo, "model name").map(str::to_owned),
            vectors: known
                .into_iter()
                .filter(|name| flags.split(' ').any(|flag| flag == *name))
                .map(str::to_owned)
                .collect(),
            cores: std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
            memory_mib: read("/proc/meminfo").and_then(|text| kib(&text, "MemTotal")).map(|kib| kib / 1024.0),
            system: read("/proc/sys/kernel/osrelease")
                .map_or_else(|| std::env::consts::OS.to_owned(), |release| format!("Linux {}", release.trim())),
            load_average: load_average(),
        }
    }
}

/// Runnable processes over the last 1, 5 and 15 minutes.
pub fn load_average() -> Option<[f64; 3]> {
    let text = read("/proc/loadavg")?;
    let mut numbers = text.split(' ').map_while(|word| word.parse().ok());
    Some([numbers.next()?, numbers.next()?, numbers.next()?])
}

/// Memory that this process holds, in MiB.
pub fn resident_mib() -> Option<f64> {
    kib(&read("/proc/self/status")?, "VmRSS").map(|kib| kib / 1024.0)
}

/// The most memory that this process has held, in MiB.
pub fn peak_resident_mib() -> Option<f64> {
    kib(&read("/proc/self/status")?, "VmHWM").map(|kib| kib / 1024.0)
}

/// The size of the largest cache, or one that no processor exceeds by much where the system does not say.
pub fn last_cache_bytes() -> usize {
    const LARGE: usize = 128 << 20;
    let sizes = (0..8).map_while(|index| read(&format!("/sys/devices/system/cpu/cpu0/cache/index{index}/size")));
    sizes.filter_map(|size| Some(size.trim().strip_suffix('K')?.parse::<usize>().ok()? << 10)).max().unwrap_or(LARGE)
}

/// The kind of file system that `folder` lies on (`ext4`, `tmpfs`): it decides what durable costs.
pub fn file_system(folder: &Path) -> Option<String> {
    let folder = folder.canonicalize().ok()?;
    let mounts = read("/proc/self/mounts")?;
    let mounts = mounts.lines().filter_map(|line| {
        let mut words = line.split(' ').skip(1);
        Some((words.next()?, words.next()?))
    });
    let holding = mounts.filter(|(point, _)| folder.starts_with(point));
    // Of two mounts on one point the later one is seen.
    holding.max_by_key(|(point, _)| point.len()).map(|(_, kind)| kind.to_owned())
}

/// Processor time used over a stretch of time, in seconds summed over all cores.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct CpuUse {
    /// By this process.
    pub own: f64,
    /// By everything on the machine, this process included.
    pub machine: f64,
}

/// Measures time and processor time from its making on.
pub struct Stopwatch {
    start: Instant,
    own: Option<f64>,
    machine: Option<f64>,
}

impl Stopwatch {
    /// Starts now.
    pub fn start() -> Self {
        Self { own: own_cpu_seconds(), machine: machine_cpu_seconds(), start: Instant::now() }
    }

    /// Seconds since the start.
    pub fn seconds(&self) -> f64 {
        self.start.elapsed().as_secs_f64()
    }

    /// Processor time since the start.
    pub fn cpu(&self) -> Option<CpuUse> {
        Some(CpuUse { own: own_cpu_seconds()? - self.own?, machine: machine_cpu_seconds()? - self.machine? })
    }
}

fn own_cpu_seconds() -> Option<f64> {
    own_ticks(&read("/proc/self/stat")?).map(|ticks| ticks / TICKS_PER_SECOND)
}

/// User and system time: the 14th and 15th field. The second, the program's name, may hold spaces.
fn own_ticks(stat: &str) -> Option<f64> {
    let (_, rest) = stat.rsplit_once(") ")?;
    let mut times = rest.split(' ').skip(11).map_while(|word| word.parse::<f64>().ok());
    Some(times.next()? + times.next()?)
}

fn machine_cpu_seconds() -> Option<f64> {
    machine_ticks(&read("/proc/stat")?).map(|ticks| ticks / TICKS_PER_SECOND)
}

/// All but idle time and waiting for disks (the 4th and 5th number). What a guest uses is part of the first two.
fn machine_ticks(stat: &str) -> Option<f64> {
    let line = stat.lines().next()?.strip_prefix("cpu ")?;
    let ticks: Vec<f64> = line.split_whitespace().map_while(|word| word.parse().ok()).take(8).collect();
    (ticks.len() > 4).then(|| ticks.iter().sum::<f64>() - ticks[3] - ticks[4])
}

fn read(path: &str) -> Option<String> {
    std::fs::read_to_string(path).ok()
}

/// The value of the first `NAME : VALUE` line.
fn field<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    text.lines()
        .filter_map(|line| line.split_once(':'))
        .find(|(key, _)| key.trim() == name)
        .map(|(_, value)| value.trim())
}

fn kib(text: &str, name: &str) -> Option<f64> {
    field(text, name)?.strip_suffix(" kB")?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_charged_for_user_and_system_time() {
        let stat = "42 (a (b) c) S 1 42 42 0 -1 4194560 100 0 0 0 250 50 0 0 20 0 3 0 100 0 0";
        assert_eq!(own_ticks(stat), Some(300.0));
    }

    #[test]
    fn a_machine_is_busy_when_it_neither_idles_nor_waits_for_disks() {
        let stat = "cpu  10 1 5 1000 200 2 3 4 0 0\ncpu0 5 0 2 500 100 1 1 2 0 0\n";
        assert_eq!(machine_ticks(stat), Some(25.0));
    }

    #[test]
    fn a_field_is_found_by_its_whole_name() {
        let text = "model\t\t: 2\nmodel name\t: Fast One\nMemTotal:       1024 kB\n";
        assert_eq!(field(text, "model name"), Some("Fast One"));
        assert_eq!(kib(text, "MemTotal"), Some(1024.0));
        assert_eq!(kib(text, "MemFree"), None);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn this_machine_can_be_described() {
        let machine = Machine::look();
        assert!(machine.cores > 0 && machine.memory_mib.unwrap() > 1.0 && machine.load_average.is_some());
        assert!(resident_mib().unwrap() > 0.0 && peak_resident_mib() >= resident_mib());
        assert!(last_cache_bytes() > 1 << 16);
        assert!(file_system(&std::env::temp_dir()).is_some());
        let watch = Stopwatch::start();
        let cpu = watch.cpu().unwrap();
        assert!(cpu.own >= 0.0 && cpu.machine >= 0.0 && watch.seconds() >= 0.0);
    }
}
