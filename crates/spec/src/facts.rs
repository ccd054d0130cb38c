//! What a spec depends on beyond CRI's own messages: the node, the operator's
//! defaults, the pod's namespaces and files, the image. Plain data; who gathers
//! it (`pods`) does the IO.

use oci_spec::runtime::Capabilities;
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

/// How the node's cgroups are mounted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum CgroupMode {
    /// One cgroup v2 tree with the controllers at /sys/fs/cgroup.
    #[default]
    Unified,
    /// cgroup v1, also where an empty v2 tree is mounted beside it.
    Legacy,
}

/// Who makes the cgroups: it decides the form of `linux.cgroupsPath`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum CgroupDriver {
    /// The runtime writes below /sys/fs/cgroup itself: `PARENT/ID`.
    #[default]
    Cgroupfs,
    /// systemd makes a scope in a slice: `SLICE:longshore:ID`.
    Systemd,
}

/// What the kernel and the daemon's own rights allow on this node.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct NodeFacts {
    /// The cgroup layout.
    pub cgroup_mode: CgroupMode,
    /// Who makes the cgroups.
    pub cgroup_driver: CgroupDriver,
    /// Huge page sizes that the hugetlb controller knows, in the controller's
    /// words (`2MB`, `1GB`); none where the controller is not mounted.
    pub hugepage_sizes: BTreeSet<String>,
    /// Whether the memory controller accounts for swap (a limit can be set).
    pub swap_accounting: bool,
    /// Mount options of the host's cgroup2 that a second mount of it in the same
    /// cgroup namespace must repeat or would strip (`nsdelegate`, …).
    pub cgroup2_options: Vec<String>,
    /// The daemon's capability bounding set: nothing outside it can be given.
    pub bounding: Capabilities,
    /// The daemon's own oom_score_adj: without CAP_SYS_RESOURCE no child can be
    /// put below it.
    pub oom_score_adj: i32,
    /// The daemon's hard resource limits by name (`RLIMIT_NOFILE`), `u64::MAX`
    /// for unlimited; without CAP_SYS_RESOURCE no child can exceed them.
    pub hard_limits: BTreeMap<String, u64>,
    /// The kernel filters system calls.
    pub seccomp: bool,
    /// AppArmor is enabled.
    pub apparmor: bool,
    /// SELinux is enabled.
    pub selinux: bool,
    /// Kernel and OCI runtime can make a mount read-only with all below it.
    pub recursive_read_only: bool,
    /// Kernel and OCI runtime can map the owners of bind mounts.
    pub idmap_mounts: bool,
    /// The machine, as Rust names it (`x86_64`, `aarch64`, …).
    pub arch: String,
}

/// A resource limit that every container gets unless it can't be given.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rlimit {
    /// The limit's name with its prefix, such as `RLIMIT_NOFILE`.
    pub name: String,
    /// The soft limit; `u64::MAX` is unlimited.
    pub soft: u64,
    /// The hard limit; `u64::MAX` is unlimited.
    pub hard: u64,
}

/// What the operator has chosen for all containers of a handler.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodePolicy {
    /// The filter of a container that names no seccomp profile: true the default
    /// profile, false none (what CRI's conformance suite expects).
    pub default_seccomp: bool,
    /// The AppArmor profile, loaded by the operator, that "runtime default" means.
    pub default_apparmor: Option<String>,
    /// Process limit of each container where CRI gives none.
    pub pids_limit: Option<i64>,
    /// Resource limits of each container; none means that it inherits the daemon's.
    pub rlimits: Vec<Rlimit>,
    /// Annotations that reach the OCI runtime: exact keys, or prefixes with a `*`
    /// at the end. Keys that a runtime acts upon need a pattern that names their
    /// domain; a bare `*` does not let them pass (CVE-2023-6476, CVE-2024-3154).
    pub annotations: Vec<String>,
}

impl Default for NodePolicy {
    /// No filter unless asked for, and the kubelet's own inert annotations.
    fn default() -> Self {
        Self {
            default_seccomp: false,
            default_apparmor: None,
            pids_limit: None,
            rlimits: Vec::new(),
            annotations: vec!["io.kubernetes.container.*".into(), "io.kubernetes.pod.*".into()],
        }
    }
}

