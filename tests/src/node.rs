//! What a test sees of the node: processes, memory, leftovers.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::{Duration, Instant};

/// A process's proportional set size in KiB; 0 when it is gone.
pub fn pss_kib(pid: u32) -> u64 {
    let rollup = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap_or_default();
    let line = rollup.lines().find(|l| l.starts_with("Pss:"));
    line.and_then(|l| l.split_whitespace().nth(1)).and_then(|n| n.parse().ok()).unwrap_or(0)
}

/// A process's command line, its arguments joined by spaces.
pub fn command_line(pid: u32) -> String {
    let raw = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    String::from_utf8_lossy(&raw).replace('\0', " ").trim_end().to_string()
}

/// The pids of a process's children, of all its threads.
pub fn children(pid: u32) -> Vec<u32> {
    let Ok(tasks) = std::fs::read_dir(format!("/proc/{pid}/task")) else { return Vec::new() };
    tasks
        .flatten()
        .filter_map(|t| std::fs::read_to_string(t.path().join("children")).ok())
        .flat_map(|text| text.split_whitespace().filter_map(|n| n.parse().ok()).collect::<Vec<u32>>())
        .collect()
}

/// Waits for a condition of the node that nothing can tell us of.
pub fn wait_for(what: &str, within: Duration, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + within;
    while !holds() {
        assert!(Instant::now() < deadline, "waited {within:?} in vain: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Everything of the node that a runtime can leave behind, below or by the name of
/// one directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Leftovers {
    /// Mount points.
    pub mounts: BTreeSet<String>,
    /// Names in /run/netns.
    pub netns: BTreeSet<String>,
    /// Processes whose command line names the directory.
    pub processes: BTreeSet<String>,
    /// Cgroups named like the test's.
    pub cgroups: BTreeSet<String>,
}

impl Leftovers {
    /// Looks for what belongs to `dir` and to cgroups below `/cgroup`.
    pub fn of(dir: &Path, cgroup: &str) -> Self {
        let dir = dir.to_string_lossy().into_owned();
        let mountinfo = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let mounts = mountinfo
            .lines()
            .filter_map(|l| l.split_whitespace().nth(4))
            .filter(|m| m.starts_with(&dir))
            .map(str::to_string)
            .collect();
        let names = |d: &str| -> BTreeSet<String> {
            std::fs::read_dir(d)
                .map(|e| e.flatten().map(|f| f.file_name().to_string_lossy().into_owned()).collect())
                .unwrap_or_default()
        };
        let own = std::process::id();
        let processes = names("/proc")
            .into_iter()
            .filter_map(|n| n.parse::<u32>().ok())
            .filter(|pid| *pid != own)
            .map(|pid| (pid, command_line(pid)))
            .filter(|(_, line)| line.contains(&dir))
            .map(|(pid, line)| format!("{pid} {line}"))
            .collect();
        let cgroups = std::iter::once("/sys/fs/cgroup".to_string())
            .chain(names("/sys/fs/cgroup").into_iter().map(|c| format!("/sys/fs/cgroup/{c}")))
            .map(|root| format!("{root}/{cgroup}"))
            .filter(|c| Path::new(c).exists())
            .collect();
        Self { mounts, netns: names("/run/netns"), processes, cgroups }
    }
}
