//! Cgroup limits and the cgroup's path.

use crate::facts::{CgroupDriver, CgroupMode, NodeFacts, NodePolicy};
use crate::paths;
use oci_spec::runtime::{
    Capability, LinuxCpu, LinuxHugepageLimitBuilder, LinuxMemory, LinuxPidsBuilder, LinuxResources, Spec,
};
use proto::cri;
use std::collections::HashMap;
use std::path::PathBuf;
use types::{Error, Result, ResultExt};

/// Where containers go whose pod names no cgroup parent.
pub const OWN_PARENT: &str = "/longshore/pods";
/// The same in systemd's tree.
const OWN_SLICE: &str = "longshore.slice";

/// `linux.cgroupsPath` of `id` below the pod's parent, which is used as it stands
/// (behaviours.md section 6): `PARENT/ID`, or `SLICE:longshore:ID` for systemd.
///
/// # Errors
/// `InvalidArgument` for a parent with `..`, or one that is no slice under systemd.
pub fn cgroups_path(parent: &str, id: &str, driver: CgroupDriver) -> Result<PathBuf> {
    paths::check_text("cgroup_parent", parent)?;
    if paths::climbs(parent) {
        return Err(Error::invalid(format!("cgroup_parent {parent:?} contains \"..\"")));
    }
    match driver {
        CgroupDriver::Cgroupfs => {
            let parent = if parent.is_empty() { OWN_PARENT } else { parent };
            Ok(paths::clean(parent).join(id))
        }
        CgroupDriver::Systemd => {
            // The kubelet gives the whole path of the slice; its name says the rest.
            let slice = match parent.trim_end_matches('/').rsplit('/').next() {
                None | Some("") => OWN_SLICE,
                Some(name) => name,
            };
            if !slice.ends_with(".slice") || slice.contains(':') {
                return Err(Error::invalid(format!("cgroup_parent {parent:?} is no systemd slice"))
                    .hint("the kubelet's and the runtime's cgroup drivers must agree"));
            }
            Ok(PathBuf::from(format!("{slice}:longshore:{id}")))
        }
    }
}

/// The limits of `resources`, for a new container or for Update. Only what is set
/// appears, so that an update leaves the rest alone.
///
/// # Errors
/// `InvalidArgument` that names the field and the value.
pub fn linux_resources(
    resources: &cri::LinuxContainerResources,
    node: &NodeFacts,
    warnings: &mut Vec<String>,
) -> Result<LinuxResources> {
    let mut out = LinuxResources::default();
    out.set_devices(None);
    out.set_cpu(cpu(resources)?);
    out.set_memory(memory(resources, node)?);
    out.set_hugepage_limits(hugepages(resources, node, warnings)?);
    if !resources.unified.is_empty() {
        out.set_unified(Some(unified(resources, node)?));
    }
    Ok(out)
}

/// Merges an accepted update into the container's stored spec, so that what is
/// shown and what a restart would use agree with the kernel.
pub fn apply_update(spec: &mut Spec, update: &LinuxResources) {
    let Some(linux) = spec.linux_mut() else { return };
    let mut merged = linux.resources().clone().unwrap_or_default();
    if let Some(new) = update.cpu() {
        let mut cpu = merged.cpu().clone().unwrap_or_default();
        cpu.set_shares(new.shares().or(cpu.shares()));
        cpu.set_quota(new.quota().or(cpu.quota()));
        cpu.set_period(new.period().or(cpu.period()));
        cpu.set_cpus(new.cpus().clone().or_else(|| cpu.cpus().clone()));
        cpu.set_mems(new.mems().clone().or_else(|| cpu.mems().clone()));
        merged.set_cpu(Some(cpu));
    }
    if let Some(new) = update.memory() {
        let mut memory = merged.memory().unwrap_or_default();
        memory.set_limit(new.limit().or(memory.limit()));
        memory.set_swap(new.swap().or(memory.swap()));
        merged.set_memory(Some(memory));
    }
    if update.hugepage_limits().is_some() {
        merged.set_hugepage_limits(update.hugepage_limits().clone());
    }
    if let Some(new) = update.unified() {
        let mut all = merged.unified().clone().unwrap_or_default();
        all.extend(new.clone());
        merged.set_unified(Some(all));
    }
    linux.set_resources(Some(merged));
}