/// One device node of the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostDevice {
    /// Where it is on the host.
    pub path: PathBuf,
    /// True for a block device, false for a character device.
    pub block: bool,
    /// Major number.
    pub major: u32,
    /// Minor number.
    pub minor: u32,
    /// Permission bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
}

/// How the mount that carries a host path propagates.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Propagation {
    /// Neither way.
    Private,
    /// From its master to it.
    Slave,
    /// Both ways.
    Shared,
}

/// What is known of the host paths that one container names.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct HostFacts {
    /// For each host path of a CRI device, as written there: the device nodes at
    /// it, or below it where it is a directory.
    pub devices: BTreeMap<String, Vec<HostDevice>>,
    /// Every device node of the host, for a privileged container.
    pub all_devices: Vec<HostDevice>,
    /// For each host path of a mount, as written in CRI: how it propagates. A path
    /// that is absent here is not checked.
    pub propagation: BTreeMap<String, Propagation>,
}

/// One line of a uid or gid map.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct IdMap {
    /// First id on the host.
    pub host: u32,
    /// First id in the container.
    pub container: u32,
    /// How many.
    pub length: u32,
}

/// A user namespace's maps.
#[derive(Debug, Clone, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
pub struct IdMaps {
    /// The uid map.
    pub uids: Vec<IdMap>,
    /// The gid map.
    pub gids: Vec<IdMap>,
}

impl IdMaps {
    /// The host's uid of the container's root, if it is mapped.
    pub fn root_uid(&self) -> Option<u32> {
        host_id(&self.uids, 0)
    }

    /// The host's gid of the container's root, if it is mapped.
    pub fn root_gid(&self) -> Option<u32> {
        host_id(&self.gids, 0)
    }
}

/// The host's id of a container's id.
pub(crate) fn host_id(map: &[IdMap], id: u32) -> Option<u32> {
    map.iter()
        .find(|m| id >= m.container && id - m.container < m.length)
        .and_then(|m| m.host.checked_add(id - m.container))
}

/// The pid namespace of a container.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum PidMode {
    /// A new one of its own.
    #[default]
    Private,
    /// The host's.
    Host,
    /// The pod's, or another container's, by path.
    Path(PathBuf),
}

/// Where the pod's namespaces are; `None` is the host's.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PodNamespaces {
    /// The network namespace.
    pub net: Option<PathBuf>,
    /// The IPC namespace.
    pub ipc: Option<PathBuf>,
    /// The UTS namespace.
    pub uts: Option<PathBuf>,
    /// The user namespace and its maps.
    pub user: Option<(PathBuf, IdMaps)>,
    /// The container's pid namespace.
    pub pid: PidMode,
}

/// The files that every container of a pod sees. A path of `None` is not mounted.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PodFiles {
    /// The pod's host name (the node's own in a host-network pod), for `HOSTNAME`.
    pub hostname: String,
    /// Becomes /etc/hostname.
    pub hostname_path: Option<PathBuf>,
    /// Becomes /etc/hosts.
    pub hosts_path: Option<PathBuf>,
    /// Becomes /etc/resolv.conf.
    pub resolv_conf_path: Option<PathBuf>,
    /// Becomes /dev/shm: the pod's tmpfs, or /dev/shm of the host.
    pub shm_path: Option<PathBuf>,
}

/// What an image's configuration says about running it.
#[derive(Debug, Clone, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
#[serde(default)]
pub struct ImageDefaults {
    /// ENTRYPOINT.
    pub entrypoint: Vec<String>,
    /// CMD.
    pub cmd: Vec<String>,
    /// ENV as `KEY=VALUE`.
    pub env: Vec<String>,
    /// WORKDIR; empty for none.
    pub working_dir: String,
    /// USER as `user[:group]`; empty for none.
    pub user: String,
    /// VOLUME paths.
    pub volumes: Vec<String>,
}

impl From<&oci_spec::image::ImageConfiguration> for ImageDefaults {
    fn from(image: &oci_spec::image::ImageConfiguration) -> Self {
        let Some(config) = image.config() else { return Self::default() };
        Self {
            entrypoint: config.entrypoint().clone().unwrap_or_default(),
            cmd: config.cmd().clone().unwrap_or_default(),
            env: config.env().clone().unwrap_or_default(),
            working_dir: config.working_dir().clone().unwrap_or_default(),
            user: config.user().clone().unwrap_or_default(),
            volumes: config.volumes().clone().unwrap_or_default(),
        }
    }
}
