//! What belongs to a pod and not to one of its containers: checks of its
//! configuration, the spec of its bundle, the spec of its init.

use crate::facts::{CgroupDriver, IdMaps, NodeFacts, NodePolicy, PidMode, PodNamespaces};
use crate::{annotations, caps, container, mounts, paths, resources, seccomp};
use oci_spec::runtime::{
    Capability, LinuxBuilder, LinuxResources, ProcessBuilder, RootBuilder, Spec, SpecBuilder, UserBuilder,
};
use proto::cri::{self, NamespaceMode};
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use types::{Error, Result, ResultExt};

/// Where the pod's init binary is seen in its own rootfs.
pub const INIT: &str = "/init";
/// A kubelet gives no guaranteed container less than -997.
const INIT_OOM_SCORE_ADJ: i32 = -998;

/// Sysctls of the IPC namespace that have no prefix of their own.
const IPC_SYSCTLS: [&str; 10] = [
    "kernel.auto_msgmni",
    "kernel.msgmax",
    "kernel.msgmnb",
    "kernel.msgmni",
    "kernel.sem",
    "kernel.shmall",
    "kernel.shmmax",
    "kernel.shmmni",
    "kernel.shm_rmid_forced",
    "kernel.shm_next_id",
];

/// Where a sysctl's value lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SysctlNamespace {
    /// The pod's network namespace.
    Net,
    /// The pod's IPC namespace.
    Ipc,
}

/// The namespace that a sysctl (dots or slashes between its parts) belongs to;
/// `None` for one of the whole host.
pub fn sysctl_namespace(name: &str) -> Option<SysctlNamespace> {
    let dotted = name.replace('/', ".");
    if dotted.starts_with("net.") {
        Some(SysctlNamespace::Net)
    } else if IPC_SYSCTLS.contains(&dotted.as_str()) || dotted.starts_with("fs.mqueue.") {
        Some(SysctlNamespace::Ipc)
    } else {
        None
    }
}

/// Refuses sysctls that would reach beyond the pod (CVE-2022-0532) and values that
/// a `+` or `=` could smuggle further settings into (CVE-2022-0811).
///
/// # Errors
/// `InvalidArgument` that names the sysctl.
pub fn check_sysctls<'a>(
    sysctls: impl IntoIterator<Item = (&'a String, &'a String)>,
    host_net: bool,
    host_ipc: bool,
) -> Result<()> {
    for (name, value) in sysctls {
        let refuse = |why: &str| Err(Error::invalid(format!("sysctls: {name:?}: {why}")));
        let plain = name.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-/".contains(&b));
        if !plain || name.split(['.', '/']).any(str::is_empty) {
            return refuse("this is no sysctl's name");
        }
        if value.contains(['+', '=', '\n', '\0']) {
            return refuse(&format!("the value {value:?} contains '+', '=', a newline or a NUL byte"));
        }
        match sysctl_namespace(name) {
            None => return refuse("it is the whole host's"),
            Some(SysctlNamespace::Net) if host_net => return refuse("the pod shares the host's network"),
            Some(SysctlNamespace::Ipc) if host_ipc => return refuse("the pod shares the host's IPC"),
            Some(_) => {}
        }
    }
    Ok(())
}

/// Refuses host names that are no DNS names, or that could leave the file that they
/// are written to (CVE-2025-0750). Empty is the node's own and passes.
///
/// # Errors
/// `InvalidArgument` that names the host name.
pub fn check_hostname(name: &str) -> Result<()> {
    // The kernel keeps 64 bytes.
    let parts = name.split('.').all(|part| {
        !part.is_empty()
            && part.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
            && !part.starts_with('-')
            && !part.ends_with('-')
    });
    if name.is_empty() || (name.len() <= 64 && parts) {
        return Ok(());
    }
    let shown: String = name.chars().take(80).collect();
    Err(Error::invalid(format!("hostname {shown:?} is no host name of at most 64 letters, digits, '-' and '.'")))
}

/// Joins `log_directory` and `log_path`; `None` where the container has no log.
///
/// # Errors
/// `InvalidArgument` for a directory that is not absolute, a path that is, and for
/// `..` in either (CVE-2025-0750).
pub fn log_path(directory: &str, path: &str) -> Result<Option<PathBuf>> {
    if directory.is_empty() || path.is_empty() {
        return Ok(None);
    }
    let directory = paths::host_path("log_directory", directory)?;
    paths::check_text("log_path", path)?;
    let inside = paths::clean(path);
    if path.starts_with('/') || paths::climbs(path) || inside == Path::new("/") {
        return Err(Error::invalid(format!("log_path {path:?} is not a path inside log_directory")));
    }
    Ok(Some(directory.join(inside.strip_prefix("/").unwrap_or(&inside))))
}

