//! One container's spec, put together from its parts.

use crate::facts::{
    CgroupMode, HostFacts, IdMap, ImageDefaults, NodeFacts, NodePolicy, PidMode, PodFiles, PodNamespaces,
};
use crate::user::{self, ResolvedUser, RootfsFacts};
use crate::{annotations, caps, devices, facts, mounts, paths, process, resources, security};
use oci_spec::runtime::{
    Capabilities, Capability, Linux, LinuxBuilder, LinuxCapabilities, LinuxDeviceCgroup, LinuxDeviceCgroupBuilder,
    LinuxNamespace, LinuxNamespaceBuilder, LinuxNamespaceType, LinuxResources, PosixRlimit, PosixRlimitBuilder,
    PosixRlimitType, Process, ProcessBuilder, RootBuilder, Spec, SpecBuilder, UserBuilder,
};
use proto::cri;
use std::collections::BTreeMap;
use std::path::PathBuf;
use types::{Error, ErrorKind, Result, ResultExt};

/// The version of the runtime specification that all supported runtimes know.
pub(crate) const VERSION: &str = "1.0.2";

/// Everything that one container's spec depends on.
#[derive(Debug)]
pub struct ContainerInput<'a> {
    /// The container's id.
    pub id: &'a str,
    /// Its pod's id.
    pub pod_id: &'a str,
    /// The container's configuration, as the client sent it.
    pub config: &'a cri::ContainerConfig,
    /// The pod's configuration.
    pub pod: &'a cri::PodSandboxConfig,
    /// The image's configuration.
    pub image: &'a ImageDefaults,
    /// The image's name for the annotation.
    pub image_name: &'a str,
    /// The node.
    pub node: &'a NodeFacts,
    /// The operator's choices.
    pub policy: &'a NodePolicy,
    /// What the image's files say of the user.
    pub rootfs: &'a RootfsFacts,
    /// The host paths that the configuration names.
    pub host: &'a HostFacts,
    /// Where the pod's namespaces are, and the container's pid namespace.
    pub namespaces: &'a PodNamespaces,
    /// The pod's files.
    pub files: &'a PodFiles,
    /// For each `container_path` of an image mount, as written in CRI: the host paths
    /// of the image's layers, or of what its sub-path is in them, the top one first.
    pub image_mounts: &'a BTreeMap<String, Vec<PathBuf>>,
    /// For each of the image's VOLUMEs that gets a directory: the host's directory.
    pub volumes: &'a BTreeMap<String, PathBuf>,
    /// The text of the file that [`crate::seccomp_profile_path`] named.
    pub seccomp_profile: Option<&'a str>,
}

/// A container's spec and what else follows from its configuration.
#[derive(Debug, Clone, PartialEq)]
pub struct ContainerSpec {
    /// The spec, for config.json.
    pub spec: Spec,
    /// Things that were asked for and can't be had on this node, a sentence each.
    pub warnings: Vec<String>,
    /// Whom it runs as, for ContainerStatus.
    pub user: ResolvedUser,
    /// Host paths of mounts: what isn't there is made as a directory, 0755.
    pub ensure: Vec<PathBuf>,
}

/// Makes a container's spec.
///
/// # Errors
/// `InvalidArgument` for what can't be meant, `FailedPrecondition` for what this
/// node can't do, each naming container, field and value.
pub fn container_spec(input: &ContainerInput<'_>) -> Result<ContainerSpec> {
    let name = input.config.metadata.as_ref().map_or("", |m| m.name.as_str());
    build(input, name).map_err(|e| e.within(format!("container {name:?}")))
}

