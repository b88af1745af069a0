//! How much memory the machine has to give.

/// Bytes that this process could take without anything being swapped out or killed; `None` where the system does
/// not say.
pub(super) fn free() -> Option<usize> {
    let read = |path: &str| std::fs::read_to_string(path).ok();
    let machine = available(&read("/proc/meminfo")?)?;
    // What a container may still take; absent without one, and `max` without a limit.
    let group = |name: &str| read(&format!("/sys/fs/cgroup/memory.{name}"))?.trim().parse::<usize>().ok();
    let container = group("max").zip(group("current")).map(|(most, used)| most.saturating_sub(used));
    Some(container.map_or(machine, |container| container.min(machine)))
}

/// `MemAvailable` of Linux' `meminfo`, in bytes.
fn available(meminfo: &str) -> Option<usize> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<usize>().ok()?.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_linux_says_is_read() {
        assert_eq!(available("MemTotal:  24 kB\nMemAvailable:   16 kB\nCached: 1 kB\n"), Some(16 << 10));
        assert_eq!(available("MemTotal: 24 kB\n"), None);
        assert_eq!(available("MemAvailable: much\n"), None);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn this_machine_has_some() {
        assert!(free().unwrap() > 1 << 20);
    }
}