/// The maps of the pod's user namespace, `None` where it has the host's.
///
/// # Errors
/// `InvalidArgument`: another mode than POD or NODE, more or less than one line per
/// map, lines of different ids, root not mapped, or maps without a namespace.
pub fn user_namespace(options: &cri::NamespaceOption) -> Result<Option<IdMaps>> {
    let Some(user) = &options.userns_options else { return Ok(None) };
    let maps = IdMaps { uids: mounts::id_maps(&user.uids), gids: mounts::id_maps(&user.gids) };
    let mode = NamespaceMode::try_from(user.mode)
        .map_err(|_| Error::invalid(format!("userns_options: mode {} is unknown", user.mode)))?;
    match mode {
        NamespaceMode::Node if maps.uids.is_empty() && maps.gids.is_empty() => return Ok(None),
        NamespaceMode::Node => return Err(Error::invalid("userns_options: mode NODE with id mappings")),
        NamespaceMode::Pod => {}
        other => return Err(Error::invalid(format!("userns_options: mode {} is not served", other.as_str_name()))),
    }
    for (name, map) in [("uids", &maps.uids), ("gids", &maps.gids)] {
        let [line] = map.as_slice() else {
            let n = map.len();
            return Err(Error::invalid(format!("userns_options: {name} has {n} mappings, and one is served")));
        };
        let fits = line.length > 0 && line.host.checked_add(line.length - 1).is_some_and(|end| end < u32::MAX);
        if line.container != 0 || !fits {
            return Err(Error::invalid(format!(
                "userns_options: {name} maps {} ids from {} to {}: container id 0 must be mapped, inside 32 bits",
                line.length, line.container, line.host
            )));
        }
    }
    if maps.uids != maps.gids {
        return Err(Error::invalid("userns_options: uids and gids differ"));
    }
    Ok(Some(maps))
}

/// Checks a pod's configuration: metadata, host name, log directory, sysctls, user
/// namespace, cgroup parent.
///
/// # Errors
/// `InvalidArgument` that names pod, field and value.
pub fn check_pod(config: &cri::PodSandboxConfig) -> Result<()> {
    let metadata = config.metadata.as_ref().ok_or_else(|| Error::invalid("pod config: metadata is missing"))?;
    let check = || {
        if metadata.name.is_empty() {
            return Err(Error::invalid("metadata: name is empty"));
        }
        check_hostname(&config.hostname)?;
        if !config.log_directory.is_empty() {
            paths::host_path("log_directory", &config.log_directory)?;
        }
        let Some(linux) = &config.linux else { return Ok(()) };
        // Its form is checked when the first cgroup is made; here, that it climbs nowhere.
        resources::cgroups_path(&linux.cgroup_parent, "x", CgroupDriver::Cgroupfs)?;
        let options = linux.security_context.as_ref().and_then(|s| s.namespace_options.clone()).unwrap_or_default();
        let host = |mode: i32| mode == NamespaceMode::Node as i32;
        check_sysctls(&linux.sysctls, host(options.network), host(options.ipc))?;
        user_namespace(&options).map(drop)
    };
    check().map_err(|e: Error| e.within(format!("pod {}/{}", metadata.namespace, metadata.name)))
}

/// The spec of the pod's own bundle, from which a shim reads whose it is: the
/// annotations and nothing else.
///
/// # Errors
/// `Internal` only.
pub fn pod_bundle_spec(pod_id: &str, config: &cri::PodSandboxConfig, policy: &NodePolicy) -> Result<Spec> {
    let mut spec = blank()?;
    spec.set_annotations(Some(pod_annotations(pod_id, config, policy)));
    Ok(spec)
}

/// The annotations of the pod's own bundle: those that the operator lets through, and
/// those by which shims, kata and gVisor among them, know pods.
pub fn pod_annotations(pod_id: &str, config: &cri::PodSandboxConfig, policy: &NodePolicy) -> HashMap<String, String> {
    let mut all = annotations::allowed(config.annotations.clone(), &policy.annotations);
    all.extend(annotations::identity(pod_id, config, None));
    all
}

/// A spec with nothing in it, where oci-spec's own default has a whole container.
fn blank() -> Result<Spec> {
    let mut spec = SpecBuilder::default().version(container::VERSION).build().context(|| "blank spec".into())?;
    spec.set_root(None).set_mounts(None).set_process(None).set_hostname(None).set_linux(None).set_annotations(None);
    Ok(spec)
}