fn positive(field: &str, value: i64) -> Result<Option<u64>> {
    match u64::try_from(value) {
        Ok(0) => Ok(None),
        Ok(v) => Ok(Some(v)),
        Err(_) => Err(Error::invalid(format!("{field} {value} is negative"))),
    }
}

/// A limit where -1 lifts it and 0 says nothing.
fn limit(field: &str, value: i64) -> Result<Option<i64>> {
    match value {
        0 => Ok(None),
        -1.. => Ok(Some(value)),
        _ => Err(Error::invalid(format!("{field} {value} is below -1"))),
    }
}

fn cpu(resources: &cri::LinuxContainerResources) -> Result<Option<LinuxCpu>> {
    let mut cpu = LinuxCpu::default();
    cpu.set_shares(positive("cpu_shares", resources.cpu_shares)?);
    cpu.set_period(positive("cpu_period", resources.cpu_period)?);
    cpu.set_quota(limit("cpu_quota", resources.cpu_quota)?);
    cpu.set_cpus(set("cpuset_cpus", &resources.cpuset_cpus)?);
    cpu.set_mems(set("cpuset_mems", &resources.cpuset_mems)?);
    Ok((cpu != LinuxCpu::default()).then_some(cpu))
}

/// A cpuset list such as `0-3,7`.
fn set(field: &str, text: &str) -> Result<Option<String>> {
    if text.bytes().any(|b| !(b.is_ascii_digit() || b == b',' || b == b'-')) {
        return Err(Error::invalid(format!("{field} {text:?} is no list of numbers and ranges")));
    }
    Ok((!text.is_empty()).then(|| text.to_string()))
}

/// Without a swap limit of its own a container doesn't swap: its limit on memory
/// and swap together is the one on memory.
fn memory(resources: &cri::LinuxContainerResources, node: &NodeFacts) -> Result<Option<LinuxMemory>> {
    let bytes = limit("memory_limit_in_bytes", resources.memory_limit_in_bytes)?;
    let swap = limit("memory_swap_limit_in_bytes", resources.memory_swap_limit_in_bytes)?;
    if let (Some(bytes @ 1..), Some(swap @ 1..)) = (bytes, swap)
        && swap < bytes
    {
        return Err(Error::invalid(format!(
            "memory_swap_limit_in_bytes {swap} is below memory_limit_in_bytes {bytes}: it counts both together"
        )));
    }
    let mut memory = LinuxMemory::default();
    memory.set_limit(bytes);
    if node.swap_accounting {
        memory.set_swap(swap.or(bytes));
    }
    Ok((memory != LinuxMemory::default()).then_some(memory))
}

/// A kubelet sends a limit for every page size, mostly 0; where the node can't
/// limit a size it is dropped (behaviours.md section 6).
fn hugepages(
    resources: &cri::LinuxContainerResources,
    node: &NodeFacts,
    warnings: &mut Vec<String>,
) -> Result<Option<Vec<oci_spec::runtime::LinuxHugepageLimit>>> {
    let mut kept = Vec::new();
    let mut dropped = Vec::new();
    for asked in &resources.hugepage_limits {
        if node.hugepage_sizes.contains(&asked.page_size) {
            let limit = LinuxHugepageLimitBuilder::default()
                .page_size(&asked.page_size)
                .limit(i64::try_from(asked.limit).unwrap_or(i64::MAX))
                .build()
                .context(|| format!("hugepage_limits {:?}", asked.page_size))?;
            kept.push(limit);
        } else if asked.limit != 0 {
            dropped.push(asked.page_size.as_str());
        }
    }
    if !dropped.is_empty() {
        warnings.push(format!("huge page limits dropped, since no hugetlb controller counts {}", dropped.join(", ")));
    }
    Ok((!kept.is_empty()).then_some(kept))
}