fn build(input: &ContainerInput<'_>, name: &str) -> Result<ContainerSpec> {
    let config = input.config;
    let sc = config.linux.as_ref().and_then(|l| l.security_context.clone()).unwrap_or_default();
    let pod_linux = input.pod.linux.clone().unwrap_or_default();
    let pod_privileged = pod_linux.security_context.as_ref().is_some_and(|s| s.privileged);
    if sc.privileged && !pod_privileged {
        return Err(Error::invalid("privileged is set, and its pod is not privileged"));
    }
    if config.log_path.starts_with('/') || paths::climbs(&config.log_path) {
        return Err(Error::invalid(format!("log_path {:?} is not a path inside log_directory", config.log_path)));
    }
    let mut warnings = Vec::new();
    let request = user::user_request(&sc, input.image)?;
    let user = user::resolve(&request, input.rootfs)?;
    check_mapped(&user, input.namespaces)?;

    let capabilities = caps::sets(sc.capabilities.as_ref(), sc.privileged, &input.node.bounding, &mut warnings)?;
    let mounts = mounts::mounts(input, &sc, &mut warnings)?;
    let labels = security::selinux(sc.selinux_options.as_ref(), sc.privileged, input.node, &mut warnings)?;
    let mut linux = linux(input, &sc, &capabilities, &pod_linux.cgroup_parent, &mut warnings)?;
    linux.set_rootfs_propagation(mounts.rootfs_propagation.map(String::from));
    linux.set_mount_label(labels.as_ref().map(|(_, mount)| mount.clone()));
    let mut process = process(input, &sc, &user, capabilities, &mut warnings)?;
    process.set_selinux_label(labels.map(|(process, _)| process));

    let mut all = annotations::allowed(config.annotations.clone(), &input.policy.annotations);
    all.extend(annotations::allowed(input.pod.annotations.clone(), &input.policy.annotations));
    all.extend(annotations::identity(input.pod_id, input.pod, Some((name, input.image_name))));
    let root = RootBuilder::default().path("rootfs").readonly(sc.readonly_rootfs).build();
    let mut spec = SpecBuilder::default()
        .version(VERSION)
        .root(root.context(|| "rootfs".into())?)
        .process(process)
        .mounts(mounts.list)
        .linux(linux)
        .annotations(all)
        .build()
        .context(|| "spec".into())?;
    // The UTS namespace is the pod's: its name is set already.
    spec.set_hostname(None);
    Ok(ContainerSpec { spec, warnings, user, ensure: mounts.ensure })
}

fn check_mapped(user: &ResolvedUser, namespaces: &PodNamespaces) -> Result<()> {
    let Some((_, maps)) = &namespaces.user else { return Ok(()) };
    let missing = |map: &[IdMap], id: u32| facts::host_id(map, id).is_none();
    if missing(&maps.uids, user.uid) {
        return Err(Error::invalid(format!("uid {} is not mapped in the pod's user namespace", user.uid)));
    }
    match user.groups.iter().find(|g| missing(&maps.gids, **g)) {
        Some(gid) => Err(Error::invalid(format!("gid {gid} is not mapped in the pod's user namespace"))),
        None => Ok(()),
    }
}

fn process(
    input: &ContainerInput<'_>,
    sc: &cri::LinuxContainerSecurityContext,
    user: &ResolvedUser,
    capabilities: LinuxCapabilities,
    warnings: &mut Vec<String>,
) -> Result<Process> {
    let credentials = UserBuilder::default()
        .uid(user.uid)
        .gid(user.gid)
        .additional_gids(user.groups.clone())
        .build()
        .context(|| "user".into())?;
    let mut process = ProcessBuilder::default()
        .terminal(input.config.tty)
        .user(credentials)
        .args(process::args(input.config, input.image)?)
        .env(process::env(input.config, input.image, &input.files.hostname)?)
        .cwd(process::cwd(input.config, input.image)?)
        .capabilities(capabilities)
        .no_new_privileges(sc.no_new_privs)
        .build()
        .context(|| "process".into())?;
    process.set_rlimits(rlimits(input.node, input.policy, warnings)?);
    let limits = input.config.linux.as_ref().and_then(|l| l.resources.as_ref());
    process.set_oom_score_adj(resources::oom_score_adj(limits, input.node, warnings)?);
    process.set_apparmor_profile(security::apparmor(sc, input.node, input.policy, warnings)?);
    Ok(process)
}

/// The operator's limits, no higher than what the daemon may give.
fn rlimits(node: &NodeFacts, policy: &NodePolicy, warnings: &mut Vec<String>) -> Result<Option<Vec<PosixRlimit>>> {
    if policy.rlimits.is_empty() {
        return Ok(None);
    }
    let may_raise = node.bounding.contains(&Capability::SysResource);
    let mut list = Vec::new();
    for wanted in &policy.rlimits {
        let typ: PosixRlimitType = serde_json::from_value(serde_json::Value::String(wanted.name.clone()))
            .context_kind(ErrorKind::InvalidArgument, || format!("rlimits: {:?} is no resource limit", wanted.name))?;
        let highest = match node.hard_limits.get(&wanted.name) {
            Some(own) if !may_raise => *own,
            _ => u64::MAX,
        };
        if wanted.hard > highest {
            warnings.push(format!("{} lowered to {highest}: the runtime lacks CAP_SYS_RESOURCE", wanted.name));
        }
        let hard = wanted.hard.min(highest);
        let limit = PosixRlimitBuilder::default().typ(typ).hard(hard).soft(wanted.soft.min(hard)).build();
        list.push(limit.context(|| wanted.name.clone())?);
    }
    Ok(Some(list))
}

