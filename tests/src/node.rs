//! What a test sees of the node: processes, memory, leftovers.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// A process's proportional set size in KiB; 0 when it is gone.
pub fn pss_kib(pid: u32) -> u64 {
    let rollup = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap_or_default();
    let line = rollup.lines().find(|l| l.starts_with("Pss:"));
    line.and_then(|l| l.split_whitespace().nth(1)).and_then(|n| n.parse().ok()).unwrap_or(0)
}

/// What a process has for itself of memory in KiB, not counting pages of files: how
/// much of those is its own changes with whoever else runs the same program.
pub fn own_memory_kib(pid: u32) -> u64 {
    let rollup = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap_or_default();
    let lines = rollup.lines().filter(|l| l.starts_with("Pss_Anon:") || l.starts_with("Pss_Shmem:"));
    lines.filter_map(|l| l.split_whitespace().nth(1)).filter_map(|n| n.parse::<u64>().ok()).sum()
}

/// All pids of this node.
pub fn processes() -> Vec<u32> {
    let names = std::fs::read_dir("/proc").unwrap().flatten();
    names.filter_map(|e| e.file_name().to_string_lossy().parse().ok()).collect()
}

/// How many descriptors a process has open; `None` when it is gone.
pub fn open_fds(pid: u32) -> Option<usize> {
    std::fs::read_dir(format!("/proc/{pid}/fd")).ok().map(Iterator::count)
}

/// What a namespace link of a process leads to, such as `net:[4026531840]`; empty
/// when the process is gone.
pub fn namespace(pid: u32, kind: &str) -> String {
    let link = std::fs::read_link(format!("/proc/{pid}/ns/{kind}")).unwrap_or_default();
    link.to_string_lossy().into_owned()
}

/// The processes in the pid namespace of `init`, as this node counts them, with
/// their command lines.
pub fn in_pid_namespace(init: u32) -> Vec<(u32, String)> {
    let wanted = namespace(init, "pid");
    assert!(!wanted.is_empty(), "process {init} is gone");
    let all = processes().into_iter().filter(|pid| namespace(*pid, "pid") == wanted);
    all.map(|pid| (pid, command_line(pid))).collect()
}

/// Where a pod's network namespace is pinned.
pub fn netns(pod: &str) -> PathBuf {
    Path::new("/run/netns").join(format!("longshore-{:.16}", pod))
}

/// The directories of a cgroup directly below the root of each hierarchy.
pub fn cgroups(name: &str) -> Vec<PathBuf> {
    let Ok(hierarchies) = std::fs::read_dir("/sys/fs/cgroup") else { return Vec::new() };
    let all = hierarchies.flatten().map(|h| h.path().join(name));
    all.chain([Path::new("/sys/fs/cgroup").join(name)]).filter(|d| d.is_dir()).collect()
}

/// A process's command line, its arguments joined by spaces.
pub fn command_line(pid: u32) -> String {
    let raw = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    String::from_utf8_lossy(&raw).replace('\0', " ").trim_end().to_string()
}

/// The pid of a process's parent, where there is such a process.
pub fn parent(pid: u32) -> Option<u32> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(") ")?.1.split(' ').nth(1)?.parse().ok()
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

/// Everything that one daemon and its pods hold of the node.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Footprint {
    /// Mount points below its directory.
    pub mounts: BTreeSet<String>,
    /// Pinned network namespaces of its pods.
    pub netns: BTreeSet<String>,
    /// Processes in its cgroup, or that name its directory; zombies don't count.
    pub processes: BTreeSet<String>,
    /// Containers' cgroups.
    pub cgroups: BTreeSet<String>,
    /// Bundles, namespaces, snapshots, and whatever else has a name per pod or
    /// container on disk.
    pub files: BTreeSet<String>,
}

impl Footprint {
    /// Looks for what belongs to the daemon with pid `daemon` in `dir`, to `pods`, and
    /// to the cgroup `cgroup`.
    pub fn of(dir: &Path, cgroup: &str, pods: &BTreeSet<String>, daemon: Option<u32>) -> Self {
        let at = dir.to_string_lossy().into_owned();
        let all = Leftovers::of(dir, cgroup);
        let netns = pods.iter().map(|id| netns(id)).filter(|p| p.symlink_metadata().is_ok());
        let own = format!("/{cgroup}/");
        let processes = processes().into_iter().filter(|pid| Some(*pid) != daemon && *pid != std::process::id());
        let processes = processes.filter(|pid| {
            let cgroups = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
            // A zombie has no command line, and PID 1 reaps it in its own time.
            let line = command_line(*pid);
            !line.is_empty() && (cgroups.contains(&own) || line.contains(&at))
        });
        let mut cgroups = BTreeSet::new();
        for root in crate::node::cgroups(cgroup) {
            let mut below = BTreeSet::new();
            names(&root, 2, &mut below);
            // A pod's own cgroup is its kubelet's to remove.
            below.retain(|c| Path::new(c).parent() != Some(&root));
            cgroups.extend(below);
        }
        let mut files = BTreeSet::new();
        for (sub, depth) in [
            ("state/bundles", 2),
            ("state/conmon/bundles", 2),
            ("state/conmon/exits", 1),
            ("state/ns", 2),
            ("state/pods", 1),
            ("state/stdin", 1),
            ("state/oci/k8s.io", 1),
            ("root/containers", 1),
            ("root/snapshots", 1),
        ] {
            names(&dir.join(sub), depth, &mut files);
        }
        Self {
            mounts: all.mounts,
            netns: netns.map(|p| p.to_string_lossy().into_owned()).collect(),
            processes: processes.map(|pid| format!("{pid} {}", command_line(pid))).collect(),
            cgroups,
            files,
        }
    }

    /// What it has beyond `before`.
    #[must_use]
    pub fn beyond(&self, before: &Self) -> Self {
        let more = |now: &BTreeSet<String>, then: &BTreeSet<String>| now - then;
        Self {
            mounts: more(&self.mounts, &before.mounts),
            netns: more(&self.netns, &before.netns),
            processes: more(&self.processes, &before.processes),
            cgroups: more(&self.cgroups, &before.cgroups),
            files: more(&self.files, &before.files),
        }
    }

    /// It holds nothing.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// The directories (and at the last level files) below `dir`, so many levels deep.
fn names(dir: &Path, depth: usize, all: &mut BTreeSet<String>) {
    let Ok(entries) = std::fs::read_dir(dir) else { return };
    for entry in entries.flatten() {
        let is_dir = entry.file_type().is_ok_and(|t| t.is_dir());
        // The files of a cgroup are the kernel's.
        if is_dir || !dir.starts_with("/sys") {
            all.insert(entry.path().to_string_lossy().into_owned());
        }
        if is_dir && depth > 1 {
            names(&entry.path(), depth - 1, all);
        }
    }
}