fn unified(resources: &cri::LinuxContainerResources, node: &NodeFacts) -> Result<HashMap<String, String>> {
    for key in resources.unified.keys() {
        let file = key.contains('.') && key.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b));
        if !file || key.contains("..") {
            return Err(Error::invalid(format!("unified: {key:?} is no cgroup file such as memory.high")));
        }
    }
    if node.cgroup_mode == CgroupMode::Legacy {
        let mut keys: Vec<&str> = resources.unified.keys().map(String::as_str).collect();
        keys.sort_unstable();
        return Err(Error::invalid(format!("unified: {} needs cgroup v2, and this node has v1", keys.join(", "))));
    }
    Ok(resources.unified.clone().into_iter().collect())
}

/// Adds the operator's process limit where CRI's resources give none.
pub(crate) fn pids(out: &mut LinuxResources, policy: &NodePolicy) -> Result<()> {
    let given = out.unified().as_ref().is_some_and(|u| u.contains_key("pids.max"));
    if let Some(limit) = policy.pids_limit
        && !given
    {
        let pids = LinuxPidsBuilder::default().limit(limit).build().context(|| "pids limit".into())?;
        out.set_pids(Some(pids));
    }
    Ok(())
}

/// The process's oom_score_adj. Without CAP_SYS_RESOURCE it can't go below the
/// daemon's own, so it is clamped, with one warning. A container without resources
/// inherits the daemon's value, unless that would shield it from the OOM killer.
pub(crate) fn oom_score_adj(
    resources: Option<&cri::LinuxContainerResources>,
    node: &NodeFacts,
    warnings: &mut Vec<String>,
) -> Result<Option<i32>> {
    let Some(resources) = resources else {
        return Ok((node.oom_score_adj < 0).then_some(0));
    };
    let asked = i32::try_from(resources.oom_score_adj)
        .ok()
        .filter(|v| (-1000..=1000).contains(v))
        .ok_or_else(|| Error::invalid(format!("oom_score_adj {} is outside -1000 to 1000", resources.oom_score_adj)))?;
    if asked < node.oom_score_adj && !node.bounding.contains(&Capability::SysResource) {
        let floor = node.oom_score_adj;
        warnings.push(format!("oom_score_adj {asked} raised to {floor}: the runtime lacks CAP_SYS_RESOURCE"));
        return Ok(Some(floor));
    }
    Ok(Some(asked))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn v2() -> NodeFacts {
        NodeFacts { swap_accounting: true, ..Default::default() }
    }

    #[test]
    fn cgroup_paths_follow_the_driver() {
        use CgroupDriver::*;
        let path = |parent, driver| cgroups_path(parent, "id", driver).map(|p| p.display().to_string());
        assert_eq!(path("/kubepods/pod1", Cgroupfs).unwrap(), "/kubepods/pod1/id");
        assert_eq!(path("kubepods", Cgroupfs).unwrap(), "/kubepods/id");
        assert_eq!(path("", Cgroupfs).unwrap(), "/longshore/pods/id");
        let slice = "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1.slice";
        assert_eq!(path(slice, Systemd).unwrap(), "kubepods-burstable-pod1.slice:longshore:id");
        assert_eq!(path("", Systemd).unwrap(), "longshore.slice:longshore:id");
        assert!(path("/kubepods/pod1", Systemd).is_err());
        assert!(path("/a/../b", Cgroupfs).is_err());
    }

    #[test]
    fn swap_is_off_unless_given() {
        let res = |limit, swap| cri::LinuxContainerResources {
            memory_limit_in_bytes: limit,
            memory_swap_limit_in_bytes: swap,
            ..Default::default()
        };
        let get = |r: &_, n: &_| {
            let m = linux_resources(r, n, &mut Vec::new()).unwrap().memory().unwrap();
            (m.limit(), m.swap())
        };
        assert_eq!(get(&res(100, 0), &v2()), (Some(100), Some(100)));
        assert_eq!(get(&res(100, 150), &v2()), (Some(100), Some(150)));
        assert_eq!(get(&res(-1, -1), &v2()), (Some(-1), Some(-1)));
        assert_eq!(get(&res(100, 150), &NodeFacts::default()), (Some(100), None));
        assert!(linux_resources(&res(100, 50), &v2(), &mut Vec::new()).is_err());
        assert!(linux_resources(&res(-2, 0), &v2(), &mut Vec::new()).is_err());
    }

    #[test]
    fn only_what_is_set_appears_in_an_update() {
        let r = cri::LinuxContainerResources { cpu_shares: 512, ..Default::default() };
        let out = linux_resources(&r, &v2(), &mut Vec::new()).unwrap();
        assert_eq!(serde_json::to_string(&out).unwrap(), r#"{"cpu":{"shares":512}}"#);
    }

    #[test]
    fn hugepages_without_a_controller_are_dropped() {
        let page = |page_size: &str, limit| cri::HugepageLimit { page_size: page_size.into(), limit };
        let r = cri::LinuxContainerResources {
            hugepage_limits: vec![page("2MB", 0), page("1GB", 5), page("2MB", u64::MAX)],
            ..Default::default()
        };
        let mut warnings = Vec::new();
        assert!(linux_resources(&r, &v2(), &mut warnings).unwrap().hugepage_limits().is_none());
        assert_eq!(warnings.len(), 1);
        let node = NodeFacts { hugepage_sizes: ["2MB".to_string()].into(), ..v2() };
        let kept = linux_resources(&r, &node, &mut warnings).unwrap().hugepage_limits().clone().unwrap();
        assert_eq!(kept.len(), 2);
        assert_eq!(kept[1].limit(), i64::MAX);
    }

    #[test]
    fn oom_score_adj_is_clamped_only_without_the_right() {
        let r = cri::LinuxContainerResources { oom_score_adj: -997, ..Default::default() };
        let mut warnings = Vec::new();
        assert_eq!(oom_score_adj(Some(&r), &v2(), &mut warnings).unwrap(), Some(0));
        assert_eq!(warnings.len(), 1);
        let mut node = v2();
        node.bounding.insert(Capability::SysResource);
        assert_eq!(oom_score_adj(Some(&r), &node, &mut warnings).unwrap(), Some(-997));
        assert_eq!(oom_score_adj(None, &node, &mut warnings).unwrap(), None);
        node.oom_score_adj = -999;
        assert_eq!(oom_score_adj(None, &node, &mut warnings).unwrap(), Some(0));
        let r = cri::LinuxContainerResources { oom_score_adj: 1001, ..Default::default() };
        assert!(oom_score_adj(Some(&r), &node, &mut warnings).is_err());
        assert_eq!(warnings.len(), 1);
    }

    #[test]
    fn unified_keys_are_files_of_a_v2_cgroup() {
        let r = |key: &str| cri::LinuxContainerResources {
            unified: [(key.to_string(), "1".to_string())].into_iter().collect(),
            ..Default::default()
        };
        assert!(linux_resources(&r("memory.high"), &v2(), &mut Vec::new()).is_ok());
        for bad in ["../cgroup.procs", "memory", "a/b.c", "x..y", ""] {
            assert!(linux_resources(&r(bad), &v2(), &mut Vec::new()).is_err(), "{bad}");
        }
        let v1 = NodeFacts { cgroup_mode: CgroupMode::Legacy, ..Default::default() };
        let e = linux_resources(&r("memory.high"), &v1, &mut Vec::new()).unwrap_err();
        assert!(e.to_string().contains("memory.high"), "{e}");
    }

    #[test]
    fn an_update_keeps_what_it_does_not_name() {
        let first = cri::LinuxContainerResources { cpu_shares: 2, memory_limit_in_bytes: 7, ..Default::default() };
        let second = cri::LinuxContainerResources { cpu_quota: 5, ..Default::default() };
        let mut spec = Spec::default();
        for r in [first, second] {
            apply_update(&mut spec, &linux_resources(&r, &v2(), &mut Vec::new()).unwrap());
        }
        let resources = spec.linux().as_ref().unwrap().resources().clone().unwrap();
        let cpu = resources.cpu().clone().unwrap();
        assert_eq!((cpu.shares(), cpu.quota()), (Some(2), Some(5)));
        assert_eq!(resources.memory().unwrap().limit(), Some(7));
    }
}