/// The spec of a pod's init: the static binary, bind-mounted over an empty,
/// read-only rootfs, in a new pid namespace and the pod's others, as root without
/// any right. Its id is the pod's; `namespaces.pid` is not looked at, and `binary`
/// is the init on the host.
///
/// # Errors
/// `InvalidArgument` for a cgroup parent that can't be used.
pub fn sandbox_init_spec(
    pod_id: &str,
    config: &cri::PodSandboxConfig,
    namespaces: &PodNamespaces,
    binary: &Path,
    node: &NodeFacts,
    policy: &NodePolicy,
) -> Result<Spec> {
    let parent = config.linux.as_ref().map_or("", |l| l.cgroup_parent.as_str());
    let nothing = caps::none();
    let mut process = ProcessBuilder::default()
        .args(vec![INIT.to_string()])
        .env(vec!["PATH=/".to_string()])
        .cwd("/")
        .user(UserBuilder::default().uid(0u32).gid(0u32).build().context(|| "init's user".into())?)
        .capabilities(nothing)
        .no_new_privileges(true)
        .terminal(false)
        .build()
        .context(|| "init's process".into())?;
    process.set_rlimits(None);
    // It should die last: everything in the pod's pid namespace dies with it.
    let may_lower = node.bounding.contains(&Capability::SysResource);
    process.set_oom_score_adj(Some(if may_lower { INIT_OOM_SCORE_ADJ } else { node.oom_score_adj }));

    let namespaces = PodNamespaces { pid: PidMode::Private, ..namespaces.clone() };
    let mut linux = LinuxBuilder::default()
        .namespaces(container::namespaces(&namespaces, false)?)
        .cgroups_path(resources::cgroups_path(parent, pod_id, node.cgroup_driver)?)
        .build()
        .context(|| "init's linux section".into())?;
    let mut limits = LinuxResources::default();
    limits.set_devices(Some(vec![container::deny_all_devices()?]));
    linux.set_resources(Some(limits)).set_masked_paths(None).set_readonly_paths(None);
    container::set_user_maps(&mut linux, &namespaces)?;
    if node.seccomp {
        linux.set_seccomp(Some(seccomp::default_profile(&Default::default(), &node.arch)?));
    }
    // The runtime needs /proc to start a process at all, and /dev for its defaults.
    let plain = ["nosuid", "noexec", "nodev"];
    let list = vec![
        mounts::mount(Path::new("/proc"), "proc", Path::new("proc"), &plain)?,
        mounts::mount(Path::new("/dev"), "tmpfs", Path::new("tmpfs"), &["nosuid", "noexec", "mode=755", "size=64k"])?,
        mounts::mount(Path::new(INIT), "bind", binary, &["bind", "ro", "nosuid", "nodev"])?,
    ];
    // A VM runtime reads here what its VM shall be.
    let identity = pod_annotations(pod_id, config, policy);
    let mut spec = blank()?;
    spec.set_root(Some(
        RootBuilder::default().path("rootfs").readonly(true).build().context(|| "init's rootfs".into())?,
    ));
    spec.set_process(Some(process)).set_mounts(Some(list)).set_linux(Some(linux)).set_annotations(Some(identity));
    Ok(spec)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sysctl(name: &str, value: &str, net: bool, ipc: bool) -> Result<()> {
        check_sysctls([(&name.to_string(), &value.to_string())], net, ipc)
    }

    #[test]
    fn cve_2022_0811_no_plus_or_equals_in_sysctl_values() {
        for bad in ["1+kernel.core_pattern=|/x", "1=2", "1\n2", "a\0"] {
            assert!(sysctl("kernel.shm_rmid_forced", bad, false, false).is_err(), "{bad:?}");
        }
        assert!(sysctl("kernel.shm_rmid_forced", "1", false, false).is_ok());
        for bad in [
            "kernel.core_pattern",
            "vm.swappiness",
            "fs.file-max",
            "net",
            "",
            "net..x",
            "net/../kernel/x",
            "kernel.hostname",
        ] {
            assert!(sysctl(bad, "1", false, false).is_err(), "{bad:?}");
        }
        assert!(sysctl("net/ipv4/ip_forward", "1", false, false).is_ok());
    }

    #[test]
    fn cve_2022_0532_host_namespace_sysctls_are_refused() {
        assert!(sysctl("net.core.somaxconn", "1", true, false).is_err());
        assert!(sysctl("fs.mqueue.msg_max", "1", false, true).is_err());
        assert!(sysctl("net.core.somaxconn", "1", false, true).is_ok());
        assert!(sysctl("kernel.sem", "1 2 3 4", true, false).is_ok());
    }

    #[test]
    fn cve_2025_0750_log_path_and_hostname_stay_inside() {
        assert_eq!(log_path("/var/log/p", "c/0.log").unwrap(), Some(PathBuf::from("/var/log/p/c/0.log")));
        assert_eq!(log_path("", "c.log").unwrap(), None);
        assert_eq!(log_path("/l", "").unwrap(), None);
        for (dir, path) in [
            ("/l", "../x"),
            ("/l", "a/../../x"),
            ("/l", "/etc/x"),
            ("l", "x"),
            ("/l/../m", "x"),
            ("/l", "."),
            ("/l", "x\n"),
        ] {
            assert!(log_path(dir, path).is_err(), "{dir} {path:?}");
        }
        for good in ["", "a", "web-0", "web-0.svc.cluster", "A_b"] {
            assert!(check_hostname(good).is_ok(), "{good}");
        }
        for bad in ["..", "a/b", "../../x", "a..b", "-a", "a b", "a\n", &"x".repeat(65)] {
            assert!(check_hostname(bad).is_err(), "{bad:?}");
        }
    }

    fn options(mode: NamespaceMode, maps: &[(u32, u32, u32)]) -> cri::NamespaceOption {
        let maps: Vec<cri::IdMapping> = maps
            .iter()
            .map(|(container_id, host_id, length)| cri::IdMapping {
                host_id: *host_id,
                container_id: *container_id,
                length: *length,
            })
            .collect();
        let user = cri::UserNamespace { mode: mode as i32, uids: maps.clone(), gids: maps };
        cri::NamespaceOption { userns_options: Some(user), ..Default::default() }
    }

    #[test]
    fn user_namespaces_need_one_map_that_has_root() {
        assert_eq!(user_namespace(&Default::default()).unwrap(), None);
        assert_eq!(user_namespace(&options(NamespaceMode::Node, &[])).unwrap(), None);
        let maps = user_namespace(&options(NamespaceMode::Pod, &[(0, 65536, 65536)])).unwrap().unwrap();
        assert_eq!((maps.root_uid(), maps.root_gid()), (Some(65536), Some(65536)));
        for bad in [
            options(NamespaceMode::Pod, &[]),
            options(NamespaceMode::Pod, &[(1, 1000, 100)]),
            options(NamespaceMode::Pod, &[(0, 1000, 100), (0, 2000, 100)]),
            options(NamespaceMode::Pod, &[(0, 1000, 0)]),
            options(NamespaceMode::Pod, &[(0, u32::MAX, 2)]),
            options(NamespaceMode::Node, &[(0, 1000, 100)]),
            options(NamespaceMode::Container, &[(0, 1000, 100)]),
        ] {
            assert!(user_namespace(&bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_pods_init_has_no_rights() {
        let config = cri::PodSandboxConfig::default();
        let node = NodeFacts { seccomp: true, arch: "x86_64".into(), ..Default::default() };
        let namespaces = PodNamespaces { net: Some("/n".into()), ..Default::default() };
        let spec =
            sandbox_init_spec("p", &config, &namespaces, Path::new("/usr/libexec/init"), &node, &NodePolicy::default())
                .unwrap();
        let process = spec.process().clone().unwrap();
        assert!(process.capabilities().as_ref().unwrap().bounding().as_ref().unwrap().is_empty());
        assert_eq!(process.no_new_privileges(), Some(true));
        assert_eq!(spec.root().as_ref().unwrap().readonly(), Some(true));
        let text = serde_json::to_string(&spec).unwrap();
        assert_eq!(serde_json::from_str::<Spec>(&text).unwrap(), spec);
        assert!(text.contains(r#"{"type":"pid"}"#) && text.contains(r#""path":"/n""#), "{text}");
    }

    #[test]
    fn a_pods_bundle_says_only_whose_it_is() {
        let metadata = cri::PodSandboxMetadata { name: "n".into(), namespace: "s".into(), ..Default::default() };
        let config = cri::PodSandboxConfig { metadata: Some(metadata), ..Default::default() };
        let spec = pod_bundle_spec("p", &config, &NodePolicy::default()).unwrap();
        assert!(spec.process().is_none() && spec.linux().is_none() && spec.mounts().is_none());
        let all = spec.annotations().clone().unwrap();
        assert_eq!(all["io.kubernetes.cri.container-type"], "sandbox");
        assert_eq!(all["io.kubernetes.cri.sandbox-id"], "p");
        check_pod(&config).unwrap();
    }
}
