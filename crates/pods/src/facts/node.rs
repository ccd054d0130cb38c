//! What this node and the daemon's own rights allow.

use super::mountinfo::{self, MountPoint};
use spec::{CgroupDriver, CgroupMode, NodeFacts};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use types::{Error, Result, ResultExt};

/// The kernel that brought mount_setattr(2).
const MOUNT_SETATTR: (u32, u32) = (5, 12);
/// Lines of /proc/self/limits and the limits they are.
const LIMITS: [(&str, &str); 16] = [
    ("Max cpu time", "RLIMIT_CPU"),
    ("Max file size", "RLIMIT_FSIZE"),
    ("Max data size", "RLIMIT_DATA"),
    ("Max stack size", "RLIMIT_STACK"),
    ("Max core file size", "RLIMIT_CORE"),
    ("Max resident set", "RLIMIT_RSS"),
    ("Max processes", "RLIMIT_NPROC"),
    ("Max open files", "RLIMIT_NOFILE"),
    ("Max locked memory", "RLIMIT_MEMLOCK"),
    ("Max address space", "RLIMIT_AS"),
    ("Max file locks", "RLIMIT_LOCKS"),
    ("Max pending signals", "RLIMIT_SIGPENDING"),
    ("Max msgqueue size", "RLIMIT_MSGQUEUE"),
    ("Max nice priority", "RLIMIT_NICE"),
    ("Max realtime priority", "RLIMIT_RTPRIO"),
    ("Max realtime timeout", "RLIMIT_RTTIME"),
];

/// Gathers the node's facts. `runtime_features` is the OCI runtime's own features
/// document (`runc features`), `None` where it is too old to have one: what it
/// doesn't name counts as missing. The cgroup driver is the operator's choice and
/// set by the caller.
///
/// # Errors
/// A file of /proc that can't be read or understood.
pub fn node_facts(runtime_features: Option<&serde_json::Value>) -> Result<NodeFacts> {
    let mounts = mountinfo::read()?;
    let cgroup = mountinfo::carrier(&mounts, Path::new("/sys/fs/cgroup"))
        .filter(|m| m.path == Path::new("/sys/fs/cgroup") && m.kind == "cgroup2");
    let cgroup_mode = if cgroup.is_some() { CgroupMode::Unified } else { CgroupMode::Legacy };
    let cgroup2_options = cgroup.map_or_else(Vec::new, |m| {
        let kept = |o: &&String| ["nsdelegate", "memory_recursiveprot"].contains(&o.as_str());
        m.super_options.iter().filter(kept).cloned().collect()
    });
    let status = read("/proc/self/status")?;
    let modern = kernel()? >= MOUNT_SETATTR;
    let runtime = runtime_features.unwrap_or(&serde_json::Value::Null);
    let knows_rro = runtime["mountOptions"].as_array().is_some_and(|all| all.iter().any(|o| o == "rro"));
    let knows_idmap = runtime["linux"]["mountExtensions"]["idmap"]["enabled"] == true;
    let enabled = |path: &str| std::fs::read(path).is_ok_and(|text| text.starts_with(b"Y"));
    Ok(NodeFacts {
        cgroup_mode,
        cgroup_driver: CgroupDriver::default(),
        hugepage_sizes: hugepage_sizes(cgroup_mode, &mounts),
        swap_accounting: swap_accounting(cgroup_mode, &mounts),
        cgroup2_options,
        bounding: spec::capabilities_from_mask(bounding(&status)?),
        oom_score_adj: number("/proc/self/oom_score_adj")?,
        hard_limits: hard_limits(&read("/proc/self/limits")?),
        seccomp: status.lines().any(|l| l.starts_with("Seccomp:")),
        apparmor: enabled("/sys/module/apparmor/parameters/enabled")
            && Path::new("/sys/kernel/security/apparmor").exists(),
        selinux: Path::new("/sys/fs/selinux/enforce").exists(),
        recursive_read_only: modern && knows_rro,
        idmap_mounts: modern && knows_idmap,
        arch: std::env::consts::ARCH.to_string(),
    })
}

fn read(path: &str) -> Result<String> {
    std::fs::read_to_string(path).context(|| format!("read {path}"))
}

fn number(path: &str) -> Result<i32> {
    let text = read(path)?;
    text.trim().parse().context(|| format!("{path} holds {:?}, which is no number", text.trim()))
}

/// Major and minor version of the kernel.
fn kernel() -> Result<(u32, u32)> {
    let path = "/proc/sys/kernel/osrelease";
    let text = read(path)?;
    let mut parts = text.split(|c: char| !c.is_ascii_digit()).map(str::parse::<u32>);
    match (parts.next(), parts.next()) {
        (Some(Ok(major)), Some(Ok(minor))) => Ok((major, minor)),
        _ => Err(Error::internal(format!("{path} holds {:?}, which is no version", text.trim()))),
    }
}