fn linux(
    input: &ContainerInput<'_>,
    sc: &cri::LinuxContainerSecurityContext,
    capabilities: &LinuxCapabilities,
    cgroup_parent: &str,
    warnings: &mut Vec<String>,
) -> Result<Linux> {
    let limits = input.config.linux.as_ref().and_then(|l| l.resources.clone()).unwrap_or_default();
    let mut limits: LinuxResources = resources::linux_resources(&limits, input.node, warnings)?;
    resources::pids(&mut limits, input.policy)?;
    let devices = devices::devices(input, sc.privileged)?;
    limits.set_devices(Some(devices.rules));

    // On v2 the container's own cgroup is the root of what it sees; a privileged one
    // sees the host's tree, as it does on v1.
    let own_cgroups = input.node.cgroup_mode == CgroupMode::Unified && !sc.privileged;
    let mut linux = LinuxBuilder::default()
        .namespaces(namespaces(input.namespaces, own_cgroups)?)
        .cgroups_path(resources::cgroups_path(cgroup_parent, input.id, input.node.cgroup_driver)?)
        .resources(limits)
        .build()
        .context(|| "linux section".into())?;
    set_user_maps(&mut linux, input.namespaces)?;
    linux.set_devices((!devices.nodes.is_empty()).then_some(devices.nodes));
    let no_caps = Capabilities::new();
    let bounding = capabilities.bounding().as_ref().unwrap_or(&no_caps);
    linux.set_seccomp(security::seccomp(sc, input.seccomp_profile, bounding, input.node, input.policy)?);
    // The lists stand as they are: a kubelet sends them in full, and none at all for
    // a pod whose /proc is to be unmasked.
    let (masked, read_only) = if sc.privileged {
        (Vec::new(), Vec::new())
    } else {
        (inside("masked_paths", &sc.masked_paths)?, inside("readonly_paths", &sc.readonly_paths)?)
    };
    linux.set_masked_paths(Some(masked)).set_readonly_paths(Some(read_only));
    Ok(linux)
}

fn inside(field: &str, list: &[String]) -> Result<Vec<String>> {
    list.iter()
        .map(|path| {
            paths::check_text(field, path)?;
            if path.starts_with('/') && !paths::climbs(path) {
                Ok(path.clone())
            } else {
                Err(Error::invalid(format!("{field}: {path:?} is not an absolute path without \"..\"")))
            }
        })
        .collect()
}

/// The namespaces of a container: its own mount namespace, the pod's others by path,
/// the host's by absence.
pub(crate) fn namespaces(pod: &PodNamespaces, own_cgroups: bool) -> Result<Vec<LinuxNamespace>> {
    let make = |typ: LinuxNamespaceType, path: Option<&PathBuf>| {
        let mut builder = LinuxNamespaceBuilder::default().typ(typ);
        if let Some(path) = path {
            builder = builder.path(path);
        }
        builder.build().context(|| format!("{typ} namespace"))
    };
    let mut list = Vec::new();
    if let Some((path, _)) = &pod.user {
        list.push(make(LinuxNamespaceType::User, Some(path))?);
    }
    list.push(make(LinuxNamespaceType::Mount, None)?);
    match &pod.pid {
        PidMode::Private => list.push(make(LinuxNamespaceType::Pid, None)?),
        PidMode::Path(path) => list.push(make(LinuxNamespaceType::Pid, Some(path))?),
        PidMode::Host => {}
    }
    for (typ, path) in [
        (LinuxNamespaceType::Network, &pod.net),
        (LinuxNamespaceType::Ipc, &pod.ipc),
        (LinuxNamespaceType::Uts, &pod.uts),
    ] {
        if path.is_some() {
            list.push(make(typ, path.as_ref())?);
        }
    }
    if own_cgroups {
        list.push(make(LinuxNamespaceType::Cgroup, None)?);
    }
    Ok(list)
}

/// Runtimes want a user namespace's maps even where they only join it.
pub(crate) fn set_user_maps(linux: &mut Linux, pod: &PodNamespaces) -> Result<()> {
    let (uids, gids) = match &pod.user {
        Some((_, maps)) => (Some(mounts::id_mappings(&maps.uids)?), Some(mounts::id_mappings(&maps.gids)?)),
        None => (None, None),
    };
    linux.set_uid_mappings(uids).set_gid_mappings(gids);
    Ok(())
}

/// The rule that a cgroup's device list starts with.
pub(crate) fn deny_all_devices() -> Result<LinuxDeviceCgroup> {
    LinuxDeviceCgroupBuilder::default().allow(false).access("rwm").build().context(|| "device rule".into())
}
