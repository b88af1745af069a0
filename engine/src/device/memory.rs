//! How much memory the machine and its devices have to give.

use super::Device;

impl Device {
    /// Bytes that are free on it now; `None` where it does not say.
    pub(crate) fn free_bytes(&self) -> Option<usize> {
        match &self.inner {
            candle_core::Device::Cpu => free(),
            #[cfg(feature = "cuda")]
            candle_core::Device::Cuda(device) => {
                let (free, _all) = device.cuda_stream().context().mem_get_info().ok()?;
                Some(free)
            }
            _ => None,
        }
    }
}

/// Bytes that this process could take without anything being swapped out or killed; `None` where the system does
/// not say.
pub(super) fn free() -> Option<usize> {
    let read = |path: &str| std::fs::read_to_string(path).ok();
    let machine = available(&read("/proc/meminfo")?)?;
    // What a container may still take; absent without one, and `max` without a limit.
    let group = |name: &str| read(&format!("/sys/fs/cgroup/memory.{name}"));
    let number = |name: &str| group(name)?.trim().parse::<usize>().ok();
    let files = group("stat").and_then(|stat| unused_files(&stat)).unwrap_or(0);
    let used = number("current").map(|used| used.saturating_sub(files));
    let container = number("max").zip(used).map(|(most, used)| most.saturating_sub(used));
    Some(container.map_or(machine, |container| container.min(machine)))
}

/// `MemAvailable` of Linux' `meminfo`, in bytes.
fn available(meminfo: &str) -> Option<usize> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<usize>().ok()?.checked_mul(1024)
}

/// Of what counts as a container's memory, the bytes of files that lie there until something else needs the room:
/// weights that were read, above all.
fn unused_files(stat: &str) -> Option<usize> {
    stat.lines().find_map(|line| line.strip_prefix("inactive_file "))?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_linux_says_is_read() {
        assert_eq!(available("MemTotal:  24 kB\nMemAvailable:   16 kB\nCached: 1 kB\n"), Some(16 << 10));
        assert_eq!(available("MemTotal: 24 kB\n"), None);
        assert_eq!(available("MemAvailable: much\n"), None);
        assert_eq!(unused_files("anon 5\ninactive_file 4096\nactive_file 7\n"), Some(4096));
        assert_eq!(unused_files("anon 5\n"), None);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn this_machine_has_some() {
        assert!(free().unwrap() > 1 << 20);
    }
}