fn bounding(status: &str) -> Result<u64> {
    let mask = status.lines().find_map(|l| l.strip_prefix("CapBnd:")).unwrap_or("").trim();
    u64::from_str_radix(mask, 16).context(|| format!("/proc/self/status: CapBnd {mask:?} is no mask"))
}

fn hard_limits(text: &str) -> BTreeMap<String, u64> {
    let hard = |rest: &str| match rest.split_whitespace().nth(1)? {
        "unlimited" => Some(u64::MAX),
        other => other.parse().ok(),
    };
    LIMITS
        .iter()
        .filter_map(|(line, name)| {
            let rest = text.lines().find_map(|l| l.strip_prefix(line))?;
            Some((name.to_string(), hard(rest)?))
        })
        .collect()
}

/// Page sizes in the words of the hugetlb controller, where it is mounted.
fn hugepage_sizes(mode: CgroupMode, mounts: &[MountPoint]) -> BTreeSet<String> {
    let counted = match mode {
        CgroupMode::Unified => std::fs::read_to_string("/sys/fs/cgroup/cgroup.controllers")
            .is_ok_and(|all| all.split_whitespace().any(|c| c == "hugetlb")),
        CgroupMode::Legacy => v1_mount(mounts, "hugetlb").is_some(),
    };
    let Ok(sizes) = std::fs::read_dir("/sys/kernel/mm/hugepages") else { return BTreeSet::new() };
    sizes
        .flatten()
        .filter(|_| counted)
        .filter_map(|entry| {
            let name = entry.file_name().into_string().ok()?;
            let kib: u64 = name.strip_prefix("hugepages-")?.strip_suffix("kB")?.parse().ok()?;
            Some(page_size(kib))
        })
        .collect()
}

fn page_size(kib: u64) -> String {
    match kib {
        k if k >= 1 << 20 => format!("{}GB", k >> 20),
        k if k >= 1 << 10 => format!("{}MB", k >> 10),
        k => format!("{k}KB"),
    }
}

fn v1_mount<'a>(mounts: &'a [MountPoint], controller: &str) -> Option<&'a MountPoint> {
    mounts.iter().find(|m| m.kind == "cgroup" && m.super_options.iter().any(|o| o == controller))
}

/// The root cgroup of v2 has no swap file, so any other is asked: the daemon's own,
/// or the first below the root.
fn swap_accounting(mode: CgroupMode, mounts: &[MountPoint]) -> bool {
    match mode {
        CgroupMode::Legacy => {
            v1_mount(mounts, "memory").is_some_and(|m| m.path.join("memory.memsw.limit_in_bytes").exists())
        }
        CgroupMode::Unified => {
            let own = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
            let own = own.lines().find_map(|l| l.strip_prefix("0::/")).unwrap_or("").to_string();
            let root = Path::new("/sys/fs/cgroup");
            let below = std::fs::read_dir(root).into_iter().flatten().flatten().map(|e| e.path());
            std::iter::once(root.join(own)).chain(below).any(|dir| dir.join("memory.swap.max").exists())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_node_is_understood() {
        let features = serde_json::json!({"mountOptions": ["rro"], "linux": {}});
        let facts = node_facts(Some(&features)).unwrap();
        assert!(!facts.bounding.is_empty() && facts.hard_limits.contains_key("RLIMIT_NOFILE"));
        assert!(facts.seccomp && facts.recursive_read_only && !facts.idmap_mounts);
        assert!(!node_facts(None).unwrap().recursive_read_only);
        let swap = std::fs::read_to_string("/proc/mounts").unwrap();
        let unified = swap.lines().any(|l| l.contains(" /sys/fs/cgroup cgroup2 "));
        assert_eq!(facts.cgroup_mode == CgroupMode::Unified, unified);
    }

    #[test]
    fn files_of_proc_are_parsed() {
        assert_eq!(bounding("x\nCapBnd:\t000001fffeffffff\n").unwrap(), 0x1ff_feff_ffff);
        assert!(bounding("nothing").is_err());
        let text = "Limit                     Soft Limit           Hard Limit           Units     \n\
                    Max cpu time              unlimited            unlimited            seconds   \n\
                    Max open files            1024                 524288               files     \n";
        let limits = hard_limits(text);
        assert_eq!((limits["RLIMIT_CPU"], limits["RLIMIT_NOFILE"], limits.len()), (u64::MAX, 524_288, 2));
        assert_eq!([page_size(64), page_size(2048), page_size(1 << 20)], ["64KB", "2MB", "1GB"]);
    }
}
